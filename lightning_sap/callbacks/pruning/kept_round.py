"""The latest round that can be gone back to, as a run and its checkpoint hold it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from lightning_sap.engine.masks import MaskSet
from lightning_sap.engine.weights import parameter_names
from lightning_sap.rewind import place_weights
from lightning_sap.sharding import whole


@dataclass(frozen=True)
class KeptRound:
    """The latest round that can be gone back to.

    Attributes:
        round: Its number.
        weights: Its trained weights and buffers, on the CPU.
        masks: Its masks.
        averages: Weights and buffers of each averaged copy that another callback keeps, on the CPU.
        companions: Its masks of biases and norms.
        gathered: What its scores are made of, on the CPU; see :class:`PruningState`.
    """

    round: int
    weights: dict[str, Tensor]
    masks: MaskSet
    averages: list[dict[str, Tensor]] = field(default_factory=list)
    companions: MaskSet = field(default_factory=lambda: MaskSet({}))
    gathered: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def pack(self) -> dict[str, Any]:
        """As plain values and CPU tensors, one bit per weight for the masks; a collective where weights are sharded."""
        return {
            "round": self.round,
            "weights": whole_tensors(self.weights),
            "masks": self.masks.pack(),
            "averages": [whole_tensors(average) for average in self.averages],
            "companions": self.companions.pack(),
            "gathered": whole_sums(self.gathered),
        }

    @classmethod
    def unpack(cls, packed: Mapping[str, Any]) -> KeptRound:
        """The round from :meth:`pack`, on the CPU."""
        masks, companions = (MaskSet.unpack(packed.get(name, {})) for name in ("masks", "companions"))
        return cls(**{**packed, "masks": masks, "companions": companions})

    def placed(self, module: nn.Module, weights: Mapping[str, Tensor]) -> KeptRound:
        """The same, its tensors where those of the module are and sharded as they are."""
        averages = [place_weights(module, average) for average in self.averages]
        companions = placed(self.companions, parameter_names(module))
        weights_, masks = place_weights(module, self.weights), self.masks.like(weights)
        return replace(self, weights=weights_, masks=masks, averages=averages, companions=companions)


def placed(companions: MaskSet, parameters: Mapping[str, Tensor]) -> MaskSet:
    """The masks of those that the module has, where they are."""
    known = {name: mask for name, mask in companions.pruned.items() if name in parameters}
    return MaskSet(known).moved({name: parameters[name].detach() for name in known})


def whole_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All rows of each; a collective where they are sharded."""
    return {name: whole(tensor) for name, tensor in tensors.items()}


def copied_sums(gathered: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Copies of what scores are made of, on the CPU, sharded alike."""
    return {key: {k: t.detach().to("cpu", copy=True) for k, t in sums.items()} for key, sums in gathered.items()}


def whole_sums(gathered: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """The same, all rows of each; a collective where they are sharded."""
    return {key: whole_tensors(sums) for key, sums in copied_sums(gathered).items()}
