"""How many rounds, and how long."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RoundPlan:
    """Rounds of a training: round t is epochs ``first_epoch + t · epochs`` to ``first_epoch + (t + 1) · epochs - 1``.

    Attributes:
        rounds: How many prunings; None: one after every round for as long as training goes on.
        epochs: Length of a round.
        first_epoch: Epoch at which the first round starts.
        last_epoch: End of training (exclusive) when the plan was made; None if training is not limited by epochs.
        schedules_from: Epoch at which the learning-rate schedules begin: before ``first_epoch`` where training goes on
            from a checkpoint that was not pruned.
    """

    rounds: int | None
    epochs: int
    first_epoch: int = 0
    last_epoch: int | None = None
    schedules_from: int = field(default=0, repr=False)

    def due(self, epoch: int) -> int:
        """How many prunings lie before an epoch."""
        passed = (epoch - self.first_epoch) // self.epochs
        return passed if self.rounds is None else min(passed, self.rounds)

    def ends_round(self, epoch: int) -> bool:
        """Whether an epoch is planned to be the last of a round."""
        return self.due(epoch + 1) > self.due(epoch) or epoch + 1 == self.last_epoch

    def start(self, round: int) -> int:
        """First epoch of a round."""
        return self.first_epoch + round * self.epochs

    def length(self, round: int) -> int | None:
        """Epochs of a round; the last one takes what is left over; None if its end is not known."""
        if self.rounds is None or round < self.rounds:
            return self.epochs
        return None if self.last_epoch is None else self.last_epoch - self.start(round)


def plan_rounds(
    max_epochs: int | None, rounds: int | None = None, every_n_epochs: int | None = None, first_epoch: int = 0
) -> RoundPlan:
    """Fit the rounds into the epochs that training has; what is left over lengthens the last round.

    Args:
        max_epochs: Epochs of training, counted from 0; None or -1: not limited.
        rounds: How many prunings; None: as many as fit.
        every_n_epochs: Length of a round; None: as long as fits.
        first_epoch: The epoch that training starts with.

    Raises:
        ValueError: If what was asked for does not fit.

    Example:
        >>> plan_rounds(60)
        RoundPlan(rounds=14, epochs=4, first_epoch=0, last_epoch=60)
        >>> plan_rounds(10, rounds=2)
        RoundPlan(rounds=2, epochs=3, first_epoch=0, last_epoch=10)
    """
    if max_epochs is None or max_epochs < 0:
        if every_n_epochs is None and rounds != 0:
            raise ValueError(
                "The rounds have no length: the Trainer has no max_epochs and every_n_epochs is not given. Set either; "
                "rounds counted in steps (for a run limited by max_steps) do not exist yet."
            )
        return RoundPlan(rounds, every_n_epochs or 1, first_epoch, None)
    epochs = max_epochs - first_epoch
    asked = f"rounds={rounds}, every_n_epochs={every_n_epochs} with {epochs} epochs of training"
    if rounds is not None and every_n_epochs is not None:
        if (rounds + 1) * every_n_epochs > epochs:
            raise ValueError(
                f"{asked}: they need (rounds + 1) · every_n_epochs = {(rounds + 1) * every_n_epochs} epochs. Give "
                f"max_epochs={first_epoch + (rounds + 1) * every_n_epochs}, or fewer or shorter rounds."
            )
        return RoundPlan(rounds, every_n_epochs, first_epoch, max_epochs)
    if rounds is not None:
        if rounds + 1 > epochs:
            raise ValueError(
                f"{asked}: {rounds} prunings need at least {rounds + 1} epochs. Give "
                f"max_epochs={first_epoch + rounds + 1} or more, or rounds={max(0, epochs - 1)} or fewer."
            )
        return RoundPlan(rounds, epochs // (rounds + 1), first_epoch, max_epochs)
    if every_n_epochs is not None:
        if 2 * every_n_epochs > epochs:
            raise ValueError(
                f"{asked}: not even one pruning fits. Give max_epochs={first_epoch + 2 * every_n_epochs} or more, or "
                f"every_n_epochs={epochs // 2} or fewer; rounds=0 only holds masks."
            )
        return RoundPlan(epochs // every_n_epochs - 1, every_n_epochs, first_epoch, max_epochs)
    count = max(0, min(max(4, min(15, epochs // 4 - 1)), epochs - 1))
    return RoundPlan(count, max(1, epochs // (count + 1)), first_epoch, max_epochs)
