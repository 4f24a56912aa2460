"""A pruning that is decided, and may have been carried out in part: what a checkpoint of that moment holds of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from lightning_sap.callbacks.pruning.kept_round import placed
from lightning_sap.engine.masks import MaskSet
from lightning_sap.rounds.history import RoundRecord


@dataclass(frozen=True)
class DecidedPruning:
    """A pruning that is decided, and may have been carried out in part.

    Attributes:
        masks: Those of the next round.
        count: Weights that it takes.
        pqi: PQ Index of all weights right after it.
        record: The round before it.
        companions: The masks of biases and norms that go with whole units.
        finest: Of a pruning of whole units, how many weights one more would have taken.
        rewinds: Whether the weights are rewound, where there are some to go back to.
        last: Whether no pruning follows it.
    """

    masks: MaskSet
    count: int
    pqi: float
    record: RoundRecord
    rewinds: bool
    last: bool
    companions: MaskSet = field(default_factory=lambda: MaskSet({}))
    finest: int = 0

    def pack(self) -> dict[str, Any]:
        """As plain values, one bit per weight for the masks."""
        masks, companions = self.masks.pack(), self.companions.pack()
        return {**vars(self), "masks": masks, "companions": companions, "record": without_folder(asdict(self.record))}

    @classmethod
    def unpack(cls, packed: Mapping[str, Any]) -> DecidedPruning:
        """The pruning from :meth:`pack`, on the CPU."""
        masks, companions = (MaskSet.unpack(packed[name]) for name in ("masks", "companions"))
        return cls(**{**packed, "masks": masks, "companions": companions, "record": RoundRecord(**packed["record"])})

    def placed(self, weights: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> DecidedPruning:
        """The same, its masks where the live tensors are."""
        return replace(self, masks=self.masks.like(weights), companions=placed(self.companions, parameters))


def without_folder(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record, or part of one, with the name alone of its file: folders may move."""
    return {key: os.path.basename(value) if key == "path" and value else value for key, value in record.items()}
