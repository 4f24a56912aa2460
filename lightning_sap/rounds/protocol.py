"""What a pruner shows to others, and what a listener answers at the end of a round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import nn

from lightning_sap.engine.groups import PrunableTensor
from lightning_sap.rounds.history import RoundRecord

Notes: TypeAlias = Mapping[int, Mapping[str, Any]]  # by round, fields of its record


@dataclass(frozen=True)
class RoundEnd:
    """A round that has ended.

    Attributes:
        record: The round as it was trained: its number, indices, remaining weights and metrics.
        history: The records of the rounds before it.
        taken_back: Whether another listener has taken it back.
        sound: Whether it keeps the tolerance; True where there is none, or its metric is not known.
    """

    record: RoundRecord
    history: Sequence[RoundRecord]
    taken_back: bool = False
    sound: bool = True


@dataclass(frozen=True)
class GoOn:
    """Prune, and train the next round.

    Attributes:
        scale: The policy's counts are multiplied by it; 0 prunes nothing, and leaves the weights as they are.
        keep: Whether the round is one to go back to.
        most: At most so many weights go; None: no limit.
        last: Whether the next round is the last one, and takes all the training that is left.
        notes: Fields for the records of rounds.
    """

    scale: float = 1.0
    keep: bool = True
    most: int | None = None
    last: bool = False
    notes: Notes = field(default_factory=dict)


@dataclass(frozen=True)
class Stop:
    """End training, as soon as the Trainer's ``min_epochs`` and ``min_steps`` allow.

    Attributes:
        restore: The round whose weights and masks are put back after training; None: the module stays as it is.
        notes: Fields for the records of rounds.
    """

    restore: int | None = None
    notes: Notes = field(default_factory=dict)


@dataclass(frozen=True)
class TakeBack:
    """Put back the weights, buffers and masks of the latest round that was kept, prune them anew, and go on.

    Attributes:
        scale: The policy's counts are multiplied by it; 0 prunes nothing, and leaves the weights as they were kept.
        most: At most so many weights go; None: no limit.
        last: Whether the next round is the last one, and takes all the training that is left.
        notes: Fields for the records of rounds.
    """

    scale: float = 1.0
    most: int | None = None
    last: bool = False
    notes: Notes = field(default_factory=dict)


Answer: TypeAlias = GoOn | Stop | TakeBack


class RoundListener:
    """Hears of the end of each round and answers; a callback that also subclasses this is asked by the pruner.

    Attributes:
        may_take_back: Whether it may answer :class:`TakeBack`. The pruner then keeps a copy of the latest kept round.
        may_stop: Whether it may answer :class:`Stop`. A run that was cut off after that answer then ends at once.
        may_restore: Whether it may answer :class:`Stop` with a round to put back. The pruner then saves every round.

    Example:
        >>> from lightning.pytorch import Callback
        >>> class StopWhenSparse(RoundListener, Callback):
        ...     def on_round_end(self, trainer, pl_module, event):
        ...         return Stop() if event.record.remaining < 0.1 else GoOn()
    """

    may_take_back: bool = False
    may_stop: bool = True
    may_restore: bool = False

    def on_round_end(self, trainer: Any, pl_module: Any, event: RoundEnd) -> Answer:
        """Say what comes after a round; of the answers of all ranks, that of rank 0 counts."""
        del trainer, pl_module, event
        return GoOn()

    def on_run_end(self, trainer: Any, pl_module: Any, history: Sequence[RoundRecord]) -> None:
        """Look at the finished run: the module holds what it is going to keep."""


@runtime_checkable
class PrunerView(Protocol):
    """What others may read of a pruner."""

    def orders(self) -> tuple[float, float]:
        """Orders p and q of the index by which it prunes."""

    def tensors(self, module: nn.Module) -> dict[str, PrunableTensor]:
        """The weights it prunes, live, with their masks."""

    def settings(self) -> dict[str, bool | int | float | str | None]:
        """Its name and the options to compare runs by, as loggers take them: numbers, texts, or what is printed."""

    def prunes(self) -> bool:
        """Whether it has rounds, or only holds masks."""

    def current_round(self) -> int:
        """Number of the round that goes on."""

    def ends_round(self, trainer: Any) -> bool:
        """Whether the round ends with what has been trained now, as far as is planned."""

    def opened(self) -> Sequence[str]:
        """The parameters that are open in this round, to be pruned again: its index cannot be compared."""

    @property
    def history(self) -> Sequence[RoundRecord]:
        """The records of the rounds that ended."""

    def pqi_after_pruning(self) -> float | None:
        """Index right after the latest pruning, before retraining; at the start of training before the first."""
