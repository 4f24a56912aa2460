"""What a run says of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_sap.callbacks.logging import log_line
from lightning_sap.callbacks.pruning.inventory import Plan
from lightning_sap.callbacks.pruning.options import OF_THE_PLAN, Options
from lightning_sap.callbacks.pruning.state import PruningState
from lightning_sap.engine.decision import Decision
from lightning_sap.engine.weights import COMPLEX, LOSES_ZEROS
from lightning_sap.rounds.plan import WORDS, RoundPlan
from lightning_sap.rounds.search import Tolerance


def announcement(
    options: Options,
    state: PruningState,
    schedules: list[str],
    outside: Mapping[str, int] | None = None,
    archive: str | None = None,
    inventory: Plan | None = None,
) -> str:
    """What a run is going to do, in one line for each question."""
    plan, masks = state.plan, state.masks
    rounds = "prunings after every round" if plan.rounds is None else counted(plan.rounds, "pruning")
    rewind = "kept" if options.rewind_weights is None else f"rewound to {options.rewind_weights!r}"
    lines = [
        f"{options.name}: {rounds} in rounds of {counted(plan.length, plan.unit)} from {plan.unit} {plan.first}, "
        f"{_dense(plan)}{_amounts(options)}, weights {rewind}, {options.policy}",
        f"  prunable: {masks.total:,} weights ({masks.remaining:.1%} remain){_of_all(inventory)} in "
        f"{listed(list(masks.pruned))}",
        *_left_out(inventory),
        *([] if options.tolerance is None else [f"  tolerance: {_tolerated(options.tolerance)}"]),
        *([f"  not prunable: {_sized(outside)}, which no optimizer holds"] if outside else []),
        *(f"  learning rate: {line}" for line in schedules),
        *([] if archive is None else [f"  archive: {archive}"]),
    ]
    return "\n".join(lines)


def _of_all(inventory: Plan | None) -> str:
    """How much of all that is trained is prunable."""
    if inventory is None:
        return ""
    share, rest = inventory.prunable / max(1, inventory.trained), inventory.remaining_of_trained
    return f", {share:.1%} of the {inventory.trained:,} that are trained ({rest:.1%} remain),"


def _left_out(inventory: Plan | None) -> list[str]:
    """The largest trained parameters that are left out, and why."""
    left = [] if inventory is None else [f"{row.name} ({row.how})" for row in inventory.largest_left_out]
    return [f"  left out: {'; '.join(left)}; plan() of the callback has them all"] if left else []


def _amounts(options: Options) -> str:
    """What says how many go, in words."""
    kept = options.pattern
    if kept is None:
        by = "" if options.importance == "magnitude" else f", scored by {options.importance}"
        return f"scope {options.scope}{', whole units' if options.structure == 'unit' else ''}{by}"
    return f"structure {options.structure} (each {kept.of} weights keep {kept.kept}, whatever the policy says)"


def above_target(options: Options, state: PruningState) -> int:
    """By how many weights more than the target are left; below 0 where fewer are."""
    aim = options.target({name: mask.numel() for name, mask in state.masks.pruned.items()}, state.others)
    return sum(state.masks.survivors.values()) - aim


def closeness(options: Options, state: PruningState) -> str:
    """How closely a target is met by whole units, in words; nothing where it is met exactly."""
    above = above_target(options, state)
    if options.structure != "unit" or above == 0:
        return ""
    return f" as closely as whole units allow, {abs(above):,} weights {'above' if above > 0 else 'below'} it"


def _dense(plan: RoundPlan) -> str:
    return "" if plan.dense in (None, plan.length) else f"the dense one {counted(plan.planned(0), plan.unit)}, "


def _tolerated(tolerance: Tolerance) -> str:
    """What a round is held against, in words."""
    side, than = ("below", "larger") if tolerance.better == "max" else ("above", "smaller")
    known = tolerance.reference
    yardstick = "the best sound round" if known is None else f"the reference {known:.4g}"
    return f"{tolerance.monitor}, better when {than}, at most {tolerance.drop:g} {side} {yardstick}"


def tell_changes(options: Options, stored: Mapping[str, str]) -> None:
    """Say which options are not those of the checkpoint, and what becomes of them."""
    new = options.plain()
    changed = [key for key in stored if key in new and options.changed(key, stored)]
    later = [f"{key}={new[key]} (was {stored[key]})" for key in changed if key not in OF_THE_PLAN]
    never = [f"{key}={stored[key]} (not {new[key]})" for key in changed if key in OF_THE_PLAN]
    if later:
        log_line(f"{options.name}: changed since the checkpoint, from the next round on: {', '.join(later)}")
    if never:
        log_line(f"{options.name}: a run that is resumed keeps the checkpoint's {', '.join(never)}")


def warn_of_short(options: Options, decision: Decision) -> None:
    """Warn of a pruning that takes less than was asked for, since some weights always stay."""
    if decision.short > 0:
        rank_zero_warn(
            f"{options.name}: {decision.count:,} weights are pruned where {decision.count + decision.short:,} were "
            "asked: each row that its layer divides by its norm keeps a weight, and each output unit "
            f"{options.min_per_unit} (min_per_unit). Ask for less, exclude narrow layers, or lower min_per_unit."
        )


def warn_of_lost(options: Options, state: PruningState) -> None:
    """Warn that a run that is resumed with an earlier end does not come to all of its prunings."""
    plan, lost = state.plan, state.prunings_lost()
    if plan.rounds is not None and lost > 0:
        missed = "" if options.target_remaining is None else f", and misses target_remaining={options.target_remaining}"
        rank_zero_warn(
            f"{options.name}: training now ends before {lost} of the {counted(plan.rounds, 'pruning')} planned"
            f"{missed}. For all of them it takes {WORDS[plan.unit].limit}={state.end_needed()} or more, and steps to "
            "match."
        )


def warn_of_frozen(options: Options, frozen: Sequence[str]) -> None:
    """Warn that weights that were not trained hold more than the target, which is met by the others only."""
    rank_zero_warn(
        f"{options.name}: not trained in this round, and pruned no further: {listed(list(frozen))}. These hold more "
        f"than target_remaining={options.target_remaining} leaves, which is met by the other weights alone."
    )


def warn_of_adapters(options: Options, adapters: list[str]) -> None:
    """Warn of low-rank adapters that are going to be pruned."""
    if adapters:
        named_alike = all("lora_" in name for name in adapters)
        rank_zero_warn(
            f"{options.name}: these look like low-rank adapters of frozen weights: {listed(adapters)}. Pruning them "
            "saves little: they are small, and their product, and so the merged weight, stays dense. Leave them out "
            f"with exclude={'*lora_*' if named_alike else adapters!r}, or merge them first and prune the merged model."
        )


def warn_of_left_out(options: Options, reasons: Mapping[str, str]) -> None:
    """Warn of what is selected and cannot be pruned, and say what to do."""
    complex_ones = [name for name, reason in reasons.items() if reason == COMPLEX]
    if complex_ones:
        rank_zero_warn(
            f"{options.name}: these are complex, and are not pruned: {listed(complex_ones)}. Hold real and imaginary "
            f"parts as two real parameters to prune them, or leave them out with exclude={complex_ones!r}."
        )
    losing = [name for name, reason in reasons.items() if reason == LOSES_ZEROS]
    if own := [name for name in losing if "parametrizations." not in name]:
        rank_zero_warn(
            f"{options.name}: these layers make another weight of the parameter in their forward, as weight "
            f"standardization does; a zero in it is none there, and they are not pruned: {listed(own)}. Leave them out "
            f"with exclude={own!r}, or take layers that compute with the parameter."
        )
    hosts = {name: name.partition("parametrizations.") for name in losing if name not in own}
    if hosts:
        cures = "; ".join(
            f"parametrize.remove_parametrizations(module.get_submodule({host.rstrip('.')!r}), {rest.split('.')[0]!r})"
            for host, _, rest in hosts.values()
        )
        rank_zero_warn(
            f"{options.name}: these are parametrized such that a zero in them is none in the weight that the layer "
            f"uses, and are not pruned: {listed(list(hosts))}. Call {cures} before fit to prune the weight itself, or "
            f"leave them out with exclude={list(hosts)!r}."
        )


def warn_of_silence(options: Options) -> None:
    """Warn that nothing is logged by a Trainer in barebones mode."""
    keys = ", ".join(f"{options.name}/{key}" for key in ("round", "remaining", "pruned"))
    rank_zero_warn(
        f"{options.name}: Trainer(barebones=True) silences logging: {keys} reach no logger and no callback, and the "
        "history has no logged metrics; masks, rounds and the rest of the history are kept all the same."
    )


def warn_of_lasting(options: Options, reasons: Sequence[str]) -> None:
    """Say which optimizers cannot be made fresh, where that is asked for."""
    if reasons and options.reset_optimizer:
        rank_zero_warn(
            f"{options.name}: reset_optimizer=True cannot make all of the optimizer fresh: {'; '.join(reasons)}. Keep "
            "them in `optimizer.state`, or give reset_optimizer=False."
        )


def warn_of_mixed(options: Options, reasons: Sequence[str]) -> None:
    """Say which optimizers go on with what they keep of weights that are pruned."""
    if reasons:
        rank_zero_warn(
            f"{options.name}: {'; '.join(reasons)}, so that what it keeps of pruned weights stays in it. The weights "
            "are zero all the same. Give reset_optimizer=True to start every round without it."
        )


def tell_settled(options: Options, joined: Mapping[str, int], left: Mapping[str, int]) -> None:
    """Say which weights are prunable from now on, and which were not trained; by name their sizes."""
    if joined:
        log_line(f"{options.name}: trained for the first time, and prunable from now on: {_sized(joined)}.")
    if left:
        log_line(
            f"{options.name}: an optimizer holds these, and they had no gradient in the first round: {_sized(left)}. "
            "They are left out until they have one."
        )


def warn_of_no_training(options: Options, trainer: Trainer) -> None:
    """Warn of a fit in which Lightning trained no batch."""
    why = f"epoch {trainer.current_epoch} and step {trainer.global_step} are where training is to end"
    if trainer.limit_train_batches == 0:
        why = "limit_train_batches=0"
    elif trainer.num_training_batches == 0:
        why = "the training data have no batch"
    rank_zero_warn(
        f"{options.name}: nothing was pruned, as no batch was trained: {why}. Give Trainer(max_epochs=...), "
        "limit_train_batches and data that train at least one."
    )


def warn_of_no_optimizer(options: Options) -> None:
    """Warn where nothing is trained between the prunings."""
    rank_zero_warn(
        f"{options.name}: no optimizer of configure_optimizers holds a parameter: the weights are pruned as they are, "
        "and nothing is trained in between. Return an optimizer of them from configure_optimizers."
    )


def warn_of_unmatched(options: Options, names: Sequence[str]) -> None:
    """Warn of averages that average nothing of the module."""
    if names:
        rank_zero_warn(
            f"{options.name}: these are averages, and what they average was not found in the module: "
            f"{listed(list(names))}. They stay dense. Hold the average and what it averages in one module, with "
            "layers of the same names and shapes."
        )


def warn_of_moved(options: Options, names: Sequence[str]) -> None:
    """Warn of weights that change and are not trained."""
    if names:
        rank_zero_warn(
            f"{options.name}: these weights change without a gradient: {listed(list(names))}. They stay dense. If "
            "they average others, start them as exact copies, which then share the masks of what they average; if they "
            "are trained, add them to an optimizer of configure_optimizers."
        )


def warn_of_hidden(options: Options, found: Mapping[str, str]) -> None:
    """Warn of what changes as an average does and is no parameter or buffer of the module."""
    if found:
        pairs = [f"{copy} (of {name})" for copy, name in found.items()]
        rank_zero_warn(
            f"{options.name}: these began as copies of pruned weights, changed since, and are no parameters or buffers "
            f"of the module: {listed(pairs)}. They stay dense. If they are averages that you are going to use, make "
            "them a submodule (self.average = AveragedModel(net)), or give them by a method averaged_weights(), so "
            "that they share the masks; or multiply each by the callback's masks[name]."
        )


def warn_of_written(options: Options, names: Sequence[str]) -> None:
    """Warn of gradients of pruned weights that autograd did not compute of the parameters themselves."""
    if names:
        rank_zero_warn(
            f"{options.name}: the gradients of these were written by hand, and are not zero where the weights are "
            f"pruned: {listed(list(names))}. They are made zero right before the step, but count in a norm that is "
            "taken before. If you clip by norm, multiply each by masks[name] first."
        )


def warn_of_replaced(options: Options, dense: Mapping[str, int], gone: Sequence[str]) -> None:
    """Warn of masks that are given up, as their weights were replaced or are no more."""
    if dense:
        rank_zero_warn(
            f"{options.name}: these were replaced while training goes on: {_sized(dense)}. The new weights join dense, "
            "and are not rewound."
        )
    if gone:
        rank_zero_warn(
            f"{options.name}: these are no longer in the module, or not to be trained there: {listed(list(gone))}. "
            "Their masks are given up."
        )


def of_lost_parameters(options: Options, names: Sequence[str]) -> str:
    """What is wrong with replaced parameters that are not trained."""
    return (
        f"{options.name}: {listed(list(names))} replaced parameters of the module while training goes on, and no "
        "optimizer holds them, so that they are never trained. Add them where you replace them: "
        "trainer.optimizers[0].add_param_group({'params': layer.parameters()}); or set requires_grad_(False) on them."
    )


def _sized(sizes: Mapping[str, int]) -> str:
    return f"{sum(sizes.values()):,} weights in {listed(list(sizes))}"


def counted(number: int, word: str) -> str:
    """So many of something."""
    return f"{number} {word}" + ("" if number == 1 else "s")


def listed(names: list[str]) -> str:
    """The first of these names, and how many there are."""
    return ", ".join(names[:8]) + (f", … ({len(names)} parameters)" if len(names) > 8 else "")
