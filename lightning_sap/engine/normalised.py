"""NORMALISED: the sets of a parameter's entries that its layer divides by their norm, and that must not be empty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_sap.engine.effective import normalised_by


def normalised_axes(module: nn.Module, own_name: str, dimensions: int) -> tuple[int, ...] | None:
    """The axes whose indices tell apart the sets of a parameter that are divided by their norms; None: there are none.

    Args:
        module: The module, or the list of parametrizations, that holds the parameter.
        own_name: Its name there.
        dimensions: How many axes it has.

    Example:
        >>> layer = nn.utils.spectral_norm(nn.Linear(4, 3))
        >>> normalised_axes(layer, "weight_orig", 2), normalised_axes(layer, "bias", 1)
        ((), None)
    """
    if isinstance(module, ParametrizationList):
        return normalised_by(module, own_name)
    hooks: Sequence[Any] = list(module._forward_pre_hooks.values())
    for hook in hooks:
        if isinstance(hook, WeightNorm) and own_name == f"{hook.name}_v":
            return () if hook.dim == -1 else (hook.dim % dimensions,)
        if isinstance(hook, SpectralNorm) and own_name == f"{hook.name}_orig":
            return ()
    return None


def shared_axes(found: Sequence[tuple[int, ...] | None]) -> tuple[int, ...] | None:
    """The axes for a parameter in several places: sets that are parts of the sets of all of them.

    Example:
        >>> shared_axes([None, (0,), (1,)])
        (0, 1)
    """
    sets = [axes for axes in found if axes is not None]
    return tuple(sorted({axis for axes in sets for axis in axes})) if sets else None
