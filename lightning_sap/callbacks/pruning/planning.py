"""How a Trainer's limits divide into rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from lightning.pytorch import Trainer

from lightning_sap.callbacks.pruning import checks, compatibility
from lightning_sap.callbacks.pruning.options import Options
from lightning_sap.callbacks.pruning.schedules import end_in_epochs, steps_of_epochs
from lightning_sap.callbacks.pruning.state import PruningState
from lightning_sap.policies.regrowth import GrowAndPrune
from lightning_sap.rounds.cycles import plan_cycles
from lightning_sap.rounds.plan import RoundPlan, plan_rounds, plan_search

STEPS_TO_JUDGE = 20  # optimizer steps; after fewer a round is unsound for lack of training, see benchmarks/tolerance.py


def begin(trainer: Trainer, options: Options, schedules_from: int) -> RoundPlan:
    """The rounds of a training that begins now, checked; none where it is but tried (``fast_dev_run``)."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return RoundPlan(0, 1)
    found = plan(trainer, options)
    start = schedules_from if found.unit == "epoch" or not schedules_from else found.first
    found = replace(found, schedules_from=start)
    checks.check_plan(options, found, steps_of_epochs(trainer, 1))
    if found.rounds != 0:
        compatibility.check_averaging(trainer)
    return found


def plan(trainer: Trainer, options: Options) -> RoundPlan:
    """The rounds of a training that begins now: in steps where that is asked for or only steps limit it."""
    limited = trainer.max_epochs is not None and trainer.max_epochs >= 0
    if options.every_n_steps is not None or not (limited or options.every_n_epochs or trainer.max_steps < 0):
        left = steps_left(trainer, 0)
        end = None if left is None else trainer.global_step + left
        if options.tolerance is not None:
            wanted = end, options.rounds, options.every_n_steps, trainer.global_step
            return plan_search(*wanted, unit="step", shortest=STEPS_TO_JUDGE)
        wanted = end, options.rounds, options.every_n_steps, trainer.global_step
        if isinstance(options.policy, GrowAndPrune):  # no round is shorter than an epoch, unless that is asked for
            divide = partial(plan_cycles, parts=options.policy.parts, cycles=options.policy.cycles)
            return divide(*wanted, unit="step", shortest=steps_of_epochs(trainer, 1) or 1)
        return plan_rounds(*wanted, unit="step")
    return _plan_in_epochs(trainer, options)


def _plan_in_epochs(trainer: Trainer, options: Options) -> RoundPlan:
    """As many rounds as fit where ``max_steps`` ends training before ``max_epochs``."""
    divide: Callable[..., RoundPlan] = plan_rounds
    if options.tolerance is not None:  # each round has a validation where its length is free
        shortest = -(-STEPS_TO_JUDGE // max(1, steps_of_epochs(trainer, 1) or STEPS_TO_JUDGE))
        divide = partial(plan_search, least=trainer.check_val_every_n_epoch or 1, shortest=shortest)
    wanted = options.rounds, options.every_n_epochs, trainer.current_epoch
    end = end_in_epochs(trainer, trainer.current_epoch, trainer.global_step)
    if isinstance(options.policy, GrowAndPrune):
        return plan_cycles(end, *wanted, parts=options.policy.parts, cycles=options.policy.cycles)
    whole = divide(trainer.max_epochs, *wanted)
    if end is None or end < 0:
        return whole
    if not whole.rounds or whole.first + whole.needed < end:
        return whole if whole.end is None else replace(whole, end=end)
    try:
        return divide(end, *wanted)
    except ValueError as error:
        raise ValueError(
            f"max_steps={trainer.max_steps} ends training in epoch {end - 1}; give more steps, or fewer or shorter "
            f"rounds. ({error})"
        ) from None


def with_new_end(trainer: Trainer, state: PruningState) -> RoundPlan:
    """The plan of a run that is resumed: it ends where training ends now."""
    plan = state.plan
    if plan.end is None:
        return plan
    if plan.unit == "step":
        left = steps_left(trainer, state.epoch_steps if state.epoch == trainer.current_epoch else 0)
        return plan if left is None else replace(plan, end=state.first_step + state.steps + left)
    if (trainer.max_epochs or -1) <= 0:
        return plan
    whole = plan.schedules_from == 0  # what steps an earlier fit took is not known
    return replace(plan, end=end_in_epochs(trainer, 0, 0) if whole else trainer.max_epochs)


def steps_left(trainer: Trainer, taken: int) -> int | None:
    """Optimizer steps until training ends, so many taken in this epoch; None if that is not known beforehand."""
    limits = [trainer.max_steps - trainer.global_step] if trainer.max_steps >= 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        whole = steps_of_epochs(trainer, max(0, trainer.max_epochs - trainer.current_epoch))
        limits += [] if whole is None else [max(0, whole - taken)]
    return min(limits, default=None)


def stops_now(trainer: Trainer) -> bool:
    """Whether training stops at once, since something asked for it and its least is reached."""
    enough = trainer.current_epoch >= (trainer.min_epochs or 0) and trainer.global_step >= (trainer.min_steps or 0)
    return bool(trainer.should_stop) and enough


def ends_training(trainer: Trainer) -> bool:
    """Whether training ends with the epoch that goes on."""
    by_epochs = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch + 1
    return by_epochs or 0 <= trainer.max_steps <= trainer.global_step
