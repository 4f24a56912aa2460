"""The learning-rate schedules and optimizers of a Trainer, which every round starts anew."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer

from lightning_sap.callbacks.pruning.compatibility import accumulation
from lightning_sap.callbacks.pruning.options import Schedule
from lightning_sap.callbacks.pruning.state import PruningState
from lightning_sap.rewind import Mode, Replay, Ticks
from lightning_sap.rounds.plan import RoundPlan

NEVER = sys.maxsize


class Schedules:
    """All schedules and optimizers of one fit, as they were before the first step.

    Lightning steps a schedule by its own count, which goes on over all rounds. Where a schedule is replayed, it is
    stepped here instead, right after each batch, by the count of the round.
    """

    def __init__(self, optimizers: Sequence[Optimizer] = (), configs: Sequence[LRSchedulerConfig] = ()) -> None:
        self._configs = list(configs)
        self._frequencies = [config.frequency for config in self._configs]
        self._replays = [Replay(config.scheduler, config.reduce_on_plateau) for config in self._configs]
        self._states = [(optimizer, _copied(optimizer.state)) for optimizer in optimizers]
        self._modes: list[Mode] = []  # of the run that is resumed

    def choose(self, trainer: Trainer, module: LightningModule, plan: RoundPlan, wanted: Schedule) -> list[str]:
        """Settle what each schedule does in a round; one line for each, with its reason."""
        manual = not module.automatic_optimization
        if manual and wanted == "squeeze" and self._replays and plan.rounds != 0:
            raise ValueError(
                "lr_schedule='squeeze' cannot be had with manual optimization, where the module steps its schedules "
                "itself; write them for one round and use lr_schedule='restart', or 'keep'."
            )
        lines = []
        for i, (config, replay) in enumerate(zip(self._configs, self._replays, strict=True)):
            if plan.rounds == 0:
                replay.choose("keep", Ticks(), _stepper(module))
                continue
            self._settle(replay, wanted, module, _ticks(trainer, plan, config.interval, self._frequencies[i]))
            if self._modes:
                _go_on(replay, self._modes[i], wanted)
            if self._replayed(config, replay) and not manual:
                config.frequency = NEVER
            lines.append(f"{type(config.scheduler).__name__}: {replay.mode} ({replay.reason})")
        return lines

    @staticmethod
    def _settle(replay: Replay, wanted: Schedule, module: LightningModule, ticks: Ticks) -> None:
        """Choose what a round does with a schedule."""
        if not module.automatic_optimization:
            replay.mode, replay.reason = ("keep" if wanted == "keep" else "restart"), "the module steps it itself"
        elif replay.metric_driven or wanted == "keep" or _advances(module, replay):
            replay.choose(wanted, ticks, _stepper(module))
        else:
            replay.mode, replay.reason = "keep", "the module's lr_scheduler_step sets it by the epoch of training"
            if wanted != "auto":
                raise ValueError(
                    f"lr_schedule={wanted!r} cannot be had where {replay.reason}. Step it without an epoch "
                    "(`scheduler.step()`), or use lr_schedule='keep'."
                )

    def rewind_(self) -> None:
        """Put every schedule back to its first value."""
        for replay in self._replays:
            replay.rewind_()

    def forget_(self) -> None:
        """Put the state of every optimizer back to the first, which is none for most."""
        for optimizer, first in self._states:
            optimizer.state.clear()
            optimizer.state.update(_copied(first))

    def advance_(self, trainer: Trainer, module: LightningModule, state: PruningState, *, epoch_ended: bool) -> None:
        """Step each replayed schedule to where its round stands.

        To be called after every batch, and at the start of an epoch for one before that was cut short.
        """
        if not module.automatic_optimization:
            return
        epochs = trainer.current_epoch - state.first_epoch + epoch_ended
        steps = state.steps
        for config, replay in zip(self._configs, self._replays, strict=True):
            if self._replayed(config, replay):
                by_step = config.interval == "step"
                length = state.plan.length_of(state.round, state.start)
                if by_step and length is not None and state.plan.unit == "epoch":
                    length = steps_of_epochs(trainer, length)
                replay.advance_(steps if by_step else epochs, length, _stepper(module))

    def state(self) -> list[dict[str, Any]]:
        """What a resumed run needs: the first values, and how far the round is."""
        return [{"first": r.first, "groups": r.first_groups, "calls": r.calls, "mode": r.mode} for r in self._replays]

    def load(self, state: list[dict[str, Any]]) -> None:
        """Take up a state where it belongs to the same number of schedules."""
        if len(state) == len(self._replays):
            for replay, saved in zip(self._replays, state, strict=True):
                replay.first, replay.first_groups, replay.calls = saved["first"], saved["groups"], saved["calls"]
            self._modes = [saved["mode"] for saved in state if "mode" in saved]

    @staticmethod
    def _replayed(config: LRSchedulerConfig, replay: Replay) -> bool:
        if config.interval == "step" and replay.length is None:
            return False  # Lightning counts the batches of each epoch anew, here of unknown number: it goes on doing so
        return replay.mode != "keep" and not replay.metric_driven


def _copied(states: Mapping[Tensor, Any]) -> dict[Tensor, Any]:
    return {parameter: copy.deepcopy(state) for parameter, state in states.items()}


def _go_on(replay: Replay, mode: Mode, wanted: Schedule) -> None:
    """A run that is resumed goes on with the mode that it had."""
    if wanted != "auto" and replay.mode != mode:
        raise ValueError(
            f"lr_schedule={wanted!r} cannot take the place of {mode!r} in the middle of a run, which the checkpoint "
            f"goes on with; give lr_schedule={mode!r}."
        )
    if replay.mode != mode:
        replay.mode, replay.reason = mode, "as before the checkpoint"


def _advances(module: LightningModule, replay: Replay) -> bool:
    """Whether the module steps this schedule from where it is."""
    own = type(module).lr_scheduler_step is not LightningModule.lr_scheduler_step
    return not own or replay.advances(_stepper(module))


def _stepper(module: LightningModule) -> Any:
    return lambda scheduler: module.lr_scheduler_step(scheduler, None)


def steps_of_epochs(trainer: Trainer, epochs: int) -> int | None:
    """Optimizer steps of so many epochs; None if that is not known beforehand."""
    batches, every = trainer.num_training_batches, accumulation(trainer)
    if batches == float("inf") or every is None or not trainer.lightning_module.automatic_optimization:
        return None
    return epochs * -(-int(batches) // every)


def last_epoch(trainer: Trainer, epoch: int, step: int) -> int | None:
    """Where training ends (exclusive) that began an epoch at a step: by ``max_epochs`` or, before, by ``max_steps``.

    None or -1 where that is not known.
    """
    per_epoch = steps_of_epochs(trainer, 1)
    if trainer.max_epochs is None or trainer.max_epochs < 0 or trainer.max_steps < 0 or not per_epoch:
        return trainer.max_epochs
    return min(trainer.max_epochs, epoch + -(-(trainer.max_steps - step) // per_epoch))


def _ticks(trainer: Trainer, plan: RoundPlan, interval: str, frequency: int) -> Ticks:
    if plan.unit == "step":
        return _ticks_of_steps(trainer, plan, interval, frequency)
    epochs = None if plan.end is None else plan.end - plan.schedules_from
    if interval == "epoch":
        return Ticks(plan.length, epochs, frequency)
    steps = None if epochs is None else steps_of_epochs(trainer, epochs)
    if trainer.max_steps > 0:
        steps = trainer.max_steps if steps is None else min(steps, trainer.max_steps)
    batches, every = trainer.num_training_batches, accumulation(trainer)
    stepping = [] if batches == float("inf") or every is None else [*range(every, int(batches), every), int(batches)]
    return Ticks(steps_of_epochs(trainer, plan.length), steps, frequency, stepping)


def _ticks_of_steps(trainer: Trainer, plan: RoundPlan, interval: str, frequency: int) -> Ticks:
    """For rounds in steps."""
    if interval == "epoch":
        return Ticks(None, trainer.max_epochs if (trainer.max_epochs or -1) > 0 else None, frequency)
    batches, every = trainer.num_training_batches, accumulation(trainer)
    stepping = [] if batches == float("inf") or every is None else [*range(every, int(batches), every), int(batches)]
    return Ticks(plan.length, plan.end, frequency, stepping)
