"""What a pruner offers, and what a listener may answer at the end of a round."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import nn

from lightning_sap.engine.groups import PrunableTensor
from lightning_sap.rounds.history import History, RoundRecord


@runtime_checkable
class MonitoredPruner(Protocol):
    """What a monitor may ask of a pruner."""

    def orders(self) -> tuple[float, float]:
        """Orders p and q of the index by which it prunes."""

    def pieces(self, module: nn.Module) -> dict[str, PrunableTensor]:
        """The weights it prunes, live, with their masks."""

    def prunes(self) -> bool:
        """Whether it has rounds, or only holds masks."""

    def current_round(self) -> int:
        """Number of prunings so far."""

    def ends_round(self, epoch: int) -> bool:
        """Whether that epoch is planned to be the last of a round."""

    def pqi_after_pruning(self) -> float | None:
        """Index right after the latest pruning, before retraining; at the start of training before the first."""

    def archive_rounds(self) -> None:
        """Save each round of the coming training, so that it can be restored."""

    def adopt_finished_run(self, module: nn.Module) -> None:
        """Be up to date at the end of a fit that trained nothing, since its checkpoint was of a run that was over."""

    def note_phase(self, round: int, phase: str, reason: str) -> None:
        """Take into the history how the round that just ended was judged."""

    @property
    def history(self) -> History:
        """One record for each round that ended."""

    def restore_round(self, round: int, module: nn.Module | None = None) -> RoundRecord:
        """Put the trained weights and the masks of a round back, and return its record."""


@runtime_checkable
class RoundListener(Protocol):
    """What a pruner may ask of a monitor."""

    def see_epoch(self, trainer: Any, module: Any) -> None:
        """Take in the epoch that ends, before its round is saved: a run resumed from there does not see its end."""
