"""What a fit says at its start and at its end: what it is to do, what it did, and why it did not do all."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_warn

from lightning_sap.callbacks.logging import log_line
from lightning_sap.callbacks.pruning import inventory, layers, messages, regrowth, saving, tolerance
from lightning_sap.callbacks.pruning.compatibility import of_kind
from lightning_sap.callbacks.pruning.options import Options
from lightning_sap.callbacks.pruning.state import PruningState
from lightning_sap.engine.weights import low_rank_adapters
from lightning_sap.rounds.plan import WORDS, RoundPlan
from lightning_sap.rounds.protocol import RoundListener

if TYPE_CHECKING:
    from lightning_sap.callbacks.pruning.session import PruningSession

COUNTED = (
    "A step counts where step() of an optimizer from configure_optimizers is called, by Lightning or on "
    "self.optimizers(); one that steps in a method of its own must call step() of an optimizer inside it"
)
IN_STEPS = "Where the data have no end an epoch has none: give every_n_steps, the length of a round in steps"
FEWER_AT_ONCE = "Give more rounds, so that each takes less, or a larger target_remaining"


class Cause(NamedTuple):
    """What ended training, what lets it prune as planned, and whether the user asked for this end."""

    why: str
    cure: str
    wanted: bool = False


@dataclass(frozen=True)
class Ending:
    """How training ended.

    Attributes:
        rounds: How many prunings were planned; None: one after every round.
        done: How many there were.
        cause: What ended it.
        cut: Whether prunings are missing, and the start did not say so.
    """

    rounds: int | None
    done: int
    cause: Cause
    cut: bool


@dataclass
class Course:
    """What is seen of a fit while it goes on.

    Attributes:
        foreseen: Prunings that the start said not to come.
        stepped: Whether an optimizer step was seen in this fit.
        batches: Batches of the round so far, as long as no optimizer step is seen in it.
        warned: Whether that was warned of.
        ending: How training ended; None before.
    """

    foreseen: int = 0
    stepped: bool = False
    batches: int = 0
    warned: bool = False
    ending: Ending | None = None

    def see_batch(self, state: PruningState) -> None:
        """Count the batches without a step."""
        self.stepped = self.stepped or state.steps > 0
        self.batches = 0 if state.steps > 0 else self.batches + 1

    def see_round(self, options: Options, state: PruningState) -> None:
        """Warn, once, where a round ends and no step was ever seen: then none is going to be."""
        if self.batches and not self.stepped and state.plan.rounds != 0 and not self.warned:
            self.warned = True
            rank_zero_warn(
                f"{options.name}: no optimizer step was seen in the {_batches(self.batches)} of round {state.round}, "
                f"and a round without one is not pruned. {COUNTED}."
            )

    def end(self, state: PruningState, trainer: Trainer) -> None:
        """Note how training ended, before a round is put back."""
        rounds, done = state.plan.rounds, state.round
        lost = int(done == 0) if rounds is None else rounds - done - self.foreseen
        elapsed = state.elapsed(trainer.current_epoch) if state.plan.unit == "epoch" else self.batches
        stepless = self.batches if not self.stepped or elapsed >= state.plan.planned(state.round) else 0
        cut = lost > 0 and not (stepless and self.warned)
        self.ending = Ending(rounds, done, _cause(state, trainer, stepless), cut)

    def tell(self, options: Options, state: PruningState) -> None:
        """Say, once the module holds what it is going to keep, what was reached; else what was missed, and the cure."""
        ending, self.ending = self.ending, None
        if ending is None:  # nothing was trained
            return
        (why, cure, wanted), target = ending.cause, options.target_remaining
        if state.search is not None:
            tolerance.tell(options, state, why, cure, cut=ending.cut and not wanted)
            return
        held = next((record.round for record in state.history if record.restored and wanted), None)
        reached, short = _reached(ending, state, held), _shortfall(options, state, ending)
        missed = "nothing was pruned" if target is None else f"target_remaining={target} is missed"
        say: Callable[[str], None] = log_line
        if target is not None and ending.rounds != 0 and _is_met(options, state):
            text = f"{reached}; target_remaining={target} is met{messages.closeness(options, state)}."
        elif target is not None and (ending.cut or held is not None):
            text, say = f"{missed}: {reached}, since {why}. {cure}.", rank_zero_warn
        elif short is not None:
            text, say = f"{missed}: {reached}, since {short.why}. {short.cure}.", rank_zero_warn
        elif ending.cut and not wanted:
            missed = "not all prunings came" if ending.done else missed
            text, say = f"{missed}: {reached}, since {why}. {cure}.", rank_zero_warn
        elif ending.cut or held is not None:
            text = f"{reached}, since {why}."
        elif ending.rounds and ending.done == ending.rounds and target is None and not wanted:
            further = "For a sparser network give more rounds (rounds, max_epochs) or a target_remaining."
            text = f"{reached}. {further}"
        else:
            text = f"{reached}."
        say(f"{options.name}: {text}")


def begin(session: PruningSession, trainer: Trainer, module: LightningModule, schedules: list[str]) -> Course:
    """Say what is going to happen, and warn of what can be known to stand against it."""
    options, state = session.options, session.state
    plan = inventory.tell(session, trainer, module)
    archive = saving.told(trainer, session)
    said = messages.announcement(options, state, schedules, session.subject.outside, archive, plan)
    log_line("\n".join([said, *regrowth.lines(options, state)]))
    if state.plan.rounds != 0:
        messages.warn_of_lasting(options, session.schedules.lasting())
        messages.warn_of_adapters(options, low_rank_adapters(module, session.weights))
        layers.tell(options, module, session.weights)
        _warn_of_patience(options, state, trainer)
        if session.subject.training.held is None:
            messages.warn_of_no_optimizer(options)
    elif options.rounds != 0 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        _warn_of_no_pruning(options, state.plan)
    if trainer.barebones:
        messages.warn_of_silence(options)
    return Course(foreseen=max(0, state.prunings_lost()))


def _reached(ending: Ending, state: PruningState, held: int | None) -> str:
    reached = f"{state.masks.remaining:.2%} of {state.masks.total:,} weights remain"
    if held is not None:
        return f"{reached}, those of round {held}, which was put back"
    if ending.rounds in (None, ending.done):
        return f"{reached} after {messages.counted(ending.done, 'pruning')}"
    return f"{reached} after {ending.done} of {messages.counted(ending.rounds, 'pruning')}"


def _batches(number: int) -> str:
    return f"{number} batch" + "es" * (number != 1)


def _named(early: EarlyStopping) -> str:
    return f"EarlyStopping({early.monitor!r}, patience={early.patience})"


def _is_met(options: Options, state: PruningState) -> bool:
    return messages.above_target(options, state) <= state.finest


def _shortfall(options: Options, state: PruningState, ending: Ending) -> Cause | None:
    """Why the prunings that came did not do what was asked; None where they did, or where the start foresaw it."""
    names, records = state.masks.pruned.keys(), list(state.history)[-2:]
    if ending.done and state.steps and state.masks.is_dense and not state.trained & names:
        cure = "Let the loss depend on them, or prune other weights with include"
        return Cause("none of them had a gradient", cure)
    kept, sizes = state.masks.survivors, {name: mask.numel() for name, mask in state.masks.pruned.items()}
    floors = options.floors(sizes)
    missed = options.target_remaining is not None and sum(kept.values()) > sum(floors.values())
    if not missed or not ending.rounds or ending.done != ending.rounds or len(records) < 2:
        return None
    before, last = records
    if last.taken_back:
        return Cause(f"round {last.round} was taken back", FEWER_AT_ONCE)
    if options.structure == "unit":
        why = "outputs of the network and one unit of every layer stay, and layers that were not trained"
        return Cause(why, "Give a larger target_remaining, or structure='weight'")
    above = [name for name in names if kept[name] > max(floors[name], options.target({name: sizes[name]}))]
    spared = [name for name in above if last.layers_remaining[name] >= before.layers_remaining.get(name, 0)]
    why = f"the last pruning took nothing of {messages.listed(spared)}"
    return Cause(
        f"{why}: a weight is pruned after a round in which it had a gradient, a replaced one from the round after",
        "Replace or freeze layers earlier, exclude what is not to be pruned, or give a larger target_remaining",
    )


def _cause(state: PruningState, trainer: Trainer, stepless: int) -> Cause:
    """What ended training; ``stepless``: the batches of the last round, if it had no optimizer step."""
    unit, epoch = state.plan.unit, trainer.current_epoch - 1
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    states = [getattr(getattr(callback, "session", None), "state", None) for callback in callbacks]
    if any(isinstance(other, PruningState) and other.stop is not None for other in states):  # of any pruner here
        who = " or ".join(type(c).__name__ for c in callbacks if isinstance(c, RoundListener) and c.may_stop)
        return Cause(f"{who} ended training after round {state.round}", FEWER_AT_ONCE, wanted=True)
    if stepless:
        return Cause(f"no optimizer step was seen in {_batches(stepless)}", COUNTED)
    endless = unit == "epoch" and trainer.num_training_batches == math.inf
    needed = state.end_needed(trainer.current_epoch if unit == "epoch" else None)
    if trainer.should_stop:
        return _cause_of_stop(trainer, epoch, IN_STEPS if endless else f"Trainer(min_{WORDS[unit].many}={needed})")
    limit = "max_steps" if 0 <= trainer.max_steps <= trainer.global_step else "max_epochs"
    cure = f"Give {limit}={needed} or more, or fewer or shorter rounds"
    if limit != WORDS[unit].limit:  # another clock than that of the rounds
        cure = f"All prunings take {needed} {WORDS[unit].many}: give more, or fewer or shorter rounds"
    return Cause(f"{limit}={getattr(trainer, limit)} ended training in epoch {epoch}", IN_STEPS if endless else cure)


def _cause_of_stop(trainer: Trainer, epoch: int, cure: str) -> Cause:
    """Who set ``trainer.should_stop``."""
    for early in of_kind(trainer, "EarlyStopping"):
        if early.stopping_reason.value:
            why = f"{_named(early)} ended training in epoch {epoch}"
            wanted = early.stopping_reason.name == "STOPPING_THRESHOLD"
            more = (
                cure if cure == IN_STEPS else f"Give it more patience, which counts validation checks, or give {cure}"
            )
            return Cause(why, more, wanted)
    for timer in of_kind(trainer, "Timer"):
        left = timer.time_remaining()
        if left is not None and left <= 0:
            more = cure if cure == IN_STEPS else "Give more time, or fewer or shorter rounds"
            return Cause(f"the time of Timer (max_time) was over in epoch {epoch}", more)
    more = cure if cure == IN_STEPS else f"To train on all the same, give {cure}"
    return Cause(f"trainer.should_stop was set in epoch {epoch}", more)


def _warn_of_no_pruning(options: Options, plan: RoundPlan) -> None:
    if plan.end is None:  # it only holds what was put back once
        return
    words, left = WORDS[plan.unit], plan.end - plan.first
    if left > 1:
        rank_zero_warn(
            f"{options.name}: no pruning is planned: the run of the checkpoint has none, and a resumed run keeps its "
            "rounds. Start a new fit from its weights to prune them."
        )
        return
    shorter = "every_n_steps for rounds within the epoch, " if plan.unit == "epoch" else ""
    rank_zero_warn(
        f"{options.name}: no pruning is planned: {messages.counted(left, plan.unit)} of training "
        f"({words.limit}={plan.end}) cannot hold two rounds. Give {words.limit}={plan.first + 2} or more, {shorter}or "
        "rounds=0 to only hold masks."
    )


def _warn_of_patience(options: Options, state: PruningState, trainer: Trainer) -> None:
    """Warn of an EarlyStopping that can end training before a round is over."""
    needed, checks, by_epochs = state.end_needed(), _checks(trainer, state.plan), state.plan.unit == "epoch"
    least = (trainer.min_epochs if by_epochs else trainer.min_steps) or 0
    for early in of_kind(trainer, "EarlyStopping"):
        if checks is not None and early.patience < checks and least < needed:
            rank_zero_warn(
                f"{options.name}: {_named(early)} counts validation checks; a round has {checks}, so that training can "
                f"end within a round. Give a patience of {2 * checks}, two rounds, or more, or "
                f"Trainer(min_{WORDS[state.plan.unit].many}={needed})."
            )


def _checks(trainer: Trainer, plan: RoundPlan) -> int | None:
    """Validation checks of a round; None where that cannot be known."""
    batches, between, every = trainer.num_training_batches, trainer.val_check_batch, trainer.check_val_every_n_epoch
    if plan.unit == "epoch" and trainer.val_check_interval == 1.0 and every is not None:
        return plan.length // every
    if between is None or math.inf in (batches, between) or not batches:
        return None
    of_round = plan.length * (batches if plan.unit == "epoch" else trainer.accumulate_grad_batches)
    if every is None:
        return int(of_round // between)
    return int(of_round * (batches // between) // (batches * every))
