"""Copies of a module, and which axis of its weights is the output channel."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

Module = TypeVar("Module", bound=nn.Module)


def copy_of(module: Module) -> Module:
    """A deep copy of a module; a Trainer to which it is attached is shared, not copied.

    Raises:
        ValueError: If it holds what cannot be copied.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        try:
            trainer: Any = getattr(part, "trainer", None)
        except RuntimeError:  # a LightningModule without a Trainer
            continue
        if trainer is not None and not isinstance(trainer, nn.Module):
            memo[id(trainer)] = trainer
    try:
        return copy.deepcopy(module, memo)
    except (TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{type(module).__name__} cannot be copied: {error}") from error


def output_axes(module: nn.Module) -> dict[str, int]:
    """By name the parameters whose output channel is axis 1: those of transposed convolutions, and of ``Conv1D``."""
    return {
        f"{name}.weight" if name else "weight": 1
        for name, part in module.named_modules()
        if isinstance(part, TRANSPOSED) or type(part).__name__ == "Conv1D"
    }
