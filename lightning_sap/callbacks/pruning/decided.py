"""A pruning that is decided, and may have been carried out in part: what a checkpoint of that moment holds of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

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
        rewinds: Whether the weights are rewound, where there are some to go back to.
        last: Whether no pruning follows it.
    """

    masks: MaskSet
    count: int
    pqi: float
    record: RoundRecord
    rewinds: bool
    last: bool

    def pack(self) -> dict[str, Any]:
        """As plain values, one bit per weight for the masks."""
        return {**vars(self), "masks": self.masks.pack(), "record": asdict(self.record)}

    @classmethod
    def unpack(cls, packed: Mapping[str, Any]) -> DecidedPruning:
        """The pruning from :meth:`pack`, on the CPU."""
        masks, record = MaskSet.unpack(packed["masks"]), RoundRecord(**packed["record"])
        return cls(**{**packed, "masks": masks, "record": record})
