"""Learning-rate rewinding: schedules that every round replays from their first value."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from lightning_sap.rewind.ticks import Moment, Ticks, squeezed
from lightning_sap.rewind.trial import Trial, take_groups, try_schedule

Mode = Literal["restart", "squeeze", "keep"]

TOO_HIGH = 0.2  # "auto" squeezes where a round would end above this fraction of the learning rate's range
ENOUGH = 0.9  # a round should come as near as this to the highest learning rate
TOO_LOW = 0.1  # "auto" neither restarts nor squeezes where no round comes above this fraction of it
HORIZON = 16  # so many rounds are tried where the end of training is not known
UNTRIED = frozenset({"lr", "momentum", "betas", "weight_decay"})  # what a schedule may change that cannot be tried


def restore_groups_(optimizer: Optimizer, groups: Sequence[dict[str, Any]], keys: Iterable[str]) -> None:
    """Write these options back in place; groups that were added since stay as they are."""
    for live, saved in zip(optimizer.param_groups, groups, strict=False):
        for key in saved.keys() & set(keys):
            if isinstance(live.get(key), Tensor):  # a learning rate that a captured or compiled step holds on to
                live[key].fill_(float(saved[key]))
            else:
                live[key] = copy.deepcopy(saved[key])


class Obstacle(NamedTuple):
    """Why no round can replay a schedule, and what cures that."""

    reason: str
    cure: str


@dataclass
class Replay:
    """One learning-rate schedule and how each round replays it.

    Attributes:
        scheduler: The live schedule, untouched so far.
        metric_driven: True for a schedule that is called with a metric (ReduceLROnPlateau): it is only restarted.
        obstacle: Why no round can replay it; None: it can be replayed.
        first: Its state before the first step.
        first_groups: The options of its optimizer's parameter groups then.
        ticks: How its interval divides training.
        mode: What a round does with it.
        reason: Why, in one sentence.
        trial: What it does when it is left alone; None if that was not tried or cannot be.
        changed: The options of the parameter groups that it changes.
        calls: How often it was called in this round.
    """

    scheduler: Any
    metric_driven: bool = False
    obstacle: Obstacle | None = None
    first: dict[str, Any] = field(init=False, default_factory=dict)
    first_groups: list[dict[str, Any]] = field(init=False, default_factory=list)
    ticks: Ticks = field(default_factory=Ticks)
    mode: Mode = "restart"
    reason: str = ""
    trial: Trial | None = None
    changed: frozenset[str] = UNTRIED
    calls: int = 0

    def __post_init__(self) -> None:
        """Remember the state before the first step."""
        if self.obstacle is not None:
            return  # it may hold the whole module
        self.first_groups = take_groups(self.scheduler.optimizer)
        try:
            self.first = copy.deepcopy(self.scheduler.state_dict())
        except Exception:  # a user's own may hold anything
            self.obstacle = Obstacle("its state cannot be copied", "Let `copy.deepcopy` copy its `state_dict()`")

    @property
    def length(self) -> int | None:
        """Ticks that it has, at most those of all training; None if not known."""
        if self.trial is None or self.ticks.training is None:
            return None
        return min(len(self.trial.rates), self.ticks.training)

    def choose(self, wanted: Literal["auto", "restart", "squeeze", "keep"], ticks: Ticks) -> None:
        """Settle the mode: the wanted one, or for "auto" the one that suits the schedule.

        Raises:
            ValueError: If what is wanted cannot be had: restarting or squeezing what no round can replay, squeezing
                where the number of steps of training is not known.
        """
        self.ticks = ticks
        if self.obstacle is not None:
            if wanted not in ("auto", "keep"):
                raise ValueError(
                    f"lr_schedule={wanted!r} cannot be had where {self.obstacle.reason} "
                    f"({type(self.scheduler).__name__}). {self.obstacle.cure}, or use lr_schedule='keep'."
                )
            self.mode, self.reason = "keep", self.obstacle.reason if wanted == "auto" else "asked for"
            return
        if wanted == "keep" or self.metric_driven:
            self.mode = "keep" if wanted == "keep" else "restart"
            self.reason = "asked for" if wanted == "keep" else "it is driven by a metric"
            self.changed = frozenset({"lr"}) if self.metric_driven else UNTRIED
            return
        self.try_out()
        if wanted == "auto":
            self.mode, self.reason = self._suited()
            return
        if wanted == "squeeze" and self.trial is None:
            raise ValueError(
                f"lr_schedule='squeeze' needs a trial of {type(self.scheduler).__name__} on a copy, which cannot be "
                "made; let it be copied by `copy.deepcopy`, or use lr_schedule='restart' or 'keep'."
            )
        if wanted == "squeeze" and self.length is None:
            raise ValueError(
                "lr_schedule='squeeze' needs to know how many optimizer steps all training takes, and the training "
                "dataloader has no length; set limit_train_batches, or use lr_schedule='restart' or 'keep'."
            )
        self.mode, self.reason = wanted, "asked for"

    def try_out(self) -> None:
        """See on a copy what the schedule does when it is left alone, and which options it changes."""
        n, training = self.ticks.round, self.ticks.training
        length = training or (HORIZON * n if n else HORIZON)
        self.trial = try_schedule(self.scheduler, self.first, self.first_groups, self.ticks, length)
        if self.trial is not None:
            self.changed = self.trial.changed

    def stretch(self, training: int) -> None:
        """All training is so many ticks by now, since its epochs are not of equal length."""
        self.ticks = replace(self.ticks, training=training)
        if self.trial is not None and not self.trial.ended and training > len(self.trial.rates):
            self.try_out()

    def rewind_(self) -> None:
        """Put the schedule and the options that it changes back to their first values."""
        if self.mode != "keep":
            self.scheduler.load_state_dict(copy.deepcopy(self.first))
            restore_groups_(self.scheduler.optimizer, self.first_groups, self.changed)
            self.calls = 0

    def advance_(self, moment: Moment) -> None:
        """Step the schedule to where it stands at a moment of a round."""
        due = self.ticks.calls(self.position(moment))
        while self.calls < due:
            self.calls += 1
            self.scheduler.step()

    def position(self, moment: Moment) -> int:
        """Tick of the schedule, left alone, at which it stands at a moment of a round."""
        tick, trial, length = moment.ticks(self.ticks.interval), self.trial, self.length
        if self.mode == "squeeze" and length is not None and moment.places is not None:
            return squeezed(moment.place, moment.places, length)
        return min(tick, len(trial.rates) - 1) if trial is not None and trial.ended else tick

    def highest(self, mode: Mode) -> float | None:
        """Highest learning rate of a round; None if that is not known beforehand."""
        n, places = self.ticks.round, self.ticks.places or self.ticks.round
        if self.trial is None or n is None or places is None:
            return None
        rates = self.trial.rates
        if mode == "squeeze":
            return max(rates[squeezed(place, places, len(rates))] for place in range(places))
        return max(rates[:n])

    def shortfall(self) -> tuple[float, float] | None:
        """Highest learning rate of a round, and of the schedule, where a round does not come near; else None."""
        reached = None if self.mode == "keep" else self.highest(self.mode)
        if self.trial is None or reached is None or reached >= ENOUGH * max(self.trial.rates):
            return None
        return reached, max(self.trial.rates)

    def shortfall_of_calls(self, rounds: float) -> tuple[float, float] | None:
        """The same of a round that is over, in which the module called the schedule; training has so many rounds.

        How often the module calls it is not known before.
        """
        calls = getattr(self.scheduler, "last_epoch", 0) - self.first.get("last_epoch", 0)
        trial = try_schedule(self.scheduler, self.first, self.first_groups, Ticks(), round(calls * rounds))
        if calls < 1 or trial is None or max(trial.rates[:calls]) >= ENOUGH * max(trial.rates):
            return None
        return max(trial.rates[:calls]), max(trial.rates)

    def _suited(self) -> tuple[Mode, str]:
        if self.trial is None:
            return "keep", "no copy of it can be made, on which to see what it does"
        rates, n = self.trial.rates, self.ticks.round
        if n is None:
            return "restart", "the number of optimizer steps is not known beforehand"
        low, high = min(rates), max(rates)
        if self.length is None:
            if max(rates[:n]) < ENOUGH * high:
                return "keep", "it reaches its highest value only after the first round, and training has no known end"
            return "restart", "the number of optimizer steps is not known beforehand"
        if high == low:
            return "restart", "it is constant"
        if len(rates) > n and all(abs(a - b) <= 1e-9 * high for a, b in zip(rates[:n], rates[n : 2 * n], strict=False)):
            return "restart", "left alone, it repeats every round"
        if max(rates[:n]) < high * (1 - 1e-9):
            return self._nearest("squeeze", "left alone, it would reach its highest value only after the first round")
        end = min(rates[min(n - 1, len(rates) - 1)], rates[min(n, len(rates) - 1)])
        height = (end - low) / (high - low)
        mode: Mode = "squeeze" if height > TOO_HIGH else "restart"
        return self._nearest(mode, f"left alone, a round would end {height:.0%} of its range above its lowest value")

    def _nearest(self, mode: Mode, reason: str) -> tuple[Mode, str]:
        """That mode; where no round of it comes near the highest value, the one that comes nearest."""
        modes: tuple[Mode, Mode] = (mode, "restart" if mode == "squeeze" else "squeeze")
        reached = {each: self.highest(each) or 0.0 for each in modes}
        high = max(self.trial.rates) if self.trial is not None else 0.0
        if reached[mode] >= ENOUGH * high:
            return mode, reason
        best = max(modes, key=lambda each: reached[each])
        if reached[best] < TOO_LOW * high:
            return "keep", f"a round reaches {reached[best]:.3g} at most, and the schedule {high:.3g}"
        return best, reason if best == mode else "so a round comes nearest to its highest value"
