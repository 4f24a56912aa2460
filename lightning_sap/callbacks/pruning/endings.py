"""Why a run ended, what it was to do, and what it did."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_sap.callbacks.pruning.compatibility import of_kind
from lightning_sap.callbacks.pruning.messages import counted
from lightning_sap.callbacks.pruning.options import Options
from lightning_sap.callbacks.pruning.state import PruningState
from lightning_sap.rounds.plan import WORDS, RoundPlan
from lightning_sap.rounds.protocol import RoundListener

STEPS_SEEN = (
    "Return the optimizer from configure_optimizers and let its step() be called, by Lightning or on self.optimizers(); "
    "one that steps in a method of its own must call step() of an optimizer inside"
)


@dataclass(frozen=True)
class Ending:
    """How training ended.

    Attributes:
        plan: The rounds that were planned.
        done: How many prunings there were.
        why: What ended it.
        cure: What lets it prune as planned.
        wanted: Whether the user asked for this end.
        cut: Whether prunings are missing that were not known at the start to be missing.
    """

    plan: RoundPlan
    done: int
    why: str
    cure: str
    wanted: bool
    cut: bool


@dataclass
class Course:
    """What is seen of a fit, and said at its end.

    Attributes:
        foreseen: Prunings that were said at the start not to come.
        batches: Batches of the round so far, as long as no optimizer step is seen in it.
        warned: Whether that was said.
        ending: How training ended; None before.
    """

    foreseen: int = 0
    batches: int = 0
    warned: bool = False
    ending: Ending | None = None

    def see_batch(self, state: PruningState) -> None:
        """Count the batches without a step."""
        self.batches = self.batches + 1 if state.steps == 0 else 0

    def see_round(self, options: Options, state: PruningState) -> None:
        """Warn, once, of a round that ends with batches and without a step: nothing is pruned after it."""
        if state.steps == 0 and self.batches and state.plan.rounds != 0 and not self.warned:
            self.warned = True
            rank_zero_warn(
                f"{options.name}: no optimizer step was seen in the {self.batches} batches of round {state.round}, and a "
                f"round without one is not pruned. {STEPS_SEEN}."
            )

    def end(self, options: Options, state: PruningState, trainer: Trainer) -> None:
        """Note how training ended, before a round is put back."""
        plan, done = state.plan, state.round
        lost = 0 if done else 1
        if plan.rounds is not None:
            lost = plan.rounds - done - self.foreseen
        stepless = state.steps == 0 and self.batches > 0
        why, cure, wanted = _cause(options, state, trainer, self.batches if stepless else 0)
        self.ending = Ending(plan, done, why, cure, wanted, cut=lost > 0 and not (stepless and self.warned))

    def tell(self, options: Options, state: PruningState) -> None:
        """Say, once the module holds what it is going to keep, what was reached, and what was missed, why, and the cure."""
        ending, self.ending = self.ending, None
        if ending is None:  # nothing was trained
            return
        masks, target = state.masks, options.target_remaining
        held = next((record.round for record in state.history if record.restored), None)
        number, what = ending.plan.rounds, f"{masks.remaining:.2%} of {masks.total:,} weights remain"
        reached = f"{what} after {counted(ending.done, 'pruning')}"
        if number is not None and ending.done != number:
            reached = f"{what} after {ending.done} of {counted(number, 'pruning')}"
        if held is not None:
            reached = f"{what}, those of round {held}, which was put back"
        kept = sum(masks.survivors.values())
        aim = None if target is None else options.target({name: mask.numel() for name, mask in masks.pruned.items()})
        if aim is not None and kept <= aim and number != 0:
            rank_zero_info(f"{options.name}: {reached}; target_remaining={target} is met.")
        elif aim is not None and (ending.cut or held is not None):
            rank_zero_warn(
                f"{options.name}: target_remaining={target} is missed: {reached}, since {ending.why}. {ending.cure}."
            )
        elif ending.cut and not ending.wanted:
            missed = "not all prunings came" if ending.done else "nothing was pruned"
            rank_zero_warn(f"{options.name}: {missed}: {reached}, since {ending.why}. {ending.cure}.")
        elif ending.cut or held is not None:
            rank_zero_info(f"{options.name}: {reached}, since {ending.why}.")
        else:
            further = "For a sparser network give more rounds (rounds, max_epochs) or a target_remaining."
            rank_zero_info(f"{options.name}: {reached}." + (f" {further}" if number and not ending.wanted else ""))


def _cause(options: Options, state: PruningState, trainer: Trainer, stepless: int) -> tuple[str, str, bool]:
    """What ended training, the cure, and whether the user asked for it; ``stepless``: batches without a step."""
    plan, epoch = state.plan, trainer.current_epoch - 1
    least = f"Trainer(min_{WORDS[plan.unit].many}={state.end_needed()})"
    if state.stop is not None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        who = " or ".join(type(c).__name__ for c in callbacks if isinstance(c, RoundListener) and c.may_stop)
        cure = "Give more rounds, so that each takes less, or a larger target_remaining"
        return f"{who} ended training after round {state.round}", cure, True
    if stepless:
        return f"no optimizer step was seen in {stepless} batches", STEPS_SEEN, False
    endless = plan.unit == "epoch" and trainer.num_training_batches == math.inf
    in_steps = "Where the data have no end an epoch has none: give every_n_steps, the length of a round in steps"
    early = next((each for each in of_kind(trainer, "EarlyStopping") if each.stopping_reason.value), None)
    if trainer.should_stop and early is not None:
        why = f"EarlyStopping({early.monitor!r}, patience={early.patience}) ended training in epoch {epoch}"
        wanted = early.stopping_reason.name == "STOPPING_THRESHOLD"
        return why, f"Give it more patience, which counts validation checks, or {least}", wanted
    if trainer.should_stop and any(
        (left := t.time_remaining()) is not None and left <= 0 for t in of_kind(trainer, "Timer")
    ):
        cure = f"Give more time, or fewer or shorter rounds ({WORDS[plan.unit].every}, here {plan.length})"
        return f"the time of the Timer (max_time) was over in epoch {epoch}", in_steps if endless else cure, False
    if trainer.should_stop:
        cure = in_steps if endless else f"To train on all the same, give {least}"
        return f"trainer.should_stop was set in epoch {epoch}", cure, False
    word = "max_steps" if 0 <= trainer.max_steps <= trainer.global_step else "max_epochs"
    cure = f"Give {WORDS[plan.unit].limit}={state.end_needed()} or more, or fewer or shorter rounds"
    return f"{word}={getattr(trainer, word)} ended training in epoch {epoch}", in_steps if endless else cure, False


def begin(options: Options, state: PruningState, trainer: Trainer) -> Course:
    """Warn of what can be known at the start to keep a run from what it is to do."""
    if options.rounds != 0 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        if state.plan.rounds == 0:
            _warn_of_no_pruning(options, state.plan)
        else:
            _warn_of_patience(options, state, trainer)
    return Course(foreseen=max(0, state.prunings_lost()))


def _warn_of_no_pruning(options: Options, plan: RoundPlan) -> None:
    words = WORDS[plan.unit]
    if plan.end is None:
        return
    left = plan.end - plan.first
    if left > 1:
        rank_zero_warn(
            f"{options.name}: no pruning is planned: the checkpoint's run has none, and a run that is resumed keeps its "
            "rounds. Start a new fit from its weights to prune them."
        )
        return
    in_steps = "every_n_steps for rounds within the epoch, " if plan.unit == "epoch" else ""
    rank_zero_warn(
        f"{options.name}: no pruning is planned: {counted(left, plan.unit)} of training ({words.limit}={plan.end}) cannot "
        f"hold two rounds. Give {words.limit}={plan.first + 2} or more, {in_steps}or rounds=0 to only hold masks."
    )


def _warn_of_patience(options: Options, state: PruningState, trainer: Trainer) -> None:
    """Warn of an EarlyStopping that can end training before a round is over."""
    plan, needed = state.plan, state.end_needed()
    least = trainer.min_epochs if plan.unit == "epoch" else trainer.min_steps
    checks = _checks(trainer, plan)
    if checks is None or (least or 0) >= needed:
        return
    for early in of_kind(trainer, "EarlyStopping"):
        if early.patience < checks:
            rank_zero_warn(
                f"{options.name}: EarlyStopping({early.monitor!r}, patience={early.patience}) counts validation checks, "
                f"of which a round has {checks}: it can end training before the prunings are done. Give it a patience of "
                f"{2 * checks}, two rounds, or more, or Trainer(min_{WORDS[plan.unit].many}={needed})."
            )


def _checks(trainer: Trainer, plan: RoundPlan) -> int | None:
    """Validation checks of a round; None where that cannot be known."""
    batches, between, every = trainer.num_training_batches, trainer.val_check_batch, trainer.check_val_every_n_epoch
    whole = trainer.val_check_interval == 1.0 and every is not None
    if plan.unit == "epoch" and whole:
        return plan.length // every
    if between is None or math.inf in (batches, between) or not batches:
        return None
    of_round = plan.length * (batches if plan.unit == "epoch" else trainer.accumulate_grad_batches)
    if every is None:
        return int(of_round // between)
    return int(of_round * (batches // between) // (batches * every))
