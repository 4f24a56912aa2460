"""Layers that compute with other weights than those that are pruned: what is said of them when training starts."""

from __future__ import annotations

from collections.abc import Collection

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_sap.callbacks.logging import log_line
from lightning_sap.callbacks.pruning.messages import listed
from lightning_sap.callbacks.pruning.options import Options
from lightning_sap.engine.branches import merging_blocks
from lightning_sap.engine.used import layer_keeps_zeros
from lightning_sap.engine.weights import COMPILE_PREFIX

MEASURE = "lightning_sap.effective_weights(module, example_inputs)"


def tell(options: Options, module: nn.Module, weights: Collection[str]) -> None:
    """Warn of blocks that merge branches later, and name layers that could not be asked what they compute with."""
    if blocks := merging_blocks(module, weights):
        kinds, (first, *_) = sorted(set(blocks.values())), blocks
        rank_zero_warn(
            f"{options.name}: {', '.join(kinds)} adds branches that are merged into one kernel after training, "
            f"{len(blocks)} times (first in {first!r}). A merged weight is zero only where all of its branches are, so "
            "that what is deployed is denser than what is trained. Merge before you prune, or measure the merged "
            f"network by {MEASURE}."
        )
    if unknown := _unknown(module, weights):
        log_line(
            f"{options.name}: {listed(unknown)} have a forward of their own that takes other inputs than a tensor, so "
            f"that it is not known whether it computes with the zeros of the weight. {MEASURE} measures it."
        )


def _unknown(module: nn.Module, weights: Collection[str]) -> list[str]:
    """The layers of these weights that cannot be asked, by their paths."""
    named = ((path.replace(COMPILE_PREFIX, ""), part) for path, part in module.named_modules())
    return [path for path, part in named if f"{path}.weight" in weights and layer_keeps_zeros(part, "weight") is None]
