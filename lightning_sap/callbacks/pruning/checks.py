"""What a user's mistake gets: what cannot work is refused before training starts."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_sap.callbacks.logging import log_line
from lightning_sap.callbacks.pruning.options import Options
from lightning_sap.callbacks.pruning.schema import check_answer
from lightning_sap.callbacks.pruning.state import PruningState
from lightning_sap.engine.effective import pruned_by_torch
from lightning_sap.engine.measure import Measure, check_finite
from lightning_sap.engine.weights import PrunableWeight
from lightning_sap.policies.regrowth import GrowAndPrune
from lightning_sap.rounds.plan import WORDS, RoundPlan
from lightning_sap.rounds.protocol import GoOn, RoundListener, Stop, TakeBack
from lightning_sap.schema import MismatchError
from lightning_sap.sharding import ALTERNATIVE, check_placements, is_sharded

STATE_PREFIX = "lightning_sap/"
SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy")


def check_strategy(trainer: Trainer) -> None:
    """Raise for strategies whose way to shard the weights hides which is which."""
    kinds = [kind.__name__ for kind in type(trainer.strategy).__mro__]
    for name in SHARDED:
        if name in kinds:
            raise ValueError(
                f"Pruning does not work with {name}, which flattens or splits the weights in its own way. {ALTERNATIVE}"
            )


def check_torch_pruning(module: nn.Module) -> None:
    """Raise where ``torch.nn.utils.prune`` is still at work: it writes each weight anew before the forward."""
    if found := list(pruned_by_torch(module)):
        calls = [
            f"prune.remove({f'module.get_submodule({path!r})' if path else 'module'}, {name!r})" for path, name in found
        ]
        raise ValueError(
            f"torch.nn.utils.prune is still at work in {len(found)} tensors of the module: the parameter `..._orig` is "
            "not what the layer uses. Make its pruning permanent before fit, by "
            f"{'; '.join(calls)}; with keep_zeros=True its zeros count as pruned."
        )


def check_pattern(
    options: Options, prunable: Mapping[str, PrunableWeight], fitting: Mapping[str, PrunableWeight]
) -> None:
    """Raise if the pattern that is asked for fits no weight, and warn of those that it does not fit."""
    if options.pattern is None:
        return
    others = {name: tuple(weight.parameter.shape) for name, weight in prunable.items() if name not in fitting}
    normed = any(prunable[name].normalised is not None for name in others)
    empty = ", or an input that is divided by its norm would be left without a weight" if normed else ""
    of = f"the number of inputs is no multiple of {options.pattern.of}{empty}: {others}"
    if not fitting:
        raise ValueError(f"structure={options.structure!r} fits no prunable weight: {of}. Give another n:m.")
    if others:
        rank_zero_warn(
            f"{options.name}: structure={options.structure!r} does not fit these weights, which stay dense, since "
            f"{of}. Leave them out with exclude={list(others)!r}."
        )


def check_lazy(options: Options, names: Sequence[str]) -> None:
    """Say when parameters without a shape are pruned; raise where that would be too late."""
    if not names:
        return
    if options.structure == "unit":
        raise ValueError(
            f"structure='unit' needs the shapes of all layers, and {names} have none before the first batch. Pass a "
            "batch through the module before fit."
        )
    log_line(
        f"{options.name}: {', '.join(names)} have no shape before the first batch. Those that are prunable join when "
        "the first round ends. To see them in the plan, pass a batch through the module before fit."
    )


def check_sharding(options: Options, weights: dict[str, PrunableWeight]) -> None:
    """Raise for weights that are sharded in another way than by rows, and for units that are no rows."""
    check_placements({name: weight.parameter for name, weight in weights.items()})
    transposed = [n for n, weight in weights.items() if weight.transposed_groups and is_sharded(weight.parameter)]
    if options.scope == "neuron" and transposed:
        raise ValueError(
            f"In scope 'neuron', the output units of {transposed} lie on axis 1 and are spread over the processes that "
            "shard them. Use scope='layer' or 'global', leave them out with `exclude`, or use strategy='ddp'."
        )
    sharded = [name for name, weight in weights.items() if is_sharded(weight.parameter)]
    if options.structure == "unit" and sharded:
        raise ValueError(
            f"structure='unit' does not prune sharded weights, such as {sharded[0]!r}. Use strategy='ddp', or "
            "structure='weight'."
        )
    if options.pattern is not None and transposed:
        raise ValueError(
            f"structure={options.structure!r} runs along the inputs of {transposed}, which lie on axis 0 and are "
            "spread over the processes that shard them. Leave them out with `exclude`, or use strategy='ddp'."
        )


def check_distinct_names(trainer: Trainer) -> None:
    """Raise if two callbacks share a state key: Lightning looks only at those that its Trainer was made with."""
    keys = [callback.state_key for callback in trainer.callbacks]  # type: ignore[attr-defined]
    for key in keys:
        if key.startswith("lightning_sap") and keys.count(key) > 1:
            name = key.partition("/")[2]
            raise ValueError(
                f"Two callbacks of the Trainer have the name {name!r}, under which a checkpoint holds one state. "
                f"Give one of them another, such as name={name + '2'!r}."
            )


def check_disjoint(options: Options, trainer: Trainer) -> None:
    """Raise if two pruning callbacks of the Trainer prune one of the same parameters, or share a name."""
    check_distinct_names(trainer)
    owner: dict[int, str] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        other, session = getattr(callback, "options", None), getattr(callback, "session", None)
        if not isinstance(other, Options) or session is None:
            continue
        for weight in session.weights.values():
            first = owner.setdefault(id(weight.parameter), other.name)
            if first != other.name and options.name in (first, other.name):
                raise ValueError(
                    f"The callbacks {first!r} and {other.name!r} both prune {weight.name!r}. "
                    "Give each its own part of the model with include and exclude."
                )


def check_plan(options: Options, plan: RoundPlan, steps_of_epoch: int | None) -> None:
    """Raise if an option does not fit the rounds."""
    k, epochs = options.snapshot_epoch, plan.planned(0)
    if plan.unit == "step":
        epochs = plan.planned(0) // steps_of_epoch if steps_of_epoch else 0
    if k is not None and plan.rounds != 0 and k > epochs:
        known = plan.unit == "epoch" or steps_of_epoch
        raise ValueError(
            f"rewind_weights={k} lies beyond the first round, which has {epochs} epochs; give at most {epochs}, or a "
            f"longer round with {WORDS[plan.unit].every}."
            if known
            else f"rewind_weights={k} counts epochs, and how many of them a round of {plan.planned(0)} steps takes is "
            "not known beforehand; give rewind_weights='init', or rounds in epochs."
        )
    if options.target_remaining is not None and not plan.rounds and not (options.tolerance and plan.rounds is None):
        number = "not known beforehand" if plan.rounds is None else "0"
        raise ValueError(
            f"target_remaining={options.target_remaining} cannot be reached: the number of prunings is {number}. "
            "Give rounds, or max_epochs for at least two rounds."
        )


def check_changes(
    options: Options, state: PruningState, epoch: int, global_step: int, steps_of_epoch: int | None
) -> None:
    """Raise if a resumed run is to go back to weights that are gone."""
    k, old = options.snapshot_epoch, state.options
    if k is None or not options.changed("rewind_weights", old) or state.plan.rounds == 0 or state.prunings_left() == 0:
        return
    check_plan(options, state.plan, steps_of_epoch)
    if state.round > 0 or epoch - state.first_epoch >= k < global_step:
        raise ValueError(
            f"rewind_weights={options.rewind_weights} needs weights that are gone: those after {k} epochs, and the "
            f"checkpoint was saved with rewind_weights={old['rewind_weights']}. Give that, or None to go on with the "
            "weights as they are."
        )


def check_target(
    options: Options, state: PruningState, frozen: Collection[str], stay: Mapping[str, int] | None = None
) -> None:
    """Raise if the target cannot be met exactly by what is left of the run; of each weight so many stay always."""
    if options.target_remaining is None or not state.plan.rounds:
        return
    kept, sizes = state.masks.survivors, {name: mask.numel() for name, mask in state.masks.pruned.items()}
    target, total = options.target(sizes, state.others), sum(kept.values())
    held, trained = sum(kept[name] for name in frozen), {n: size for n, size in sizes.items() if n not in frozen}
    floors, one = options.floors(trained), min(1, total - held)
    least = max(one, sum(floors.values()))
    always = max(one, sum(max(n, (stay or {}).get(name, 0)) for name, n in floors.items()))
    found = {
        f"{held} of frozen parameters stay": bool(frozen) and held + least > target,
        f"{held + always} stay at least: one in each row that is divided by its norm, and min_per_unit="
        f"{options.min_per_unit} in each output unit": always > least and held + always > target,
        f"{held + least} stay at least": options.target_of == "model" and held + least > target,
        f"only {total} survive already": total < target,
        "there are no prunings left": state.prunings_left() == 0 and total != target,
    }
    if reasons := [reason for reason, holds in found.items() if holds]:
        beside = f" beside {state.others} that are trained and left out" if options.target_of == "model" else ""
        cure = (
            "the policy a larger `remaining`"
            if isinstance(options.policy, GrowAndPrune)
            else "another target_remaining or None"
        )
        raise ValueError(
            f"target_remaining={options.target_remaining} cannot be met: that is {target} of {sum(sizes.values())} "
            f"weights{beside}, and {reasons[0]}. Give {cure}."
        )


def check_restoring(options: Options, listeners: Collection[RoundListener]) -> None:
    """Raise if a listener may ask for a round that is not saved."""
    if options.save_rounds is False and any(listener.may_restore for listener in listeners):
        raise ValueError(
            "PQIMonitor(restore=True) goes back to a round that was saved, and save_rounds=False saves none; leave "
            "save_rounds out, or give restore=False."
        )


def check_tolerance(options: Options, trainer: Trainer) -> None:
    """Raise if more than one callback may take rounds back: each would go back to weights that the other left."""
    if options.tolerance is None:
        return
    others = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        other = getattr(callback, "options", None)
        searches = isinstance(other, Options) and other is not options and other.tolerance is not None
        if searches or (isinstance(callback, RoundListener) and callback.may_take_back):
            others.append(callback)
    if others:
        raise ValueError(
            f"{options.name} has a tolerance, and {type(others[0]).__name__} may take rounds back too: only one "
            "callback of a Trainer can. Leave the tolerance out of one of them, or set may_take_back = False on the "
            "listener."
        )


def check_answers(answers: Collection[object], can_go_back: bool) -> None:
    """Raise for what is no answer to the end of a round, and if there is no round to go back to."""
    for answer in answers:
        if not isinstance(answer, GoOn | Stop | TakeBack):
            raise TypeError(f"on_round_end must return GoOn(), Stop() or TakeBack(), got {answer!r}.")
        try:
            check_answer(answer)
        except MismatchError as mismatch:
            what = f"{type(answer).__name__}{mismatch.path}"
            raise ValueError(f"{what}, which a listener answers in on_round_end, {mismatch.text}.") from None
        if isinstance(answer, TakeBack) and not can_go_back:
            raise ValueError(
                "A listener takes a round back, and no earlier round was kept. Set may_take_back = True on the "
                "listener, and answer GoOn() to the first round."
            )


def check_ending(trainer: Trainer, measure: Measure) -> None:
    """Raise on all ranks if training came to its end with weights that are not finite on one; a collective."""
    finite = all(map(math.isfinite, measure.layers.values()))
    if trainer.strategy.reduce_boolean_decision(not finite, all=False):
        if not trainer.should_stop:
            check_finite(measure)
            raise ValueError("Weights of another rank are not finite.")
        rank_zero_warn("Training was stopped with weights that are not finite.")


def state_key(name: str) -> str:
    """Where a checkpoint keeps the state of the callback of that name."""
    return f"{STATE_PREFIX}{name}"


def check_state_name(name: str, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Raise if the checkpoint holds pruning state, but under a name that no callback of the Trainer has."""
    stored = [key for key in checkpoint.get("callbacks", {}) if key.startswith(STATE_PREFIX)]
    present = {other.state_key for other in trainer.callbacks}  # type: ignore[attr-defined]
    orphans = [key.removeprefix(STATE_PREFIX) for key in stored if key not in present]
    if orphans and state_key(name) in stored:
        rank_zero_warn(
            f"{name}: the checkpoint also holds pruning state named {orphans}, which no callback takes up: what was "
            "pruned by it can grow again."
        )
    elif orphans:
        raise ValueError(
            f"The checkpoint holds pruning state named {orphans}, but this callback is named {name!r}. "
            f"Give name={orphans[0]!r} to go on with it."
        )


def check_resumable(name: str, checkpoint: dict[str, Any]) -> None:
    """Raise if the checkpoint is a round of which weights and masks alone were kept."""
    options = checkpoint.get("callbacks", {}).get(state_key(name), {}).get("options", {})
    if "loops" not in checkpoint and options.get("save_rounds") == "weights":
        raise ValueError(
            f"{name}: the checkpoint is a round that was kept with save_rounds='weights', and no training goes on from "
            "it. Resume from a file of ModelCheckpoint; or start anew from its weights: "
            "module.load_state_dict(torch.load(path)['state_dict']), and masks=path for its masks."
        )


def clips_gradients(trainer: Trainer, module: LightningModule) -> bool:
    """Whether gradients may be clipped before the step, by the Trainer or by the module's own hooks."""
    own = overrides(module, "configure_gradient_clipping") or overrides(module, "on_before_optimizer_step")
    return own or bool(trainer.gradient_clip_val)


def writes_gradients(module: LightningModule) -> bool:
    """Whether the module may write gradients by hand, or look at them, before the callbacks can mask them."""
    hooks = ("backward", "on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping")
    return not module.automatic_optimization or any(overrides(module, hook) for hook in hooks)


def overrides(module: LightningModule, hook: str) -> bool:
    """Whether the module has a hook of its own."""
    return getattr(type(module), hook) is not getattr(LightningModule, hook)
