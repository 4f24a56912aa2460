"""Pruner: pruning in a training loop of one's own, with Lightning Fabric or without."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_sap.callbacks.fabric import unwrapped, unwrapped_optimizer, warn_of_masks_left_out, warn_of_silent_steps
from lightning_sap.callbacks.pruning import agreement, averages, checks, declared, layers, messages, snapshots, units
from lightning_sap.callbacks.pruning.decisions import decide_of
from lightning_sap.callbacks.pruning.emptied import warn_of_empty_units
from lightning_sap.callbacks.pruning.enforcement import hook_masks
from lightning_sap.callbacks.pruning.first_masks import afresh
from lightning_sap.callbacks.pruning.given_masks import check_given
from lightning_sap.callbacks.pruning.held import HeldWeights
from lightning_sap.callbacks.pruning.inventory import Plan, others_of, plan_of
from lightning_sap.callbacks.pruning.options import Options
from lightning_sap.callbacks.pruning.schema import check_tensors
from lightning_sap.callbacks.pruning.state import PruningState
from lightning_sap.callbacks.pruning.trained import select_of
from lightning_sap.callbacks.training import Training
from lightning_sap.engine.copies import averaged_copies
from lightning_sap.engine.decision import Decision
from lightning_sap.engine.floors import fewest
from lightning_sap.engine.groups import PrunableTensor
from lightning_sap.engine.masks import MaskSet
from lightning_sap.engine.weights import parameter_names
from lightning_sap.policies.base import Policy
from lightning_sap.pruner.inputs import (
    check_fresh,
    check_kind,
    check_names,
    check_options,
    check_shapes,
)
from lightning_sap.rewind import (
    OptimizerMemory,
    cannot_reset,
    fires_hooks,
    hook_steps,
    innermost_optimizers,
    live_tensors,
    place_weights,
    zero_pruned_,
)
from lightning_sap.rounds.history import History, RoundRecord
from lightning_sap.rounds.plan import RoundPlan
from lightning_sap.rounds.protocol import GoOn
from lightning_sap.sharding import is_sharded, reshard


class Pruner:
    """Prune in a training loop of your own: what :class:`PruningCallback` does to weights, without its Trainer.

    ``attach`` selects the weights and puts hooks on parameters and optimizers: pruned weights are zero after each step
    and when the module is saved, and have no gradients. ``prune``, between two rounds of your loop, prunes by the
    policy. Learning rate and schedules are your loop's.

    Args:
        policy: How many weights a group loses: :class:`SparsityInformed`, :class:`FixedFraction` or your own
            :class:`Policy`; it is told the number of the pruning, from 1 on.
        **options: Those of :class:`PruningCallback` that need no Trainer: ``scope``, ``structure``, ``example_inputs``,
            ``importance``, ``include``, ``exclude``, ``keep_zeros``, ``masks``, ``min_remaining``, ``min_per_unit``,
            ``reset_optimizer``, ``rewind_weights`` (None or ``"init"``), ``rounds``, ``target_remaining`` (beside
            ``rounds``) and ``target_of``, ``name``.

    Raises:
        ValueError: If an option is out of its range.
        TypeError: If the policy is none, or there is no option of that name.

    Source: Diao et al., ICLR 2023, Algorithm 1.

    Example:
        >>> import torch
        >>> from lightning_sap import FixedFraction, Pruner
        >>> net = torch.nn.Linear(8, 2, bias=False)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> pruner = Pruner(FixedFraction(0.5)).attach(net, sgd)
        >>> for _ in range(2):
        ...     net(torch.ones(1, 8)).square().sum().backward()
        ...     _ = sgd.step()
        ...     _ = pruner.prune()
        >>> int((net.weight != 0).sum())
        4
        >>> pruner.remaining
        0.25
    """

    def __init__(self, policy: Policy, **options: Any) -> None:
        check_names(options)
        check_given(options.get("masks"))
        self._run = HeldWeights(check_options(Options(policy, **options)))
        self._run.state.plan = RoundPlan(self.options.rounds, 1, unit="step")
        self._detached()

    def _detached(self) -> None:
        self._module: nn.Module | None = None
        self._optimizers: list[Optimizer] = []
        self._fresh: list[OptimizerMemory] = []
        self._hooks: list[RemovableHandle] = []
        self._replicated = False

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are attached to nothing."""
        return {"_run": self._run}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The masks and the history."""
        vars(self).update(state)
        self._detached()

    # -- what others may read -----------------------------------------------------------------------------------------

    @property
    def options(self) -> Options:
        """The policy and the options."""
        return self._run.options

    @property
    def masks(self) -> dict[str, Tensor]:
        """By prunable parameter a bool tensor, sharded as it is, True where a weight is kept; empty before attach."""
        return self._run.state.masks.kept

    @property
    def remaining(self) -> float:
        """Fraction of the prunable weights that is kept."""
        return self._run.state.masks.remaining

    @property
    def history(self) -> History:
        """One record for each round that ended with a pruning."""
        return self._run.state.history

    def plan(self) -> Plan:
        """What is pruned of each parameter of the module, and what is left out and why, with both shares.

        Returns:
            The plan: ``print`` shows it, ``markdown()`` gives it as a table.

        Raises:
            RuntimeError: If the pruner is not attached, or layers were replaced since.
        """
        return plan_of(self._run, self._live(), self._run.subject.training)

    # -- what a loop calls --------------------------------------------------------------------------------------------

    def attach(self, module: nn.Module, *optimizers: Optimizer) -> Pruner:
        """Select the prunable weights of a module, and hold the masks in its weights and gradients from now on.

        Call it again for another module, or after layers were replaced: masks stay where name and shape stay.

        Args:
            module: The module, as it is or wrapped by Fabric, DDP or ``torch.compile``. Of one that Fabric or DDP
                wraps, all processes call ``attach`` and ``prune``, and their weights are compared bit by bit.
            *optimizers: Those that train it, before their first step and before their state is loaded. Weights are
                prunable if they hold them. None: every weight that requires a gradient, and after each step you call
                ``hold_masks``.

        Returns:
            The pruner itself.

        Raises:
            ValueError: If there is nothing to prune, or an optimizer has taken steps and is to be reset.
        """
        self.detach()
        run, inner = self._run, unwrapped(module)
        check_kind(module)
        check_shapes(inner)
        optimizers = tuple(unwrapped_optimizer(each) for each in optimizers)
        if self.options.reset_optimizer:
            check_fresh(optimizers)
            messages.warn_of_lasting(self.options, list(filter(None, map(cannot_reset, optimizers))))
        reshard(inner)
        run.weights, run.subject = select_of(self.options, inner, Training.by(optimizers, inner), couples=True)
        run.subject.keepers = declared.keepers(inner)
        self._take_up(inner)
        self._module, self._optimizers = inner, list(optimizers)  # from here on it is attached
        self._fresh = [OptimizerMemory(each) for each in optimizers] if self.options.reset_optimizer else []
        several = inner is not module and agreement.place()[1] > 1
        self._replicated = several and not any(is_sharded(weight) for weight in run.live().values())
        layers.tell(self.options, inner, run.weights)
        self._hooks = hook_masks(inner, optimizers, run.enforce, run.meet_step, self.hold_masks)
        self._hooks += hook_steps(optimizers, run.count_step) + hook_steps(optimizers[:1], run.record_lr)
        run.watch_gradients()
        silent = [type(each).__name__ for each in innermost_optimizers(optimizers) if not fires_hooks(each)]
        warn_of_silent_steps(self.options, silent)
        return self

    def detach(self) -> None:
        """Leave the module and its optimizers alone; masks and history stay here."""
        for hook in self._hooks:
            hook.remove()
        self._run.let_go()
        self._detached()

    def prune(self, metrics: Mapping[str, float] | None = None) -> RoundRecord:
        """End a round: measure the kept weights, prune by the policy, reset the optimizers, rewind where asked for.

        Args:
            metrics: What is known of the round that ends, such as ``{"val_acc": 0.97}``: for the history, and for
                policies that look at it.

        Returns:
            The record of the round.

        Raises:
            RuntimeError: If the pruner is not attached, or its layers were replaced since.
            ValueError: If ``rounds`` prunings are done, kept weights are not finite, or processes hold other weights.
        """
        run, module, started = self._run, self._live(), time.perf_counter()
        state, metrics = run.state, {key: float(value) for key, value in (metrics or {}).items()}
        if state.prunings_left() == 0:
            raise ValueError(
                f"{self.options.name}: rounds={self.options.rounds} prunings are done. Give more rounds, or None for "
                "no end of them."
            )
        self.hold_masks()
        tensors = run.tensors(module)
        decision = self._decide(tensors, metrics)
        after = run.measure(module, decision.masks)
        messages.warn_of_short(self.options, decision)
        warn_of_empty_units(self.options, tensors, decision.masks)
        record = replace(
            state.record(decision.before, 0, metrics),
            last_step=state.first_step + state.steps - 1 if state.steps else None,
            pruned=decision.count,
            regrown=decision.regrown,
            pqi_pruned=after.overall,
            layers_pqi_pruned=after.layers,
        )
        self._carry_out(module, decision)
        record = replace(record, seconds=time.perf_counter() - started)
        run.state = self._following(decision, after.overall, record)
        run.mask_gradients()
        return record

    def hold_masks(self) -> None:
        """Set pruned weights to zero, whatever wrote them: after steps of which the pruner has no hook."""
        reshard(self._live())
        self._run.enforce()

    def mask_gradients(self) -> None:
        """Set the gradients of pruned weights to zero: before you clip those that autograd did not give the parameters.

        Such are the gradients of ``torch.func``, and of weights that FSDP2 shards.
        """
        self._live()
        self._run.mask_gradients()

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Masks (one bit per weight), round, history, weights to rewind to; a collective where weights are sharded."""
        return replace(self._run.state, options=self.options.plain()).pack()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state stands, before or after ``attach``; load the module's own weights besides.

        Raises:
            ValueError: If it is not the state of a pruner, a newer version wrote it, or it does not fit the module that
                is attached; nothing changes then.
        """
        run, before = self._run, self._run.state
        run.state = replace(PruningState.unpack(state), plan=RoundPlan(self.options.rounds, 1, unit="step"))
        try:
            if self._module is not None:
                self._take_up(self._module)
        except Exception:
            run.state = before
            raise

    # -- the parts of these -------------------------------------------------------------------------------------------

    def _take_up(self, module: nn.Module) -> None:
        """Hold the masks that there are in the live weights."""
        run, options = self._run, self.options
        state, weights, first = run.state, run.live(), run.state.first_weights
        if first is not None:
            check_tensors("first_weights", first, live_tensors(module))
            first = place_weights(module, first)
        if state.masks.total == 0:
            masks = afresh(options, run.weights)
        else:
            stays = {n: m for n, m in state.masks.pruned.items() if n in weights and weights[n].shape == m.shape}
            warn_of_masks_left_out(options, [name for name in state.masks.pruned if name not in stays])
            masks = MaskSet(stays).matched(weights).like(weights)
        if first is None and options.rewind_weights is not None and state.round == 0:
            averages.note_bits_(run, {n: p for n, p in run.subject.parameters.items() if averages.is_matrix(p)})
            first = snapshots.take(run, module)
        companions = units.companions(run, state.companions, masks)
        copies = averaged_copies(module, run.weights)
        run.state = replace(state, masks=masks, companions=companions, copies=copies, first_weights=first)
        run.state.others = others_of(run, masks.pruned)
        checks.check_target(options, run.state, (), fewest(run.tensors(module)))
        averages.bind_(run, module)
        reshard(module)
        run.enforce()

    def _decide(self, tensors: Mapping[str, PrunableTensor], metrics: Mapping[str, float]) -> Decision:
        run = self._run
        training = Training.by(self._optimizers, self._live())
        frozen = [name for name, weight in run.weights.items() if training.untrained(weight.parameter)]
        if self._replicated:
            agreement.check_same(tensors)
        decision = decide_of(run, tensors, frozen, GoOn(), metrics)
        if frozen:
            decision = replace(decision, before=run.measure(self._live()))
        return agreement.of_rank_zero(decision, run.live()) if self._replicated else decision

    def _carry_out(self, module: nn.Module, decision: Decision) -> None:
        """Mask and rewind."""
        run = self._run
        if run.state.first_weights is not None:
            snapshots.restore_(run, module, run.state.first_weights)
            run.enforce()  # weights that come back start from zero
        units.mask_(run, decision.masks, decision.companions)
        averages.mask_(run, decision.masks, decision.companions)
        for memory in self._fresh:
            memory.reset_()
        if not self._fresh:
            zero_pruned_(self._optimizers, units.pruned_parameters(run, run.state))

    def _following(self, decision: Decision, pqi: float, record: RoundRecord) -> PruningState:
        """The state in which the next round starts."""
        run = self._run
        following = run.state.next_round(decision, pqi, record, 0)
        if following.prunings_left() == 0:
            following.first_weights = None  # nothing goes back to them any more
        zero_pruned_(self._optimizers, units.pruned_parameters(run, following))
        return following

    def _live(self) -> nn.Module:
        """The module, if its parameters are those that the pruner holds."""
        if self._module is None:
            raise RuntimeError(
                f"{self.options.name}: the pruner is attached to no module; call attach(module, optimizer)."
            )
        live, known = parameter_names(self._module), self._run.subject.parameters
        if changed := [name for name in known if live.get(name) is not known[name]]:
            raise RuntimeError(
                f"{self.options.name}: these parameters were replaced since attach: {messages.listed(changed)}. Call "
                "attach again, with the optimizers that hold the new ones."
            )
        return self._module
