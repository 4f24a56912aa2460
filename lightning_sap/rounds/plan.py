"""How many rounds, and how long."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Unit = Literal["epoch", "step"]
DENSE = 0.25  # share of a training that searches which its dense round takes
SEARCH_ROUNDS = 16  # how many rounds follow it
FEWEST = 4  # how many are left, however long a round has to be


class Words(NamedTuple):
    """How messages name what rounds are counted in."""

    many: str
    limit: str
    every: str


WORDS: dict[str, Words] = {
    "epoch": Words("epochs", "max_epochs", "every_n_epochs"),
    "step": Words("steps", "max_steps", "every_n_steps"),
}


@dataclass(frozen=True)
class RoundPlan:
    """Rounds of a training, each counted from its own start.

    Attributes:
        rounds: How many prunings; None: one after every round for as long as training goes on.
        length: Epochs or optimizer steps of a round.
        first: Epoch or step at which the first round starts; steps are the Trainer's, those before this fit too.
        end: End of training (exclusive) when the plan was made; None if it is not known beforehand.
        unit: What is counted: "epoch" or "step".
        schedules_from: Epoch at which the learning-rate schedules begin: before ``first`` where training goes on from a
            checkpoint that was not pruned.
        dense: Epochs or steps of the first round, the dense one; None: as the others.
    """

    rounds: int | None
    length: int
    first: int = 0
    end: int | None = None
    unit: Unit = "epoch"
    schedules_from: int = field(default=0, repr=False)
    dense: int | None = field(default=None, repr=False)

    def planned(self, round: int) -> int:
        """Epochs or steps after which a round is over, where a pruning follows."""
        return self.length if round > 0 or self.dense is None else self.dense

    @property
    def needed(self) -> int:
        """Epochs or steps up to the last pruning; without one, of the first round."""
        return self.planned(0) + max(0, (self.rounds or 1) - 1) * self.length

    def is_over(self, round: int, elapsed: int) -> bool:
        """Whether a pruning follows a round that has lasted so long."""
        return (self.rounds is None or round < self.rounds) and elapsed >= self.planned(round)

    def length_of(self, round: int, start: int) -> int | None:
        """Epochs or steps of a round; the last one takes what is left over; None if its end is not known."""
        if self.rounds is None or round < self.rounds:
            return self.planned(round)
        return None if self.end is None else self.end - start

    def prunings_before(self, round: int, start: int, now: int) -> int:
        """How many prunings lie before a moment, for a round that starts at ``start`` and others as long after it."""
        elapsed = max(0, now - start)
        passed = round + max(0, elapsed - self.planned(round) + self.length) // self.length
        return passed if self.rounds is None else min(passed, self.rounds)


def plan_rounds(
    limit: int | None, rounds: int | None = None, every: int | None = None, first: int = 0, unit: Unit = "epoch"
) -> RoundPlan:
    """Fit the rounds into the epochs or steps that training has; what is left over lengthens the last round.

    Args:
        limit: Epochs or steps of training, counted from 0; None or -1: not known.
        rounds: How many prunings; None: as many as fit.
        every: Length of a round; None: as long as fits.
        first: The epoch or step that training starts with.
        unit: What is counted.

    Raises:
        ValueError: If what was asked for does not fit.

    Example:
        >>> plan_rounds(60)
        RoundPlan(rounds=14, length=4, first=0, end=60, unit='epoch')
        >>> plan_rounds(10, rounds=2)
        RoundPlan(rounds=2, length=3, first=0, end=10, unit='epoch')
        >>> plan_rounds(90, rounds=8, unit="step")
        RoundPlan(rounds=8, length=10, first=0, end=90, unit='step')
    """
    if limit is None or limit < 0:
        if every is None and rounds != 0:
            raise ValueError(
                "The rounds have no length, since it is not known beforehand how long training takes. Give "
                "every_n_steps, the length of a round in optimizer steps, or a Trainer with max_steps; or, where the "
                "data have an end, every_n_epochs or a Trainer with max_epochs."
            )
        return RoundPlan(rounds, every or 1, first, None, unit)
    left = limit - first
    if rounds is None and every is None:
        count = max(0, min(max(4, min(15, left // 4 - 1)), left - 1))
        return RoundPlan(count, max(1, left // (count + 1)), first, limit, unit)
    _check_fit(left, rounds, every, first, WORDS[unit])
    if rounds is None:
        rounds = left // (every or 1) - 1
    return RoundPlan(rounds, every or left // (rounds + 1), first, limit, unit)


def plan_search(
    limit: int | None,
    rounds: int | None = None,
    every: int | None = None,
    first: int = 0,
    unit: Unit = "epoch",
    least: int = 1,
    shortest: int = 1,
) -> RoundPlan:
    """Fit rounds into a training that searches: the first, dense one takes a quarter, the others are of equal length.

    Args:
        limit: Epochs or steps of training, counted from 0; None or -1: not known, all rounds are of equal length.
        rounds: How many rounds follow the dense one; None: as many as fit.
        every: Their length; None: as long as fits, or so that there are about sixteen.
        first: The epoch or step that training starts with.
        unit: What is counted.
        least: From one validation to the next: where ``every`` is None, they end with one.
        shortest: Their least length where both are None, as long as some rounds are left.

    Raises:
        ValueError: If what was asked for does not fit.

    Example:
        >>> plan = plan_search(80)
        >>> plan.dense, plan.length, plan.rounds
        (20, 4, 15)
        >>> plan = plan_search(80, rounds=5, every=12)
        >>> plan.dense, plan.length, plan.rounds
        (20, 12, 5)
    """
    if limit is None or limit < 0 or rounds == 0:
        return plan_rounds(limit, rounds, every, first, unit)
    left = limit - first
    if rounds is None and every is None and left < 2:
        return RoundPlan(0, 1, first, limit, unit)
    _check_fit(left, rounds, every, first, WORDS[unit])
    quarter = max(1, round(left * DENSE))
    if every is None:
        room = left - quarter
        free = min(max(shortest, round(room / SEARCH_ROUNDS)), max(1, room // FEWEST))
        every = max(1, room // rounds) if rounds else min(max(least, free), left - 1)
        every = _whole(every, least)
    dense = _whole(min(max(quarter, every), left - (rounds or 1) * every), least, first)
    if rounds is None:
        rounds = (left - dense) // every
    return RoundPlan(rounds, every, first, limit, unit, dense=dense)


def _whole(length: int, least: int, first: int = 0) -> int:
    """The greatest length up to one given whose end, counted from 0, is a multiple of ``least``, if there is one."""
    shorter = length - (first + length) % least
    return shorter if shorter > 0 else length


def _check_fit(left: int, rounds: int | None, every: int | None, first: int, words: Words) -> None:
    """Raise if so many rounds, of that length, do not fit into what is left of training."""
    many, limit, length = words
    asked = f"rounds={rounds}, {length}={every} with {left} {many} of training"
    if rounds is not None and every is not None:
        if (rounds + 1) * every > left:
            raise ValueError(
                f"{asked}: they need (rounds + 1) · {length} = {(rounds + 1) * every} {many}. Give "
                f"{limit}={first + (rounds + 1) * every}, or fewer or shorter rounds."
            )
    elif rounds is not None and rounds + 1 > left:
        raise ValueError(
            f"{asked}: {rounds} prunings need at least {rounds + 1} {many}. Give "
            f"{limit}={first + rounds + 1} or more, or rounds={max(0, left - 1)} or fewer."
        )
    elif every is not None and rounds is None and 2 * every > left:
        raise ValueError(
            f"{asked}: not even one pruning fits. Give {limit}={first + 2 * every} or more, or "
            f"{length}={left // 2} or fewer; rounds=0 only holds masks."
        )
