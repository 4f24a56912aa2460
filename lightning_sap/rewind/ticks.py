"""The two clocks of a schedule: its own ticks, and the places of a round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Interval = Literal["step", "epoch"]


@dataclass(frozen=True)
class Ticks:
    """How one schedule's interval (optimizer steps or epochs) divides training.

    Attributes:
        round: Ticks of a round; None if not known beforehand.
        training: Ticks of all training; None if not known beforehand.
        frequency: How many batches or epochs pass between two calls of the schedule.
        steps_of_epoch: For a schedule that counts steps, the batch number of each optimizer step of an epoch.
        places: Places of a round at which a squeezed schedule may stand: its optimizer steps, or its epochs where
            these steps are not known; None: as many as ticks.
        interval: What a tick is.
    """

    round: int | None = None
    training: int | None = None
    frequency: int = 1
    steps_of_epoch: Sequence[int] = ()
    places: int | None = None
    interval: Interval = "epoch"

    def calls(self, ticks: int) -> int:
        """How often the schedule is called within that many ticks when left alone."""
        if self.frequency == 1 or not self.steps_of_epoch:
            return ticks // self.frequency
        hits = [batch % self.frequency == 0 for batch in self.steps_of_epoch]
        epochs, rest = divmod(ticks, len(hits))
        return epochs * sum(hits) + sum(hits[:rest])


@dataclass(frozen=True)
class Moment:
    """How much of a round has passed.

    Attributes:
        steps: Optimizer steps since its start.
        epochs: Epochs since its start.
        place: Its place among those of the round.
        places: How many places the round has; None if that is not known.
    """

    steps: int
    epochs: int
    place: int
    places: int | None

    @classmethod
    def of_epochs(
        cls,
        steps: int,
        epochs: int,
        length: int | None,
        in_epoch: int,
        per_epoch: int | None,
        late: int = 0,
        left: int | None = None,
    ) -> Moment:
        """In a round that is counted in epochs.

        The round is measured by the epoch that goes on, whatever the length of those before: it has
        ``length · per_epoch`` places, and stands at ``epochs · per_epoch + in_epoch``. So the share that has passed
        never falls, is exact where all epochs are equal, and reaches the whole in the last step of the last epoch.

        Args:
            steps: Optimizer steps since the round's start.
            epochs: Epochs completed since then.
            length: Epochs of the round; None if it has no end.
            in_epoch: Optimizer steps of the epoch that goes on.
            per_epoch: How many this epoch has; None if that is not known: then the places are epochs.
            late: Optimizer steps of its first epoch that were taken before the round began.
            left: Optimizer steps until training ends; None if they are not limited.

        Example:
            >>> Moment.of_epochs(21, 1, 2, in_epoch=5, per_epoch=8)
            Moment(steps=21, epochs=1, place=13, places=16)
        """
        if per_epoch is None:
            return cls(steps, epochs, epochs, length)
        place = epochs * per_epoch + min(in_epoch, per_epoch - 1) - late
        places = None if length is None else length * per_epoch - late
        if places is not None and left is not None:
            places = min(places, place + left)
        return cls(steps, epochs, place, places)

    @classmethod
    def of_steps(cls, steps: int, epochs: int, length: int | None, per_epoch: int | None) -> Moment:
        """In a round that is counted in optimizer steps: an epoch of it is so many steps, wherever epochs end."""
        return cls(steps, steps // per_epoch if per_epoch else epochs, steps, length)

    def ticks(self, interval: Interval) -> int:
        """Ticks of a schedule since the round's start."""
        return self.steps if interval == "step" else self.epochs


def squeezed(place: int, places: int, length: int) -> int:
    """Tick at which a squeezed schedule of that length stands at a place of a round: ``round(s · (H − 1) / (n − 1))``.

    First value first, last value last.

    Example:
        >>> [squeezed(s, 3, 9) for s in range(3)]
        [0, 4, 8]
    """
    return 0 if places <= 1 else round(min(place, places - 1) * (length - 1) / (places - 1))
