"""HELD: the masks of a run, and the live weights that they hold; with a Trainer or without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sap.callbacks.pruning import averages, messages, snapshots, units
from lightning_sap.callbacks.pruning.first_masks import warn_of_zeros
from lightning_sap.callbacks.pruning.options import Options
from lightning_sap.callbacks.pruning.state import PruningState
from lightning_sap.callbacks.pruning.trained import Subject, select
from lightning_sap.engine.groups import Memory, PrunableTensor
from lightning_sap.engine.masks import MaskSet
from lightning_sap.engine.measure import Measure, summary, sums_of
from lightning_sap.engine.weights import PrunableWeight
from lightning_sap.policies.importance import check_importance
from lightning_sap.rewind import GradientHooks
from lightning_sap.sharding import is_sharded


class HeldWeights:
    """The state of a run, and the live weights that it is about; these are neither copied nor pickled."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.state = PruningState()
        self._importance = check_importance(options.importance)
        self.weights: dict[str, PrunableWeight] = {}
        self.subject = Subject()
        self._memories: dict[str, Memory] = {}
        self._gradients: GradientHooks | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what is live."""
        return {**vars(self), "weights": {}, "subject": Subject(), "_memories": {}, "_gradients": None}

    def let_go(self) -> None:
        """Let go of the module."""
        self.leave_gradients()
        self.weights, self.subject, self._memories = {}, Subject(), {}

    # -- what is pruned -----------------------------------------------------------------------------------------------

    def live(self) -> dict[str, Tensor]:
        """The weights themselves."""
        return {name: weight.parameter.detach() for name, weight in self.weights.items()}

    def tensors(self, module: nn.Module, masks: MaskSet | None = None) -> dict[str, PrunableTensor]:
        """The weights with their masks, those given or those in force."""
        pruned, weights = (masks or self.state.masks).pruned, self.weights or select(self.options, module, None)[0]
        return {
            name: PrunableTensor(
                w.parameter.detach(),
                pruned.get(name),
                w.units,
                self._memories.setdefault(name, Memory()),
                self._importance,
                w.floors(self.options.min_per_unit),
                w.layout,
            )
            for name, w in weights.items()
        }

    def measure(self, module: nn.Module, masks: MaskSet | None = None) -> Measure:
        """Indices of the weights as they are, under the masks given or in force."""
        policy = self.options.policy
        return summary(sums_of(self.tensors(module, masks), policy.p, policy.q), policy.p, policy.q)

    # -- its steps ----------------------------------------------------------------------------------------------------

    def enforce(self, *_: Any) -> None:
        """After each real optimizer step: the pruned weights are zero again."""
        if not self.state.masks.is_dense:
            units.mask_(self, self.state.masks, self.state.companions)
            averages.mask_(self, self.state.masks, self.state.companions)

    def watch_gradients(self, holds: Callable[[], bool] = lambda: True) -> None:
        """From now on, while that holds, gradients of pruned weights are zero where autograd computes them."""
        self.leave_gradients()

        def masked(name: str, gradient: Tensor) -> Tensor | None:
            masks = self.state.masks if name in self.weights else self.state.companions
            if holds() and is_sharded(gradient):
                masks.apply_({name: gradient})
                return None
            return masks.masked(name, gradient) if holds() else None

        self._gradients = GradientHooks(masked)
        self.watch_again()

    def watch_again(self) -> None:
        """Go on so with the parameters that the module has now."""
        if self._gradients is not None:
            self._gradients.watch(self.subject.parameters)

    def leave_gradients(self) -> None:
        """Leave gradients as they are."""
        if self._gradients is not None:
            self._gradients.remove()
            self._gradients = None

    def meet_gradients(self) -> None:
        """Note which weights have gradients, before each step; those of pruned weights are zero then."""
        self.subject.gradients.note(self.state.trained)
        snapshots.add_thawed(self)
        self.mask_gradients()

    def meet_step(self) -> None:
        """The same right before the step; told are zeros in the first one, and gradients that came past autograd."""
        if self.state.round == self.state.steps == 0 and self.state.masks.is_dense:
            warn_of_zeros(self.options, self.live())
        if self._gradients is not None and self.subject.looked != self.state.round:
            self.subject.looked = self.state.round
            messages.warn_of_written(self.options, units.unmasked_gradients(self))
        self.meet_gradients()

    def mask_gradients(self) -> None:
        """Pruned weights have no gradient, nor have their biases and norms."""
        units.mask_gradients(self)

    def count_step(self, *_: Any) -> None:
        """After each real optimizer step, of any optimizer."""
        self.state.steps += 1
        self.state.epoch_steps += 1

    def record_lr(self, optimizer: Optimizer, *_: Any) -> None:
        """Keep the learning rate of this step: schedules move on before the round's record is made."""
        if optimizer.param_groups:  # a module without optimizers gets one from Lightning that has none
            rate = optimizer.param_groups[0]["lr"]
            self.state.lr = rate.clone() if isinstance(rate, Tensor) else rate
