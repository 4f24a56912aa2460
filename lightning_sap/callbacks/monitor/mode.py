"""Whether the monitored metric is better when larger or smaller: as the user says, or else by its name."""

from __future__ import annotations

from itertools import groupby, pairwise
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_sap.callbacks.logging import log_line
from lightning_sap.rounds.metric_names import Mode, better

WORDS: dict[Mode, str] = {"max": "larger", "min": "smaller"}
OTHER: dict[Mode, Mode] = {"max": "min", "min": "max"}
FEWEST = 3  # validations that tell a trend
LEAST = 0.1  # relative change that does


class MetricMode:
    """The mode of the monitored metric, and what speaks against it."""

    def __init__(self, monitor: str | None, given: Mode | None) -> None:
        if given not in (None, *WORDS):
            raise ValueError(f"mode must be 'max' or 'min', got {given!r}. Leave it out to go by the metric's name.")
        self.monitor, self.given = monitor, given
        self.by_name = None if monitor is None else better(monitor)
        self.value: Mode = given or self.by_name or "max"
        self._first: dict[int, float] | None = {}  # by epoch, first values; None once they were judged

    def say(self, name: str) -> None:
        """Say which mode the name gives; warn where the one given contradicts it."""
        if self.monitor is None:
            return
        if self.given is None:
            why = "by its name" if self.by_name else "the default, since its name does not say"
            log_line(
                f"{name}: {self.monitor!r} counts as better when {WORDS[self.value]} (mode={self.value!r}, {why}). "
                f"Give mode={OTHER[self.value]!r} if it is better when {WORDS[OTHER[self.value]]}."
            )
        elif self.by_name not in (None, self.given):
            rank_zero_warn(
                f"{name}: mode={self.value!r} says that {self.monitor!r} is better when {WORDS[self.value]}, and its "
                f"name says that it is better when {WORDS[OTHER[self.value]]}. With the wrong mode a sound run is "
                "stopped and its worst round put back: leave mode out, or give the metric another name."
            )

    def see(self, name: str, round: int | None, epoch: int, metric: float | None) -> None:
        """Take in how an epoch ended; warn where the metric at first only moved against the mode.

        At first is in the dense round or, where that has too few validations to tell, in as many as tell.
        """
        if self._first is None or round is None:
            return
        dense = round == 0
        if not dense and len(self._first) >= FEWEST:
            self.judge(name)
        elif metric is not None:
            self._first[epoch] = metric
            if not dense and len(_changes(self._first)) == FEWEST:
                self.judge(name, "in the first rounds")

    def judge(self, name: str, when: str = "in the dense round") -> None:
        """What came first, in which training alone makes the network better, is over."""
        values, self._first = _changes(self._first or {}), None
        if len(values) < FEWEST or self.by_name is not None:
            return
        first, last = values[0], values[-1]
        worse = all(b < a if self.value == "max" else b > a for a, b in pairwise(values))
        if worse and abs(last - first) > LEAST * abs(first):
            moved = "fell" if last < first else "rose"
            rank_zero_warn(
                f"{name}: {when} {self.monitor!r} only {moved}, from {first:.3g} to {last:.3g} in "
                f"{len(values)} validations, and mode={self.value!r} says that it is better when {WORDS[self.value]}. "
                f"Give mode={OTHER[self.value]!r} if it is better when {WORDS[OTHER[self.value]]}."
            )

    def state_dict(self) -> list[tuple[int, float]] | None:
        """What it has seen, as plain values."""
        return None if self._first is None else list(self._first.items())

    def load_state_dict(self, state: Any) -> None:
        """Continue from a state."""
        self._first = None if state is None else dict(state)


def _changes(seen: dict[int, float]) -> list[float]:
    """The values one after the other: an epoch without validation repeats the one before."""
    return [value for value, _ in groupby(seen.values())]
