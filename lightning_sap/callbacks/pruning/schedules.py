"""The learning-rate schedules and optimizers of a Trainer, which every round starts anew."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, NamedTuple

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer

from lightning_sap.callbacks.logging import log_line
from lightning_sap.callbacks.pruning.compatibility import accumulation
from lightning_sap.callbacks.pruning.lengths import EpochLengths
from lightning_sap.callbacks.pruning.options import Schedule
from lightning_sap.callbacks.pruning.outside import obstacle_to, overrides_step, sets_by_epoch
from lightning_sap.callbacks.pruning.schema import SCHEMA
from lightning_sap.callbacks.pruning.state import PruningState
from lightning_sap.rewind import (
    HORIZON,
    Mode,
    Moment,
    Obstacle,
    OptimizerMemory,
    Replay,
    Ticks,
    base_optimizers,
    cannot_reset,
    cannot_zero,
    zero_pruned_,
)
from lightning_sap.rounds.plan import WORDS, RoundPlan

NEVER = sys.maxsize


class Schedules:
    """All schedules and optimizers of one fit, as they were before the first step.

    Lightning steps a schedule by its own count, which goes on over all rounds. Where a schedule is replayed, it is
    stepped here instead, right after each batch, by the count of the round.
    """

    def __init__(self, optimizers: Sequence[Optimizer] = (), configs: Sequence[LRSchedulerConfig] = ()) -> None:
        self._configs = list(configs)
        self._frequencies = [config.frequency for config in self._configs]
        self._replays = [
            Replay(config.scheduler, config.reduce_on_plateau, obstacle_to(config.scheduler))
            for config in self._configs
        ]
        self._optimizers = list(optimizers)
        self._memories = [OptimizerMemory(optimizer) for optimizer in optimizers]
        self._lengths = EpochLengths()
        self._stepped: list[Replay] = []  # those that are stepped here
        self._left: list[Replay] = []  # those that the module steps, and every round restarts
        self._modes: list[Mode] = []  # of the run that is resumed

    def choose(self, trainer: Trainer, module: LightningModule, plan: RoundPlan, wanted: Schedule) -> list[str]:
        """Settle what each schedule does in a round; one line for each, with its reason."""
        if not module.automatic_optimization and wanted == "squeeze" and self._replays and plan.rounds != 0:
            raise ValueError(
                "lr_schedule='squeeze' cannot be had with manual optimization, where the module steps its schedules "
                "itself; write them for one round and use lr_schedule='restart', or 'keep'."
            )
        if accumulation(trainer) is not None:
            self._lengths.plan(trainer)
        lines = []
        for i, (config, replay) in enumerate(zip(self._configs, self._replays, strict=True)):
            if plan.rounds == 0:
                replay.choose("keep", Ticks())
                continue
            _settle(replay, wanted, module, self._ticks(trainer, plan, i))
            if self._modes:
                _go_on(replay, self._modes[i], wanted)
            if _is_stepped_here(replay, module, plan.unit):
                self._stepped.append(replay)
                config.frequency = NEVER
            elif replay.mode == "restart" and not replay.metric_driven and _is_stepped_by(module):
                self._left.append(replay)
            lines.append(f"{type(config.scheduler).__name__}: {replay.mode} ({replay.reason})")
            _warn_of_shortfall(replay, plan, replay.shortfall())
        return lines

    def close(self) -> None:
        """Training is over: Lightning counts as it did before."""
        for config, frequency in zip(self._configs, self._frequencies, strict=True):
            config.frequency = frequency

    def rewind_(self) -> None:
        """Put every schedule back to its first value."""
        for replay in self._replays:
            replay.rewind_()

    def end_round_(self, state: PruningState, wanted: Schedule) -> None:
        """Put every schedule back to its first value, but for those of which the first round saw too little."""
        if state.round == 0:
            self._look_back(state.plan, wanted)
        self.rewind_()

    def _look_back(self, plan: RoundPlan, wanted: Schedule) -> None:
        """Where the module steps a schedule itself: keep it, or warn, if the first round did not come near its peak."""
        end = _training(plan).length
        for replay in self._left:
            short = replay.shortfall_of_calls(HORIZON if end is None else end / (plan.length or end))
            if short is not None and wanted == "auto":
                replay.mode, replay.reason = "keep", f"a round reaches {short[0]:.3g}, and the schedule {short[1]:.3g}"
                log_line(f"{type(replay.scheduler).__name__}: keep from now on ({replay.reason})")
            else:
                _warn_of_shortfall(replay, plan, short, by_module=True)

    def forget_(self) -> None:
        """Make fresh what every optimizer keeps."""
        for memory in self._memories:
            memory.reset_()

    def lasting(self) -> list[str]:
        """What no pruning can make fresh, a sentence for each optimizer."""
        return list(filter(None, map(cannot_reset, self._optimizers)))

    def mixed(self) -> list[str]:
        """Why single weights have no place in what optimizers keep, a sentence for each of these."""
        every = [each for optimizer in self._optimizers for each in base_optimizers(optimizer)]
        return list(filter(None, map(cannot_zero, every)))

    def zero_pruned_(self, pruned: Mapping[Tensor, Tensor]) -> None:
        """Zero what the optimizers keep for pruned weights."""
        zero_pruned_(self._optimizers, pruned)

    def advance_(self, trainer: Trainer, state: PruningState, *, batches: int = 0, epoch_ended: bool = False) -> None:
        """Step each replayed schedule to where its round stands.

        To be called after every batch, and at the start of an epoch for one before that was cut short.

        Args:
            trainer: The Trainer.
            state: The state of the run.
            batches: Batches of this epoch so far.
            epoch_ended: Whether these were all.
        """
        if self._lengths.see(trainer, batches) and any(replay.mode == "squeeze" for replay in self._stepped):
            self._lengths.warn()
        if not self._stepped:
            return
        steps, epochs = _passed(trainer, state)
        in_epoch = batches // trainer.accumulate_grad_batches
        if not epoch_ended:
            self._lengths.count(trainer, steps, epochs, in_epoch)
        moment = self._moment(trainer, _round(state), steps, epochs, None if epoch_ended else in_epoch)
        training = self._steps_of_training(trainer, state.plan)
        for replay in self._stepped:
            if replay.ticks.interval == "step" and training is not None:
                replay.stretch(training)
            replay.advance_(moment)

    def state(self) -> list[dict[str, Any]]:
        """What a resumed run needs: the first values, and how far the round is."""
        lengths = asdict(self._lengths)
        return [
            {"first": r.first, "groups": r.first_groups, "calls": r.calls, "mode": r.mode, "lengths": lengths}
            for r in self._replays
        ]

    def load(self, state: list[dict[str, Any]]) -> None:
        """Take up a state where it belongs to the same number of schedules; of another, say that it does not.

        Raises:
            ValueError: If a schedule's first state has another form than that of the live one; nothing changes then.
        """
        if len(state) == len(self._replays):
            for i, (replay, saved) in enumerate(zip(self._replays, state, strict=True)):
                SCHEMA.like(f"schedules[{i}].first", saved["first"], replay.first)
                SCHEMA.like(f"schedules[{i}].groups", saved["groups"], replay.first_groups)
            for replay, saved in zip(self._replays, state, strict=True):
                replay.first = {key: saved["first"].get(key, own) for key, own in replay.first.items()}
                replay.first_groups, replay.calls = saved["groups"], saved["calls"]
                self._lengths = EpochLengths(**saved["lengths"])
            self._modes = [saved["mode"] for saved in state]
        elif state and self._replays:
            rank_zero_warn(
                f"The checkpoint was saved with {len(state)} learning-rate schedules, and this fit has "
                f"{len(self._replays)}. Every round starts with the first values of the present ones; if that is not "
                "what you want, resume with as many schedules as before."
            )

    def _moment(self, trainer: Trainer, span: Span, steps: int, epochs: int, in_epoch: int | None) -> Moment:
        """How much of a round has passed; ``in_epoch`` is None where an epoch just ended."""
        per_epoch = self._lengths.steps(trainer)
        if span.unit == "step":
            return Moment.of_steps(steps, epochs + (in_epoch is None), span.length, per_epoch)
        if in_epoch is None:
            epochs, in_epoch = epochs + 1, 0
        left = trainer.max_steps - trainer.global_step if trainer.max_steps > 0 else None
        return Moment.of_epochs(steps, epochs, span.length, in_epoch, per_epoch, self._lengths.late, left)

    def _steps_of_training(self, trainer: Trainer, plan: RoundPlan) -> int | None:
        """Optimizer steps of all training; None if that is not known."""
        span, per_epoch = _training(plan), self._lengths.mean
        steps = span.length
        if span.unit == "epoch" and steps is not None:
            steps = None if per_epoch is None else round(steps * per_epoch)
        if trainer.max_steps > 0:
            steps = trainer.max_steps if steps is None else min(steps, trainer.max_steps)
        return steps

    def _ticks(self, trainer: Trainer, plan: RoundPlan, i: int) -> Ticks:
        """How the interval of a schedule divides training, as far as that is known when training starts."""
        round_, training, frequency = Span(plan.unit, plan.length), _training(plan), self._frequencies[i]
        per_epoch, now, every = self._lengths.planned, self._lengths.steps(trainer), accumulation(trainer)
        in_steps = _in_steps(round_, now)
        if self._configs[i].interval == "epoch":
            places = round_.length if in_steps is None else in_steps
            return Ticks(_in_epochs(round_, now), _in_epochs(training, now), frequency, (), places, "epoch")
        batches = trainer.num_training_batches
        stepping = [] if per_epoch is None or every is None else [*range(every, int(batches), every), int(batches)]
        whole = self._steps_of_training(trainer, plan)
        return Ticks(_in_steps(round_, per_epoch), whole, frequency, stepping, in_steps, "step")


class Span(NamedTuple):
    """How long something is.

    Attributes:
        unit: In what it is counted.
        length: How many of these; None if it has no known end.
    """

    unit: Literal["epoch", "step"]
    length: int | None


def _round(state: PruningState) -> Span:
    """How long the round is."""
    return Span(state.plan.unit, state.plan.length_of(state.round, state.start))


def _training(plan: RoundPlan) -> Span:
    """How long the schedules run."""
    return Span(plan.unit, None if plan.end is None else plan.end - plan.schedules_from)


def _passed(trainer: Trainer, state: PruningState) -> tuple[int, int]:
    """Optimizer steps and epochs since the round's start."""
    return state.steps, trainer.current_epoch - state.first_epoch


def _in_steps(span: Span, per_epoch: int | None) -> int | None:
    if span.unit == "step" or span.length is None:
        return span.length
    return None if per_epoch is None else span.length * per_epoch


def _in_epochs(span: Span, per_epoch: int | None) -> int | None:
    if span.unit == "epoch" or span.length is None:
        return span.length
    return None if per_epoch is None else -(-span.length // per_epoch)


def _settle(replay: Replay, wanted: Schedule, module: LightningModule, ticks: Ticks) -> None:
    """Choose what a round does with a schedule."""
    if wanted == "keep" or replay.metric_driven or replay.obstacle is not None:
        replay.choose(wanted, ticks)
    elif not module.automatic_optimization:
        replay.mode, replay.reason = "restart", "the module steps it itself"
        replay.try_out()
    elif not overrides_step(module):
        replay.choose(wanted, ticks)
    elif sets_by_epoch(module, replay.scheduler):
        replay.obstacle = Obstacle(
            "the module's lr_scheduler_step sets it by the epoch of training",
            "Step it without an epoch (`scheduler.step()`)",
        )
        replay.choose(wanted, ticks)
    elif wanted == "restart":
        replay.mode, replay.reason = "restart", "asked for; the module's lr_scheduler_step steps it"
    else:
        replay.obstacle = Obstacle(
            "the module's own lr_scheduler_step steps it, which nobody but training calls",
            "Leave that hook out, write the schedule for one round and use lr_schedule='restart'",
        )
        replay.choose(wanted, ticks)


def _go_on(replay: Replay, mode: Mode, wanted: Schedule) -> None:
    """A run that is resumed goes on with the mode that it had."""
    if wanted != "auto" and replay.mode != mode:
        raise ValueError(
            f"lr_schedule={wanted!r} cannot take the place of {mode!r} in the middle of a run, which the checkpoint "
            f"goes on with; give lr_schedule={mode!r}."
        )
    if replay.mode != mode:
        replay.mode, replay.reason = mode, "as before the checkpoint"


def _is_stepped_here(replay: Replay, module: LightningModule, unit: str) -> bool:
    if replay.mode == "squeeze":
        return True
    if replay.mode == "keep" or replay.metric_driven:
        return False
    if _is_stepped_by(module):
        return False
    if unit == "step" or replay.ticks.interval == "epoch":
        return True
    # Lightning counts the batches of each epoch anew, here of unknown number: it goes on doing so
    return replay.length is not None and replay.ticks.frequency == 1


def _is_stepped_by(module: LightningModule) -> bool:
    return not module.automatic_optimization or overrides_step(module)


def _warn_of_shortfall(
    replay: Replay, plan: RoundPlan, short: tuple[float, float] | None, *, by_module: bool = False
) -> None:
    """Say that no round comes near the highest learning rate."""
    if short is None:
        return
    others = "'squeeze' or 'keep'" if replay.mode == "restart" and not by_module else "'keep'"
    groups = len(replay.first_groups)
    summed = f" (summed over {groups} parameter groups)" if groups > 1 else ""
    rank_zero_warn(
        f"{type(replay.scheduler).__name__} under lr_schedule={replay.mode!r}: the learning rate of a round is "
        f"{short[0]:.3g} at most, and the schedule goes up to {short[1]:.3g}{summed}. Give longer rounds (smaller "
        f"`rounds`, larger `{WORDS[plan.unit].every}`) or a shorter warm-up"
        f", or use lr_schedule={others}."
    )


def steps_of_epochs(trainer: Trainer, epochs: int) -> int | None:
    """Optimizer steps of so many epochs; None if that is not known beforehand."""
    batches, every = trainer.num_training_batches, accumulation(trainer)
    if batches == float("inf") or every is None or not trainer.lightning_module.automatic_optimization:
        return None
    return epochs * -(-int(batches) // every)


def end_in_epochs(trainer: Trainer, epoch: int, step: int) -> int | None:
    """Where training ends (exclusive) that began an epoch at a step: by ``max_epochs`` or, before, by ``max_steps``.

    None or -1 where that is not known.
    """
    per_epoch = steps_of_epochs(trainer, 1)
    if trainer.max_epochs is None or trainer.max_epochs < 0 or trainer.max_steps < 0 or not per_epoch:
        return trainer.max_epochs
    return min(trainer.max_epochs, epoch + -(-(trainer.max_steps - step) // per_epoch))
