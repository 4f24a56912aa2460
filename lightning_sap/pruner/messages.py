"""What a pruner without a Trainer says."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_warn

from lightning_sap.callbacks.pruning.messages import listed
from lightning_sap.callbacks.pruning.options import Options


def warn_of_silent_steps(options: Options, kinds: Sequence[str]) -> None:
    """Warn of optimizers that call no hooks at their steps."""
    rank_zero_warn(
        f"{options.name}: {', '.join(kinds)} calls no hook at its steps, after which pruned weights move. Call "
        "hold_masks() after each of them."
    )


def warn_of_masks_left_out(options: Options, names: Sequence[str]) -> None:
    """Warn of masks for which a module has no weight."""
    if names:
        rank_zero_warn(
            f"{options.name}: the module has no prunable weight of that name and shape for the masks of "
            f"{listed(list(names))}, which are given up; the masks of all others stay."
        )
