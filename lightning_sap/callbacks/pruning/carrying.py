"""A pruning: decided, noted, and then carried out, so that one that was interrupted is finished and not done twice."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule, Trainer

from lightning_sap.callbacks.pruning import averages, compatibility, emptied, messages, progress, tolerance, units
from lightning_sap.callbacks.pruning.decided import DecidedPruning
from lightning_sap.callbacks.pruning.decisions import decide_next
from lightning_sap.callbacks.pruning.kept import go_back_, keep_
from lightning_sap.rounds.protocol import GoOn, Stop, TakeBack

if TYPE_CHECKING:
    from lightning_sap.callbacks.pruning.session import PruningSession


def prune_(
    session: PruningSession,
    trainer: Trainer,
    module: LightningModule,
    last_epoch: int,
    beside: Sequence[PruningSession],
    *,
    keeps: bool,
) -> None:
    """Decide on the pruning that follows the round, unless that is done, and carry it out; a collective.

    Args:
        session: The run.
        trainer: Its Trainer.
        module: Its module.
        last_epoch: The last epoch of the round.
        beside: The runs of the other callbacks that prune.
        keeps: Whether the round is kept, to go back to.
    """
    pruning = session.state.pruning
    if pruning is None:
        pruning = session.state.pruning = _decide_(session, trainer, module, last_epoch, beside, keeps=keeps)
    before = session.state
    _carry_out_(session, trainer, module, pruning, beside)
    rates = [float(group["lr"]) for optimizer in trainer.optimizers[:1] for group in optimizer.param_groups[:1]]
    progress.tell_pruning(session.options, before, session.state, rates[0] if rates else None)


def _decide_(
    session: PruningSession,
    trainer: Trainer,
    module: LightningModule,
    last_epoch: int,
    beside: Sequence[PruningSession],
    *,
    keeps: bool,
) -> DecidedPruning:
    """Measure, decide and pick; a round that is taken back is gone back from."""
    state, started, answer = session.state, time.perf_counter(), session.state.answer or GoOn()
    if isinstance(answer, Stop):  # training goes on for all that
        answer = tolerance.goes_on(state)
    if isinstance(answer, TakeBack):
        if state.undone is None:
            record = session.record(trainer, session.measure(module), last_epoch)
            state.undone = replace(record, taken_back=True)
        go_back_(session, trainer, module, beside)
    elif keeps and answer.keep:
        keep_(session, trainer, module)
    decision = decide_next(session, trainer, module, answer)
    after = session.measure(module, decision.masks)
    if state.search is None:  # else it may be taken back
        messages.warn_of_short(session.options, decision)
        emptied.warn_of_empty_units(session.options, session.tensors(module), decision.masks)
    record = replace(
        state.undone or session.record(trainer, decision.before, last_epoch),
        pruned=decision.count,
        regrown=decision.regrown,
        pqi_pruned=after.overall,
        layers_pqi_pruned=after.layers,
        seconds=time.perf_counter() - started,
    )
    return DecidedPruning(
        decision.masks,
        decision.count,
        after.overall,
        record,
        rewinds=answer.scale > 0,
        last=answer.last or tolerance.is_stuck_(state, answer, decision),
        companions=decision.companions,
        finest=decision.finest,
    )


def _carry_out_(
    session: PruningSession,
    trainer: Trainer,
    module: LightningModule,
    pruning: DecidedPruning,
    beside: Sequence[PruningSession],
) -> None:
    """Mask and rewind; all of it can be done again. Only then the next round begins."""
    state, options = session.state, session.options
    pruning = replace(pruning, masks=pruning.masks.matched(session.live()))

    def change_() -> None:
        if pruning.rewinds and state.first_weights is not None:
            session.restore_(module, state.first_weights, beside)
        units.mask_(session, pruning.masks, pruning.companions)
        averages.mask_(session, pruning.masks, pruning.companions)

    change_()
    compatibility.in_averages_(trainer, module, change_)
    session.schedules.end_round_(state, options.lr_schedule)
    if options.reset_optimizer:
        session.schedules.forget_()
    else:
        messages.warn_of_mixed(options, session.schedules.mixed())
        session.zero_kept_()  # weights that come back have no state from before
    following = state.next_round(pruning, pruning.pqi, pruning.record, trainer.current_epoch)
    if pruning.last:
        following.plan = replace(following.plan, rounds=following.round)
    if following.prunings_left() == 0:
        following.first_weights = None  # nothing goes back to them any more
    session.schedules.zero_pruned_(units.pruned_parameters(session, following))
    session.state = following
    session.mask_gradients()  # those that accumulate over the end of the round
    session.subject.gradients.watch(following.trained)
    session.metrics.end(trainer)
