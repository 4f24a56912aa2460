"""How long the epochs of a fit are: what the dataloader says, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn


@dataclass
class EpochLengths:
    """The length of the epoch that goes on, read anew in each: it may change, be unknown, or be wrong.

    Attributes:
        planned: Optimizer steps of an epoch when the schedules began; None if not known then.
        mean: Optimizer steps of an epoch, as a schedule is taken to know them: as planned, or, where training changes
            the dataloader, the mean of the round's epochs so far.
        late: Optimizer steps of the round's first epoch that were taken before the round began.
        epoch: The epoch that was seen last.
        batches: Its batches so far.
        said: How many it has, as the dataloader says; None if it does not say.
        wrong: What the dataloader said of the epoch before and the fewer that it gave; None where both agree.
    """

    planned: int | None = None
    mean: float | None = None
    late: int = 0
    epoch: int = -1
    batches: int = 0
    said: int | None = None
    wrong: tuple[int, int] | None = None

    def steps(self, trainer: Trainer) -> int | None:
        """Optimizer steps of the epoch that goes on, as far as one can know; None if not."""
        said = _said(trainer)
        if said is None:
            return None
        batches = self.wrong[1] if self.wrong is not None and self.wrong[0] == said else said
        return -(-batches // trainer.accumulate_grad_batches)

    def plan(self, trainer: Trainer) -> None:
        """Take the length of an epoch for that of all, unless an earlier part of the run did: then it stays."""
        if self.planned is None:
            self.planned = self.mean = self.steps(trainer)

    def count(self, trainer: Trainer, steps: int, epochs: int, in_epoch: int) -> None:
        """Take this epoch into the mean: the round has taken so many steps, ``in_epoch`` of the epoch are over."""
        now = self.steps(trainer)
        if epochs == 0:
            self.late = max(0, in_epoch - steps)
        if self.planned is not None and now is not None and _reloads(trainer):
            self.mean = (steps - in_epoch + self.late + now) / (epochs + 1)

    def see(self, trainer: Trainer, batches: int) -> bool:
        """Note how far the epoch is; True where the one before turns out to have been shorter than was said.

        An epoch that ends early is seen only when the next one starts.
        """
        before, was_wrong = self.batches, self.wrong is not None
        if trainer.current_epoch != self.epoch and before and self.said is not None:
            self.wrong = (self.said, before) if before < self.said else None
        self.epoch, self.batches, self.said = trainer.current_epoch, batches, _said(trainer)
        return self.wrong is not None and not was_wrong

    def warn(self) -> None:
        """Say that an epoch was shorter than the dataloader said."""
        if self.wrong is not None:
            rank_zero_warn(
                f"The training dataloader says that an epoch has {self.wrong[0]} batches, and gave {self.wrong[1]}. "
                "From now on a round takes what the epoch before gave for the length of an epoch. Let `__len__` be "
                "what it gives, or set limit_train_batches."
            )


def _reloads(trainer: Trainer) -> bool:
    return trainer.reload_dataloaders_every_n_epochs > 0  # type: ignore[attr-defined, no-any-return]


def _said(trainer: Trainer) -> int | None:
    batches = trainer.num_training_batches
    return None if batches == float("inf") else int(batches)
