"""One run: which weights of a module are pruned, how far it is, and what its next pruning does. Knows no hooks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sap.callbacks.pruning import agreement, archive, checks, compatibility, messages
from lightning_sap.callbacks.pruning.options import Options
from lightning_sap.callbacks.pruning.schedules import Schedules, last_epoch
from lightning_sap.callbacks.pruning.state import PruningState
from lightning_sap.engine.decision import Decision, decide
from lightning_sap.engine.groups import Memory, PrunableTensor
from lightning_sap.engine.masks import MaskSet
from lightning_sap.engine.measure import Measure, summary, sums_of
from lightning_sap.engine.weights import PrunableWeight, parameter_names, prunable_weights
from lightning_sap.rewind import restore_weights_, take_weights
from lightning_sap.rounds.history import RoundRecord
from lightning_sap.rounds.plan import RoundPlan, plan_rounds


class PruningSession:
    """The state of a run, and the live weights that it is about; these are neither copied nor pickled."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.state = PruningState()
        self.weights: dict[str, PrunableWeight] = {}
        self._memories: dict[str, Memory] = {}
        self._stepped = False  # the first optimizer, in this round
        self._earlier: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the weights."""
        return {**vars(self), "weights": {}, "_memories": {}, "_earlier": {}}

    def forget_weights(self) -> None:
        """Let go of the module, and of what was seen of its fit."""
        self.weights, self._memories, self._earlier, self._stepped = {}, {}, {}, False

    # -- what is pruned -----------------------------------------------------------------------------------------------

    def select(self, module: nn.Module) -> dict[str, PrunableWeight]:
        """The prunable weights in the module's order; what was prunable once in this module stays so."""
        live = parameter_names(module)
        found = {name: weight for name, weight in self.weights.items() if live.get(name) is weight.parameter}
        found |= prunable_weights(module, self.options.include, self.options.exclude, may_be_none=bool(found))
        weights = {name: found[name] for name in live if name in found}
        checks.check_sharding(self.options, weights)
        return weights

    def live(self) -> dict[str, Tensor]:
        """The weights themselves."""
        return {name: weight.parameter.detach() for name, weight in self.weights.items()}

    def frozen(self) -> list[str]:
        """Those that are not trained now."""
        return [name for name, weight in self.weights.items() if not weight.parameter.requires_grad]

    def pieces(self, module: nn.Module) -> dict[str, PrunableTensor]:
        """The weights with their masks."""
        pruned, weights = self.state.masks.pruned, self.weights or self.select(module)
        return {
            name: PrunableTensor(
                w.parameter.detach(), pruned.get(name), w.units, self._memories.setdefault(name, Memory())
            )
            for name, w in weights.items()
        }

    # -- its beginnings -----------------------------------------------------------------------------------------------

    def begin(self, trainer: Trainer, module: LightningModule, schedules_from: int) -> None:
        """Plan the rounds and start them, under the masks of an earlier fit where they belong to this module."""
        options, masks, found = self.options, self.state.masks, dict(self.weights)
        plan = RoundPlan(0, 1)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            plan = replace(_plan(trainer, options), schedules_from=schedules_from)
            checks.check_plan(options, plan)
        if plan.rounds != 0:
            compatibility.check_averaging(trainer)
        self._take_in_frozen(module, masks)
        if masks.is_dense or not masks.holds_for(self.live()):
            if not masks.is_dense:
                rank_zero_warn(f"{options.name}: this module is not the one that was pruned before; starting afresh.")
            self.weights = found
            masks = (MaskSet.from_zeros if options.keep_zeros else MaskSet.dense)(self.live())
        weights = self.live()
        state = PruningState(masks.extended(weights).like(weights), plan, round_step=trainer.global_step)
        checks.check_target(options, state, self.frozen())
        self.state = state

    def resume(self, trainer: Trainer, module: LightningModule, packed: Mapping[str, Any]) -> None:
        """Go on where a checkpoint stands; the last round ends where training ends now."""
        before, options = self.state, self.options
        self.restore_state(module, packed)
        state, self.state = self.state, before  # until all is found to be right
        checks.check_changes(options, state, trainer.current_epoch, trainer.global_step)
        if options.changed("rewind_weights", state.options):
            state.first_weights = None
        state.reopen()
        if state.plan.last_epoch is not None and (trainer.max_epochs or -1) > 0:
            whole = state.plan.schedules_from == 0  # what steps an earlier fit took is not known
            state.plan = replace(state.plan, last_epoch=last_epoch(trainer, 0, 0) if whole else trainer.max_epochs)
        if options.changed("dirpath", state.options):
            state.folder = None
        if options.changed("target_remaining", state.options) or options.changed("min_remaining", state.options):
            checks.check_target(options, state, self.frozen())
        self.state = state
        messages.tell_changes(options, state.options)
        messages.warn_of_lost(options, state.plan)

    def open_archive(self, trainer: Trainer, wanted: bool, shared: str | None) -> None:
        """Where the rounds are saved: once chosen, that folder, as long as the options say the same."""
        state = self.state
        if not wanted or state.plan.rounds == 0:
            state.folder = None
        elif state.folder is None or not archive.can_save(trainer, state.folder):
            state.folder = shared or archive.choose_folder(trainer, self.options.dirpath)

    def restore_state(self, module: LightningModule, packed: Mapping[str, Any]) -> None:
        """Go on with the state of a checkpoint, placed where the module's tensors are."""
        state = PruningState.unpack(packed)
        self._take_in_frozen(module, state.masks)
        state.place(module, self.live())
        self.state = state

    def _take_in_frozen(self, module: nn.Module, masks: MaskSet) -> None:
        """Add what was pruned once and is frozen now: its masks hold all the same."""
        for name, parameter in parameter_names(module).items():
            if name in masks.pruned and name not in self.weights and not parameter.requires_grad:
                self.weights[name] = PrunableWeight(name, parameter)

    # -- its rounds ---------------------------------------------------------------------------------------------------

    def measure(self, module: nn.Module, masks: MaskSet | None = None) -> Measure:
        """Indices of the weights as they are, under the masks given or in force."""
        pieces, policy = self.pieces(module), self.options.policy
        if masks is not None:
            pieces = {name: piece._replace(pruned=masks.pruned[name]) for name, piece in pieces.items()}
        return summary(sums_of(pieces, policy.p, policy.q), policy.p, policy.q)

    def advance(
        self, trainer: Trainer, module: LightningModule, schedules: Schedules, beside: Sequence[PruningSession]
    ) -> None:
        """Take the weights to rewind to when it is time, and prune if a round ended."""
        state, epoch = self.state, trainer.current_epoch
        completed, wanted = epoch - state.plan.first_epoch, self.options.snapshot_epoch
        is_first_round = state.round == 0 and state.plan.rounds != 0
        if is_first_round and wanted is not None and completed >= wanted and state.first_weights is None:
            state.first_weights = take_weights(module)
        if state.plan.due(epoch) > state.round and self._stepped:
            checks.check_steps(trainer.global_step, state.round_step)
        if state.is_due(epoch, trainer.global_step):
            self.save_round(trainer)  # where a resumed run did not see its last epoch end
            self.prune_(trainer, module, schedules, beside)

    def prune_(
        self, trainer: Trainer, module: LightningModule, schedules: Schedules, beside: Sequence[PruningSession]
    ) -> None:
        """Measure, decide and pick; and only when all is known, mask and rewind."""
        state, started = self.state, time.perf_counter()
        step = self.decide(trainer, module)
        after = self.measure(module, step.masks)
        seconds = time.perf_counter() - started
        record = replace(
            self.record(trainer, step.before),
            pruned=step.count,
            pqi_pruned=after.overall,
            layers_pqi_pruned=after.layers,
            seconds=seconds,
        )
        messages.warn_of_dead(self.options, self.pieces(module), step.masks)
        # from here on things change
        self._mask_(module, step.masks, beside)
        compatibility.in_averages_(trainer, module, lambda: self._mask_(module, step.masks, beside))
        schedules.rewind_()
        if self.options.reset_optimizer:
            schedules.forget_()
        state.history.append(record)
        state.masks, state.count, state.pqi_after_pruning = step.masks, step.count, after.overall
        state.round, state.round_step, state.note, state.metrics = state.round + 1, trainer.global_step, {}, {}
        self._stepped = False
        if state.prunings_left() == 0:
            state.first_weights = None  # nothing goes back to them any more

    def _mask_(self, module: LightningModule, masks: MaskSet, beside: Sequence[PruningSession]) -> None:
        """Rewind the weights, where there are some to go back to, and mask them."""
        if self.state.first_weights is not None:
            restore_weights_(module, self.state.first_weights)
            for run in beside:  # it may have pruned what came back
                run.enforce()
        masks.apply_(self.live())

    def decide(self, trainer: Trainer, module: LightningModule) -> Decision:
        """What the next pruning does; nothing is changed but that newly unfrozen parameters join, dense."""
        options, state = self.options, self.state
        self.weights = self.select(module)
        checks.check_disjoint(options, trainer, module)
        state.masks = state.masks.extended(self.live())
        pieces, frozen = self.pieces(module), self.frozen()
        agreement.check_agreement(trainer, pieces)
        trained = {name: piece for name, piece in pieces.items() if name not in frozen}
        sizes = {name: piece.weight.numel() for name, piece in trained.items()}
        alive = sum(count for name, count in state.masks.survivors.items() if name in trained)
        limits = options.limits(sizes, alive, state.prunings_left(), self._target(frozen))
        step = decide(trained, policy=options.policy, scope=options.scope, round=state.round + 1, limits=limits)
        if frozen:  # they stay as they are, under their masks
            masks = MaskSet({name: step.masks.pruned.get(name, old) for name, old in state.masks.pruned.items()})
            step = replace(step, before=self.measure(module), masks=masks)
        return agreement.broadcast_decision(trainer, step, self.live())

    def _target(self, frozen: Sequence[str]) -> int | None:
        """How many of the trained weights survive at the end; None: that fraction of them, or no target."""
        options, masks = self.options, self.state.masks
        if options.target_remaining is None or not frozen:
            return None
        whole = options.target({name: mask.numel() for name, mask in masks.pruned.items()})
        left = whole - sum(masks.survivors[name] for name in frozen)
        trained = {name: mask.numel() for name, mask in masks.pruned.items() if name not in frozen}
        if left >= max(1, sum(options.floors(trained).values())):
            return left
        messages.warn_of_frozen(options, frozen)
        return None

    def record(self, trainer: Trainer, before: Measure) -> RoundRecord:
        """The round that ends now, as it was trained."""
        return self.state.record(before, trainer.current_epoch - 1, self.metrics(trainer))

    def save_round(self, trainer: Trainer) -> None:
        """Save the round that ends now, once, if that is asked for; a collective."""
        state = self.state
        if state.folder is not None and "path" not in state.note:
            before, path = state.note, archive.path_of(state.folder, self.options.name, state.round)
            state.note = {**before, "path": path}  # which the file says too
            try:
                trainer.save_checkpoint(path, weights_only=False)
            except BaseException:
                state.note = before
                raise
            archive.tidy(trainer, self.options, state.folder, state)

    # -- its steps ----------------------------------------------------------------------------------------------------

    def enforce(self, *_: Any) -> None:
        """After each real optimizer step: the pruned weights are zero again."""
        if not self.state.masks.is_dense:
            self.state.masks.apply_(self.live())

    def mask_gradients(self) -> None:
        """Pruned weights have no gradient."""
        if not self.state.masks.is_dense:
            gradients = {name: w.parameter.grad for name, w in self.weights.items() if w.parameter.grad is not None}
            self.state.masks.apply_(gradients)

    def record_lr(self, optimizer: Optimizer, *_: Any) -> None:
        """Keep the learning rate of this step: schedules move on before the round's record is made."""
        self._stepped = True
        if optimizer.param_groups:  # a module without optimizers gets one from Lightning that has none
            rate = optimizer.param_groups[0]["lr"]
            self.state.lr = rate.clone() if isinstance(rate, Tensor) else rate

    # -- its metrics --------------------------------------------------------------------------------------------------

    def metrics(self, trainer: Trainer) -> dict[str, float]:
        """Every metric logged in this round; after a resume Lightning does not know those of before, the state does."""
        state, known = self.state, trainer.callback_metrics
        stale = state.validation_keys if state.validated != state.round else []
        stale = [key for key in stale if known.get(key) is self._earlier.get(key)]  # not logged in training since
        return state.metrics | {key: float(value) for key, value in known.items() if key not in stale}

    def note_epoch(self, trainer: Trainer) -> None:
        """Remember the metrics with which an epoch begins: what is logged in it is another tensor."""
        self._earlier = dict(trainer.callback_metrics)

    def note_validation(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
        """Lightning keeps old metrics: remember which ones validation logs, and in which round it did."""
        logged = [key for key in after if key not in before or after[key] is not before[key]]
        self.state.validated = self.state.round
        self.state.validation_keys = sorted({*self.state.validation_keys, *logged})


def _plan(trainer: Trainer, options: Options) -> RoundPlan:
    """The rounds of a training that begins now; as many as fit where ``max_steps`` ends it before ``max_epochs``."""
    wanted = options.rounds, options.every_n_epochs, trainer.current_epoch
    plan = plan_rounds(trainer.max_epochs, *wanted)
    end = last_epoch(trainer, trainer.current_epoch, trainer.global_step)
    if end is None or end < 0:
        return plan
    if not plan.rounds or plan.start(plan.rounds) < end:
        return plan if plan.last_epoch is None else replace(plan, last_epoch=end)
    try:
        return plan_rounds(end, *wanted)
    except ValueError as error:
        raise ValueError(
            f"max_steps={trainer.max_steps} ends training in epoch {end - 1}; give more steps, or fewer or shorter "
            f"rounds. ({error})"
        ) from None
