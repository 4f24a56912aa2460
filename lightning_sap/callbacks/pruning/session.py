"""One run: which weights of a module are pruned, how far it is, and what its next pruning does. Knows no hooks."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_sap.callbacks.pruning import (
    averages,
    checks,
    declared,
    emptied,
    messages,
    planning,
    progress,
    regrowth,
    saving,
    snapshots,
    tolerance,
    units,
)
from lightning_sap.callbacks.pruning.carrying import prune_
from lightning_sap.callbacks.pruning.decisions import ask
from lightning_sap.callbacks.pruning.first_masks import start
from lightning_sap.callbacks.pruning.gathering import Gathering
from lightning_sap.callbacks.pruning.held import HeldWeights
from lightning_sap.callbacks.pruning.inventory import Plan, others_of
from lightning_sap.callbacks.pruning.kept import hand_back_, take_first_
from lightning_sap.callbacks.pruning.options import Options
from lightning_sap.callbacks.pruning.replaced import check_trained, look_
from lightning_sap.callbacks.pruning.schedules import Schedules, steps_of_epochs
from lightning_sap.callbacks.pruning.schema import SCHEMA
from lightning_sap.callbacks.pruning.state import PruningState
from lightning_sap.callbacks.pruning.trained import of_kind, select, settle_
from lightning_sap.callbacks.round_metrics import RoundMetrics
from lightning_sap.engine.floors import fewest
from lightning_sap.engine.masks import MaskSet
from lightning_sap.engine.measure import Measure
from lightning_sap.rounds.history import History, RoundRecord
from lightning_sap.rounds.protocol import RoundEnd, RoundListener, Stop, TakeBack

Beside: TypeAlias = "Sequence[PruningSession]"  # the runs of the other callbacks that prune


class PruningSession(HeldWeights):
    """The masks of a run under a Trainer, and when they change."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.metrics = RoundMetrics()
        self.schedules = Schedules()
        self.gathering = Gathering(options.importance)
        self._importance = self.gathering.of_weights
        self.archive: str | None = None  # the folder that rounds are saved in
        self.places: dict[str | None, str] = {}  # by run, the folder that its rounds are in
        self.inventory: Plan | None = None  # what is pruned and what is left out, as it was made last
        self.earlier: tuple[History, ...] = ()  # the rounds of earlier fits
        self.replaced: set[str | None] = set()  # SHA-256 of files that this run may write over

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a fit."""
        return {**super().__getstate__(), "schedules": Schedules(), "metrics": RoundMetrics()}

    def forget_fit(self) -> None:
        """Let go of the module, and of what was seen of its fit."""
        self.let_go()
        self.gathering = self.gathering.fresh()
        self.metrics.forget_fit()

    # -- what is pruned -----------------------------------------------------------------------------------------------

    def select(self, trainer: Trainer, module: nn.Module) -> None:
        """Find the prunable weights, in the module's order."""
        self.weights, self.subject = select(self.options, module, trainer)
        self.subject.keepers = declared.keepers(module, trainer.callbacks)  # type: ignore[attr-defined]
        self.gathering.check(self, module)

    def frozen(self, state: PruningState) -> list[str]:
        """Those that are not going to be trained, as far as is known before training."""
        untrained = self.subject.training.untrained
        return [n for n, weight in self.weights.items() if n not in state.trained and untrained(weight.parameter)]

    def hold(self, module: nn.Module) -> None:
        """See whether layers were replaced; what is pruned is zero, whatever wrote it."""
        look_(self, module)
        self.enforce()

    # -- its beginnings -----------------------------------------------------------------------------------------------

    def begin(self, trainer: Trainer, module: LightningModule, schedules_from: int) -> None:
        """Plan the rounds and start them, under the masks of an earlier fit where they belong to this module."""
        options = self.options
        plan = planning.begin(trainer, options, schedules_from)
        every = of_kind(options, module)  # what was pruned once and is not trained now: its masks hold all the same
        self.weights, masks, goes_on = start(self, every)
        before = self.state if goes_on else PruningState()
        weights = self.live()
        masks = masks.extended(weights).like(weights)
        if self.state.history:
            self.earlier = (*self.earlier, self.state.history)
        state = PruningState(
            masks,
            plan,
            units.companions(self, before.companions, masks),
            first_epoch=trainer.current_epoch,
            first_step=trainer.global_step,
            copies=before.copies,
        )
        state.others = others_of(self, masks.pruned)
        state = regrowth.started(self, trainer, module, state)
        checks.check_target(options, state, self.frozen(state), fewest(self.tensors(module, state.masks)))
        state.search = tolerance.begin(options, state)
        self.state, self.metrics = state, RoundMetrics()
        averages.find_(self, trainer, module, every)

    def resume(self, trainer: Trainer, module: LightningModule, packed: Mapping[str, Any]) -> None:
        """Go on where a checkpoint stands; the last round ends where training ends now."""
        before, options = self.state, self.options
        self.restore_state(module, packed)
        state, self.state = self.state, before  # until all is found to be right
        checks.check_changes(options, state, trainer.current_epoch, trainer.global_step, steps_of_epochs(trainer, 1))
        if options.changed("rewind_weights", state.options):
            state.first_weights = None
        self.replaced = state.reopen()
        state.plan = planning.with_new_end(trainer, state)
        if any(
            options.changed(key, state.options)
            for key in ("target_remaining", "target_of", "min_remaining", "min_per_unit")
        ):
            checks.check_target(options, state, self.frozen(state), fewest(self.tensors(module, state.masks)))
        state.search = tolerance.resume(options, state)
        self.state = state
        progress.tell_resumed(options, state)
        messages.tell_changes(options, state.options)
        messages.warn_of_lost(options, state)

    def restore_state(self, module: nn.Module, packed: Mapping[str, Any]) -> None:
        """Go on with the state of a checkpoint, once all of it is found to be right."""
        packed = SCHEMA.read(packed)
        masks, weights = packed["masks"].keys(), of_kind(self.options, module)
        left = packed.get("first_bits", {}).keys() - masks  # known then, and not pruned
        weights = {n: w for n, w in weights.items() if n in masks or (n in self.weights and n not in left)}
        state = PruningState.live(packed, module, {name: w.parameter.detach() for name, w in weights.items()})
        state = self.gathering.taken_up(self, module, state, weights)
        self.schedules.load(state.schedules)
        self.weights, self.state = weights, state
        state.others = others_of(self, masks)
        state.companions = units.companions(self, state.companions, MaskSet({}))
        self.subject.gradients.watch(state.trained)
        snapshots.watch(self)
        averages.bind_(self, module)
        self.metrics.load_state_dict(state.metrics)

    def packed(self, *, training: bool) -> dict[str, Any]:
        """The state as plain values; nothing is changed by it."""
        schedules = self.schedules.state() if training else self.state.schedules
        metrics = self.metrics.state_dict()
        return replace(self.state, schedules=schedules, metrics=metrics, options=self.options.plain()).pack()

    # -- its rounds ---------------------------------------------------------------------------------------------------

    def advance(
        self,
        trainer: Trainer,
        module: LightningModule,
        last_epoch: int,
        listeners: Sequence[RoundListener],
        beside: Beside,
    ) -> None:
        """Take the weights to rewind to when it is time, and prune if a round ended, its last epoch as given."""
        if self.state.plan.unit == "epoch" or self.state.is_due(trainer.current_epoch):
            check_trained(self, trainer, module)
        take_first_(self, module, trainer.current_epoch)
        if not self.state.is_due(trainer.current_epoch):
            return
        self.end_round(trainer, module, last_epoch, listeners)
        if self.state.pruning is None and planning.stops_now(trainer):
            return  # training ends with the batch that starts
        keeps = any(listener.may_take_back for listener in listeners)
        prune_(self, trainer, module, last_epoch, beside, keeps=keeps)

    def end_round(
        self, trainer: Trainer, module: LightningModule, last_epoch: int, listeners: Sequence[RoundListener]
    ) -> None:
        """Tell the listeners that the round has ended, note the answer and save the round, each once; a collective."""
        state = self.state
        look_(self, module)
        if state.answer is None:
            settle_(self, trainer, module)
            record = self.record(trainer, self.measure(module), last_epoch)
            event = RoundEnd(record, list(state.history))
            answer = ask(trainer, module, event, listeners, can_go_back=state.kept is not None)
            for round, fields in answer.notes.items():
                if round == state.round:
                    state.note = {**state.note, **fields}
                else:
                    state.history.note(round, **fields)
            stop = answer if isinstance(answer, Stop) else state.stop
            self.state = replace(state, answer=answer, stop=stop, search=tolerance.searched(state, listeners))
            if stop is not None and stop is answer:
                trainer.should_stop = True
        saving.save_round(trainer, self)

    def finish(
        self, trainer: Trainer, module: LightningModule, listeners: Sequence[RoundListener], beside: Beside
    ) -> None:
        """End the last round, where it was trained; go back if it is taken back, or another is the one to hand back."""
        state = self.state
        if state.steps == 0:
            if tolerance.holds_another(state):
                hand_back_(self, trainer, module, beside)
            return
        check_trained(self, trainer, module, is_over=True)
        trained = min(trainer.current_epoch - 1, state.epoch - (state.epoch_steps == 0))  # some epochs are cut off
        last_epoch, measure = max(state.first_epoch, trained), self.measure(module)
        self.end_round(trainer, module, last_epoch, listeners)  # unless it has ended as planned
        record = self.record(trainer, measure, last_epoch)
        taken_back = isinstance(state.answer, TakeBack) or tolerance.holds_another(state)
        state.history.append(replace(record, taken_back=taken_back))
        if taken_back:
            hand_back_(self, trainer, module, beside)
        if state.search is not None:
            dense = self.tensors(module, MaskSet.dense(self.live()))
            emptied.warn_of_empty_units(self.options, dense, state.masks)

    def adopt(self, trainer: Trainer, module: LightningModule, packed: Mapping[str, Any]) -> None:
        """Take up the state of a run that was over, and close its last round where that was not done."""
        self.restore_state(module, packed)
        if self.state.round not in [record.round for record in self.state.history]:
            self.finish(trainer, module, (), ())

    def restore_(self, module: LightningModule, weights: dict[str, Tensor], beside: Beside) -> None:
        """Write weights and buffers into the module, under the masks in force."""
        snapshots.restore_(self, module, weights)
        for session in (*beside, self):  # what is pruned now stays pruned, returning weights start from zero
            session.enforce()

    def record(self, trainer: Trainer, before: Measure, last_epoch: int) -> RoundRecord:
        """The round that ends now, as it was trained."""
        record = self.state.record(before, last_epoch, self.metrics.of(trainer, self.state.round))
        return replace(record, opened=regrowth.opened(self.options, self.state))

    # -- its steps ----------------------------------------------------------------------------------------------------

    def start_training(self, trainer: Trainer, module: LightningModule) -> None:
        """The masks hold from now on, in gradients that the module takes into its own hands too."""
        self.enforce()
        self.zero_kept_()
        if checks.writes_gradients(module):
            known = weakref.ref(trainer)
            self.watch_gradients(lambda: module.trainer is known())

    def end_training(self) -> None:
        """Leave schedules, layers and gradients alone."""
        self.schedules.close()
        self.gathering.close()
        self.leave_gradients()

    def zero_kept_(self) -> None:
        """Zero what the optimizers keep for what is pruned."""
        self.schedules.zero_pruned_(units.pruned_parameters(self, self.state))

    def begin_epoch(self, trainer: Trainer) -> None:
        """Count its steps, and tell its metrics from earlier ones."""
        if self.state.epoch != trainer.current_epoch:
            self.state.epoch, self.state.epoch_steps = trainer.current_epoch, 0
        self.metrics.begin(trainer)
