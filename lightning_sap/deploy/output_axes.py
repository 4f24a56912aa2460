"""Which axis of a module's weights is the output channel."""

from __future__ import annotations

from torch import nn

from lightning_sap.engine.matrices import groups_on_axis_1


def output_axes(module: nn.Module) -> dict[str, int]:
    """By name the parameters whose output channel is axis 1: those of transposed convolutions, and of ``Conv1D``."""
    return {
        f"{name}.weight" if name else "weight": 1 for name, part in module.named_modules() if groups_on_axis_1(part)
    }
