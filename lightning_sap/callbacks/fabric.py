"""What a loop of one's own has of Lightning: Fabric's wrappers, and warnings on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.fabric import is_wrapped
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_sap.callbacks.pruning.messages import listed
from lightning_sap.callbacks.pruning.options import Options
from lightning_sap.engine.weights import COMPILE_PREFIX


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that Fabric or DDP wraps, compiled or not; one that is compiled alone goes by the same names."""
    bare: Any = getattr(module, COMPILE_PREFIX.rstrip("."), module)
    if is_wrapped(bare) or isinstance(bare, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return unwrapped(bare.module)
    return module


def unwrapped_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer that Fabric wraps."""
    return optimizer.optimizer if is_wrapped(optimizer) else optimizer  # type: ignore[no-any-return]


def warn_of_silent_steps(options: Options, kinds: Sequence[str]) -> None:
    """Warn of optimizers that call no hooks at their steps."""
    if kinds:
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
