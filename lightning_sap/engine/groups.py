"""GROUPS: a weight to measure and prune, and what of it forms one vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lightning_sap.engine.effective import pruned_by_torch
from lightning_sap.engine.floors import Floor
from lightning_sap.engine.matrices import PLAIN, Layout
from lightning_sap.engine.weights import Untrained, is_frozen, prunable_weights
from lightning_sap.functional.pqi import DTYPES, PowerSums
from lightning_sap.policies.base import Importance
from lightning_sap.policies.importance import Magnitude
from lightning_sap.sharding import Shards, local, shard_like, shards_of

Scope = Literal["neuron", "layer", "global"]


@dataclass
class Memory:
    """The latest power sums of one weight's scores and of what they were taken, for whoever asks next.

    Monitor and pruner ask for the same ones at the end of a round. Other callbacks may have written to the weight in
    between, in ways that leave no trace, so that the bits of the scores are compared: a third of the time that the sums
    take.
    """

    orders: tuple[float, float] | None = None
    pruned: Tensor | None = None
    bits: int = 0
    sums: PowerSums | None = None

    def recall(self, orders: tuple[float, float], pruned: Tensor | None, bits: int) -> PowerSums | None:
        """The sums, where they are of these orders, this very mask and these bits."""
        same = self.orders == orders and self.pruned is pruned and self.bits == bits
        return self.sums if same else None

    def keep(self, orders: tuple[float, float], pruned: Tensor | None, bits: int, sums: PowerSums) -> None:
        """Remember these instead."""
        self.orders, self.pruned, self.bits, self.sums = orders, pruned, bits, sums


class PrunableTensor(NamedTuple):
    """A weight to measure and prune.

    Attributes:
        weight: The weights, any shape and floating dtype, sharded or not.
        pruned: Bool tensor of the same shape, True where a weight is pruned already; None: nowhere.
        units: View of a tensor of that shape as ``(units, weights of a unit)``; None: axis 0 is the unit.
        memory: Where its power sums are kept, so that they are not taken twice; None: nowhere.
        importance: What scores the weights.
        floors: How many weights of which sets always stay.
        layout: How its matrix, or several of them, lies in it.
    """

    weight: Tensor
    pruned: Tensor | None = None
    units: Callable[[Tensor], Tensor] | None = None
    memory: Memory | None = None
    importance: Importance = Magnitude()
    floors: tuple[Floor, ...] = ()
    layout: Layout = PLAIN

    def local(self) -> PrunableTensor:
        """What this process holds of it."""
        return self._replace(weight=local(self.weight), pruned=None if self.pruned is None else local(self.pruned))

    def mask(self) -> Tensor:
        """Where it is pruned, sharded as it is; a new tensor where nothing is."""
        if self.pruned is not None:
            return self.pruned
        return shard_like(torch.zeros_like(local(self.weight), dtype=torch.bool), self.weight)

    def rows(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as ``(units, weights of a unit)``."""
        if self.units is not None:
            return self.units(tensor)
        return tensor.flatten(1) if tensor.dim() > 1 else tensor.reshape(-1, 1)

    def from_rows(self, rows: Tensor) -> Tensor:
        """Undo :meth:`rows`."""
        if self.units is None:
            return rows.reshape(self.weight.shape)
        position = self.rows(torch.arange(rows.numel(), device=rows.device).reshape(self.weight.shape))
        return (
            torch.empty_like(rows).view(-1).scatter(0, position.reshape(-1), rows.reshape(-1)).view(self.weight.shape)
        )

    def is_apart(self, scope: Scope) -> bool:
        """Whether in a scope it is divided into groups: into output units, or a stack into its matrices."""
        return scope == "neuron" or (scope == "layer" and self.layout.stack > 0)

    def groups(self, tensor: Tensor, scope: Scope) -> Tensor:
        """A tensor of the weight's shape as ``(groups, weights of a group)``."""
        if scope == "neuron":
            return self.rows(tensor)
        return tensor.flatten(self.layout.stack).flatten(0, -2) if self.is_apart(scope) else tensor.reshape(1, -1)

    def from_groups(self, groups: Tensor, scope: Scope) -> Tensor:
        """Undo :meth:`groups`."""
        return self.from_rows(groups) if scope == "neuron" else groups.reshape(self.weight.shape)


def scores_of(tensors: Mapping[str, PrunableTensor]) -> dict[str, Tensor]:
    """The scores of the weights that this process holds, checked but for being finite; magnitudes are not copied.

    Raises:
        ValueError: If an importance does not give one score for each weight; it names the parameter.
    """
    return {name: _scores(name, tensor.local()) for name, tensor in tensors.items()}


def _scores(name: str, tensor: PrunableTensor) -> Tensor:
    shape = tensor.weight.shape
    found: Any = tensor.importance.scores(name, tensor.weight)
    if not isinstance(found, Tensor) or found.dtype not in DTYPES or found.shape != shape:
        got = f"{found.dtype} of shape {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)
        raise ValueError(
            f"{tensor.importance!r} must return one score for each weight of {name!r}: a tensor of shape "
            f"{tuple(shape)} of one of the dtypes {DTYPES}; got {got}."
        )
    return found.to(tensor.weight.device)


def check_scope(scope: str) -> None:
    """Raise unless the scope is known."""
    if scope not in get_args(Scope):
        raise ValueError(f"Unknown scope {scope!r}; it must be one of 'neuron', 'layer' and 'global'.")


def dense_tensors(module: nn.Module, untrained: Untrained = is_frozen) -> dict[str, PrunableTensor]:
    """The weights of a module that are prunable by default, live; of them ``torch.nn.utils.prune`` may prune some."""
    weights, parts = prunable_weights(module, untrained=untrained), dict(module.named_modules())
    pruned = {
        id(getattr(parts[path], f"{name}_orig")): getattr(parts[path], f"{name}_mask") == 0
        for path, name in pruned_by_torch(module)
    }
    return {
        n: PrunableTensor(w.parameter.detach(), pruned.get(id(w.parameter)), w.units, layout=w.layout)
        for n, w in weights.items()
    }


def empty_units(tensors: Mapping[str, PrunableTensor]) -> dict[str, tuple[int, int]]:
    """For each tensor how many of its output units have no weights left, and how many it has; of all its shards."""
    here = {name: tensor.local() for name, tensor in tensors.items()}
    empty = {name: tensor.rows(tensor.pruned).all(1) for name, tensor in here.items() if tensor.pruned is not None}
    if not empty:
        return dict.fromkeys(tensors, (0, 0))
    device = next(iter(empty.values())).device
    counts = torch.stack([units.sum().to(device) for units in empty.values()]).cpu()
    both = torch.stack([counts, torch.tensor([len(units) for units in empty.values()])])
    of_shards = zip(*held_by(tensors).sum(both).tolist(), strict=True)
    return dict.fromkeys(tensors, (0, 0)) | dict(zip(empty, of_shards, strict=True))


def held_by(tensors: Mapping[str, PrunableTensor]) -> Shards:
    """The processes over which these weights are sharded."""
    return shards_of(tensor.weight for tensor in tensors.values())
