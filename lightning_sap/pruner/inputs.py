"""What a loop of one's own hands to a pruner, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_sap.callbacks.pruning.options import Options
from lightning_sap.callbacks.pruning.signatures import check_known
from lightning_sap.policies.gathered import Gathered
from lightning_sap.policies.importance import check_importance
from lightning_sap.policies.regrowth import GrowAndPrune
from lightning_sap.rewind import base_optimizers
from lightning_sap.sharding import ALTERNATIVE

OF_A_TRAINER = frozenset(
    {"every_n_epochs", "every_n_steps", "lr_schedule", "tolerance", "save_rounds", "dirpath", "prog_bar"}
)
FLATTENS = frozenset({"FullyShardedDataParallel", "DeepSpeedEngine"})


def check_options(options: Options) -> Options:
    """Raise for what a loop without epochs cannot do."""
    if isinstance(options.policy, GrowAndPrune):
        raise ValueError(
            f"Pruner does not run {options.policy!r}, whose first masks and rounds are planned with a Trainer. Use "
            "PruningCallback, or prune_masks(..., round=0), 1, 2, … in your loop."
        )
    if options.rewind_weights not in (None, "init", 0):
        raise ValueError(
            f"rewind_weights={options.rewind_weights!r} counts epochs, of which a Pruner knows nothing. Give 'init', "
            "and attach it when the weights are those to go back to; or None."
        )
    if options.target_remaining is not None and not options.rounds:
        raise ValueError(
            f"target_remaining={options.target_remaining} needs rounds, the number of prunings that lead there; got "
            f"rounds={options.rounds}."
        )
    if isinstance(check_importance(options.importance), Gathered):
        raise ValueError(
            f"importance={options.importance!r} is gathered in the last part of a round, whose end a Pruner does not "
            "foresee: use PruningCallback, or give 'magnitude' or an Importance of your own."
        )
    return options


def check_names(given: Mapping[str, Any]) -> None:
    """Raise for options that there are not, or that need a Trainer."""
    for name in given:
        if name in OF_A_TRAINER:
            raise TypeError(
                f"Pruner has no option {name!r}, which needs a Trainer: use PruningCallback, or leave it out."
            )
    check_known("Pruner", given, {field.name for field in fields(Options)} - OF_A_TRAINER - {"policy"})


def check_kind(module: nn.Module) -> None:
    """Raise for wrappers that flatten or split the weights in their own way."""
    kinds = {kind.__name__ for part in module.modules() for kind in type(part).__mro__}
    if found := sorted(kinds & FLATTENS):
        raise ValueError(
            f"Pruning does not work with {found[0]}, which flattens or splits the weights in its own way. {ALTERNATIVE}"
        )


def check_shapes(module: nn.Module) -> None:
    """Raise for layers that have not seen a batch."""
    if lazy := [name for name, p in module.named_parameters() if isinstance(p, nn.UninitializedParameter)]:
        raise ValueError(f"{lazy} have no shape before the first batch. Pass a batch through the module before attach.")


def check_fresh(optimizers: Sequence[Optimizer]) -> None:
    """Raise for optimizers that have taken steps: what they keep before the first is not known any more."""
    for optimizer in optimizers:
        for base in base_optimizers(optimizer):
            states = [state for state in base.state.values() if isinstance(state, Mapping) and state]
            if any(float(state.get("step", 1)) > 0 for state in states):
                raise ValueError(
                    f"{type(base).__name__} has taken steps, or its state was loaded, so that it cannot be made fresh "
                    "at a pruning. Attach the pruner before that, or give reset_optimizer=False."
                )
