"""Learning-rate rewinding: schedules that every round replays from their first value."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

Mode = Literal["restart", "squeeze", "keep"]
Step = Callable[[Any], None]

COUNT = re.compile(r"'_step_count': \d+")
TOO_HIGH = 0.2  # "auto" squeezes where a round would end above this fraction of the learning rate's range


def take_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Copies of the options of each parameter group (learning rate, momentum, weight decay, …)."""
    return [copy.deepcopy({key: v for key, v in group.items() if key != "params"}) for group in optimizer.param_groups]


def restore_groups_(optimizer: Optimizer, groups: Sequence[dict[str, Any]]) -> None:
    """Write the options back in place; groups that were added since stay as they are."""
    for live, saved in zip(optimizer.param_groups, groups, strict=False):
        for key, value in saved.items():
            if isinstance(live.get(key), Tensor):  # a learning rate that a captured or compiled step holds on to
                live[key].fill_(float(value))
            else:
                live[key] = copy.deepcopy(value)


@dataclass(frozen=True)
class Ticks:
    """How one schedule's interval (optimizer steps or epochs) divides training.

    Attributes:
        round: Ticks of a round; None if not known beforehand.
        training: Ticks of all training; None if not known beforehand.
        frequency: How many batches or epochs pass between two calls of the schedule.
        steps_of_epoch: For a schedule that counts steps, the batch number of each optimizer step of an epoch.
    """

    round: int | None = None
    training: int | None = None
    frequency: int = 1
    steps_of_epoch: Sequence[int] = ()

    def calls(self, ticks: int) -> int:
        """How often the schedule is called within that many ticks when left alone."""
        if self.frequency == 1 or not self.steps_of_epoch:
            return ticks // self.frequency
        hits = [batch % self.frequency == 0 for batch in self.steps_of_epoch]
        epochs, rest = divmod(ticks, len(hits))
        return epochs * sum(hits) + sum(hits[:rest])


@dataclass
class Replay:
    """One learning-rate schedule and how each round replays it.

    Attributes:
        scheduler: The live schedule, untouched so far.
        metric_driven: True for a schedule that is called with a metric (ReduceLROnPlateau): it is only restarted.
        first: Its state before the first step.
        first_groups: The options of its optimizer's parameter groups then.
        ticks: How its interval divides training.
        mode: What a round does with it.
        reason: Why, in one sentence.
        length: Ticks that it has, at most those of all training; None if not known.
        calls: How often it was called in this round.
    """

    scheduler: Any
    metric_driven: bool = False
    first: dict[str, Any] = field(init=False)
    first_groups: list[dict[str, Any]] = field(init=False)
    ticks: Ticks = field(default_factory=Ticks)
    mode: Mode = "restart"
    reason: str = ""
    length: int | None = None
    calls: int = 0

    def __post_init__(self) -> None:
        """Remember the state before the first step."""
        self.first = copy.deepcopy(self.scheduler.state_dict())
        self.first_groups = take_groups(self.scheduler.optimizer)

    def choose(self, wanted: Literal["auto", "restart", "squeeze", "keep"], ticks: Ticks, step: Step) -> None:
        """Settle the mode: the wanted one, or for "auto" the one that suits the schedule.

        Raises:
            ValueError: If squeezing is wanted where the number of steps of training is not known.
        """
        self.ticks = ticks
        if wanted == "keep" or self.metric_driven:
            self.mode = "keep" if wanted == "keep" else "restart"
            self.reason = "asked for" if wanted == "keep" else "it is driven by a metric"
            return
        rates = self.trace(step)
        self.length = len(rates) if self.ticks.training is not None else None
        if wanted == "auto":
            self.mode, self.reason = self._suited(rates)
            return
        if wanted == "squeeze" and self.length is None:
            raise ValueError(
                "lr_schedule='squeeze' needs to know how many optimizer steps all training takes, and the training "
                "dataloader has no length; set limit_train_batches, or use lr_schedule='restart' or 'keep'."
            )
        self.mode, self.reason = wanted, "asked for"

    def advances(self, step: Step) -> bool:
        """Whether each call moves it on; not where the caller sets it by an epoch that is not the schedule's own."""
        now = copy.deepcopy(self.scheduler.state_dict()), take_groups(self.scheduler.optimizer)
        self._restore_(self.first, self.first_groups)
        places, calls = [], [self._count()]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the optimizer has not stepped yet, that epochs are deprecated
                for _ in range(2):
                    step(self.scheduler)
                    rates = [float(group["lr"]) for group in self.scheduler.optimizer.param_groups]
                    places.append((COUNT.sub("", repr(self.scheduler.state_dict())), rates))
                    calls.append(self._count())
        except ValueError:  # a schedule of one step
            return True
        finally:
            self._restore_(*now)
        was_not_stepped = calls[0] is not None and calls[0] == calls[-1]  # so that nothing can be said
        return was_not_stepped or places[0] != places[1]

    def _count(self) -> Any:
        """How often PyTorch's own schedules were stepped; None for others."""
        return self.scheduler.state_dict().get("_step_count")

    def trace(self, step: Step) -> list[float]:
        """Learning rate (summed over the groups) at each tick of all training, were the schedule left alone.

        The schedule is really stepped and then put back. The trace ends where the schedule does.
        """
        optimizer = self.scheduler.optimizer
        now = copy.deepcopy(self.scheduler.state_dict()), take_groups(optimizer)
        last_call = getattr(self.scheduler, "total_steps", None)
        rates: list[float] = []
        calls = 0
        self._restore_(self.first, self.first_groups)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the optimizer has not stepped yet
                for tick in range(self.ticks.training or 1):
                    due = self.ticks.calls(tick)
                    if last_call is not None and due >= last_call:
                        break
                    for _ in range(due - calls):
                        step(self.scheduler)
                    calls = due
                    rates.append(sum(float(group["lr"]) for group in optimizer.param_groups))
        except ValueError:  # a schedule that refuses to go beyond its end
            pass
        finally:
            self._restore_(*now)
        return rates or [0.0]

    def rewind_(self) -> None:
        """Put the schedule and its optimizer's parameter groups back to their first values."""
        if self.mode != "keep":
            self._restore_(self.first, self.first_groups)
            self.calls = 0

    def advance_(self, tick: int, round_ticks: int | None, step: Step) -> None:
        """Step the schedule to where it stands at a tick of a round of so many ticks."""
        due = self.ticks.calls(self.position(tick, round_ticks))
        while self.calls < due:
            self.calls += 1
            step(self.scheduler)

    def position(self, tick: int, round_ticks: int | None) -> int:
        """Tick of the schedule, left alone, at which it stands at a tick of a round.

        Squeezed, tick s of n stands at ``round(s · (H − 1) / (n − 1))`` of H: first value first, last value last.

        Example:
            >>> from torch import nn, optim
            >>> adam = optim.Adam(nn.Linear(1, 1).parameters())
            >>> replay = Replay(optim.lr_scheduler.StepLR(adam, 1), mode="squeeze", length=9)
            >>> [replay.position(s, 3) for s in range(3)]
            [0, 4, 8]
        """
        if self.length is None:
            return tick
        if self.mode == "restart" or round_ticks is None:
            return min(tick, self.length - 1)
        if round_ticks <= 1:
            return 0
        return round(min(tick, round_ticks - 1) * (self.length - 1) / (round_ticks - 1))

    def _suited(self, rates: list[float]) -> tuple[Mode, str]:
        n = self.ticks.round
        if self.length is None or n is None:
            return "restart", "the number of optimizer steps is not known beforehand"
        low, high = min(rates), max(rates)
        if high == low:
            return "restart", "it is constant"
        if len(rates) > n and all(abs(a - b) <= 1e-9 * high for a, b in zip(rates[:n], rates[n : 2 * n], strict=False)):
            return "restart", "left alone, it repeats every round"
        if max(rates[:n]) < high * (1 - 1e-9):
            return "squeeze", "left alone, it would reach its highest value only after the first round"
        end = min(rates[min(n - 1, len(rates) - 1)], rates[min(n, len(rates) - 1)])
        height = (end - low) / (high - low)
        mode: Mode = "squeeze" if height > TOO_HIGH else "restart"
        return mode, f"left alone, a round would end {height:.0%} of its range above its lowest value"

    def _restore_(self, state: dict[str, Any], groups: Sequence[dict[str, Any]]) -> None:
        self.scheduler.load_state_dict(copy.deepcopy(state))
        restore_groups_(self.scheduler.optimizer, groups)
