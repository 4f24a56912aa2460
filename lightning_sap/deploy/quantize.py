"""Weights in eight bits: one scale for each output channel, zeros stay zeros."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar, overload

import torch
from torch import Tensor, nn

from lightning_sap.deploy.output_axes import output_axes
from lightning_sap.engine.tracing import copy_of

LARGEST = 127
EXACT_BITS = 16  # of a scale's 24: a scale times a whole number up to 127 is then exact in float32
LIMITS = torch.finfo(torch.float32)

Module = TypeVar("Module", bound=nn.Module)


@overload
def quantize_survivors(source: Module) -> Module: ...
@overload
def quantize_survivors(source: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
def quantize_survivors(source: nn.Module | Mapping[str, Tensor]) -> nn.Module | dict[str, Tensor]:
    r"""A copy whose weights are those that eight bits can hold: symmetric int8, one scale per output channel.

    .. math:: s_c = \max_j |w_{cj}| / 127, \qquad w_{cj} \to s_c \, \mathrm{round}(w_{cj} / s_c)

    Zeros stay zeros. The copy keeps dtype and shape of every weight, so that its accuracy can be measured as usual, and
    ``save_sparse(copy, path, values="int8")`` then stores weights of dtype float32 without any further loss. The
    output channel is axis 0, and axis 1 for the transposed convolutions and ``Conv1D`` of a module. Biases, norms,
    buffers, and whatever has fewer than two dimensions or no "weight" in its own name stay as they are.

    Args:
        source: A module, or a ``state_dict``. It is not changed.

    Returns:
        A module for a module, a ``dict`` for a ``state_dict``.

    Raises:
        ValueError: If a weight is not finite, or lies outside the range of float32.
        TypeError: If it is neither a module nor a mapping.

    Source: Krishnamoorthi, *Quantizing deep convolutional networks for efficient inference*, 2018, arXiv 1806.08342.

    Example:
        >>> import torch
        >>> quantize_survivors({"weight": torch.tensor([[127.0, 0.0, 3.4], [0.0, 0.0, 0.0]])})["weight"]
        tensor([[127.,   0.,   3.],
                [  0.,   0.,   0.]])
    """
    if isinstance(source, nn.Module):
        copy = copy_of(source)
        axes = output_axes(copy)
        with torch.no_grad():
            for name, weight in copy.named_parameters():
                if is_weight(name, weight):
                    weight.copy_(on_grid(name, weight, axes.get(name, 0)))
        return copy
    if isinstance(source, Mapping):
        return {name: on_grid(name, x) if is_weight(name, x) else x for name, x in source.items()}
    raise TypeError(f"quantize_survivors takes a module or a state_dict, got {type(source).__name__}.")


def is_weight(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is one of those that may be stored with fewer bits."""
    return (
        tensor.dim() > 1 and tensor.numel() > 0 and tensor.is_floating_point() and "weight" in name.rsplit(".", 1)[-1]
    )


def on_grid(name: str, weight: Tensor, axis: int = 0) -> Tensor:
    """The nearest weights that eight bits can hold, in the dtype of the weight."""
    return dequantize(*quantize(name, weight, axis), weight.dtype)


def quantize(name: str, weight: Tensor, axis: int = 0) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127, int8, in the shape of the weight; and the scales, float32, one along its axis.

    Raises:
        ValueError: If a weight is not finite, or lies outside the range of float32.
    """
    values = weight.detach().float()
    others = [d for d in range(values.dim()) if d != axis]
    largest = values.abs().amax(others, keepdim=True)
    if not bool(torch.isfinite(largest).all()):
        raise ValueError(f"{name} has weights that are not finite in float32; eight bits cannot hold them.")
    mantissa, exponent = torch.frexp((largest / LARGEST).clamp(min=LIMITS.tiny))
    scale = torch.ldexp((mantissa * 2**EXACT_BITS).round() / 2**EXACT_BITS, exponent)
    numbers = (values / scale).round_().clamp_(-LARGEST, LARGEST)
    return numbers.to(torch.int8), scale


def dequantize(numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights of whole numbers and their scales."""
    return (numbers.float() * scale).to(dtype)
