"""One run: which weights of a module are pruned, how far it is, and what its next pruning does. Knows no hooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sap.callbacks.pruning import archive, checks, ranks
from lightning_sap.callbacks.pruning.options import Options
from lightning_sap.callbacks.pruning.rounds import RoundPlan
from lightning_sap.callbacks.pruning.state import RunState
from lightning_sap.history import RoundRecord
from lightning_sap.masks import MaskSet
from lightning_sap.pruner import Measure, Piece, Step, prune_step, summary, sums_of
from lightning_sap.sums import Memory
from lightning_sap.weights import PrunableWeight, parameter_names, prunable_weights


class Run:
    """The state of a run, and the live weights that it is about; these are neither copied nor pickled."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.state = RunState()
        self.weights: dict[str, PrunableWeight] = {}
        self._memories: dict[str, Memory] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the weights."""
        return {**vars(self), "weights": {}, "_memories": {}}

    def forget_weights(self) -> None:
        """Let go of the module."""
        self.weights, self._memories = {}, {}

    # -- what is pruned -----------------------------------------------------------------------------------------------

    def select(self, module: nn.Module) -> dict[str, PrunableWeight]:
        """The prunable weights in the module's order; what was prunable once in this module stays so."""
        live = parameter_names(module)
        found = {name: weight for name, weight in self.weights.items() if live.get(name) is weight.parameter}
        found |= prunable_weights(module, self.options.include, self.options.exclude)
        weights = {name: found[name] for name in live if name in found}
        checks.check_sharding(self.options, weights)
        return weights

    def live(self) -> dict[str, Tensor]:
        """The weights themselves."""
        return {name: weight.parameter.detach() for name, weight in self.weights.items()}

    def pieces(self, module: nn.Module) -> dict[str, Piece]:
        """The weights with their masks."""
        pruned, weights = self.state.masks.pruned, self.weights or self.select(module)
        return {
            name: Piece(w.parameter.detach(), pruned.get(name), w.units, self._memories.setdefault(name, Memory()))
            for name, w in weights.items()
        }

    # -- its beginnings -----------------------------------------------------------------------------------------------

    def begin(self, module: LightningModule, plan: RoundPlan, step: int) -> None:
        """Start the rounds, under the masks of an earlier fit where they belong to this module."""
        options, masks, found = self.options, self.state.masks, dict(self.weights)
        self._take_in_frozen(module, masks)
        if masks.is_dense or not masks.holds_for(self.live()):
            if not masks.is_dense:
                rank_zero_warn(f"{options.name}: this module is not the one that was pruned before; starting afresh.")
            self.weights = found
            masks = (MaskSet.from_zeros if options.keep_zeros else MaskSet.dense)(self.live())
        weights = self.live()
        self.state = RunState(masks.extended(weights).like(weights), plan, round_step=step)

    def take_up(self, module: LightningModule, packed: Mapping[str, Any]) -> None:
        """Go on with the state of a checkpoint, placed where the module's tensors are."""
        state = RunState.unpack(packed)
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

    def decide(self, trainer: Trainer, module: LightningModule) -> Step:
        """What the next pruning does; nothing is changed but that newly unfrozen parameters join, dense."""
        options, state = self.options, self.state
        self.weights = self.select(module)
        state.masks = state.masks.extended(self.live())
        sizes = {name: weight.parameter.numel() for name, weight in self.weights.items()}
        limits = options.limits(sizes, sum(state.masks.survivors.values()), state.prunings_left())
        pieces = self.pieces(module)
        ranks.check_agreement(trainer, pieces)
        step = prune_step(pieces, policy=options.policy, scope=options.scope, round=state.round + 1, limits=limits)
        return ranks.of_rank_zero(trainer, step, self.live())

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
            archive.remove_old(trainer, self.options, state)

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

    def note_rate(self, optimizer: Optimizer, *_: Any) -> None:
        """Keep the learning rate of this step: schedules move on before the round's record is made."""
        rate = optimizer.param_groups[0]["lr"]
        self.state.lr = rate.clone() if isinstance(rate, Tensor) else rate

    # -- its metrics --------------------------------------------------------------------------------------------------

    def metrics(self, trainer: Trainer) -> dict[str, float]:
        """Every metric logged in this round; after a resume Lightning does not know those of before, the state does."""
        state = self.state
        known = state.metrics | {key: float(value) for key, value in trainer.callback_metrics.items()}
        stale = state.validation_keys if state.validated != state.round else []
        return {key: value for key, value in known.items() if key not in stale}

    def note_validation(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
        """Lightning keeps old metrics: remember which ones validation logs, and in which round it did."""
        logged = [key for key in after if key not in before or after[key] is not before[key]]
        self.state.validated = self.state.round
        self.state.validation_keys = sorted({*self.state.validation_keys, *logged})
