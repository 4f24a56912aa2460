"""EFFECTIVE: the weight that a layer computes with, where that is not the parameter itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import prune
from torch.nn.utils.parametrize import ParametrizationList

from lightning_sap.engine.tracing import evaluating
from lightning_sap.sharding import whole

SCATTERING = (0x9E3779B1, 0x85EBCA6B)  # factors that spread the bits of a position over all bits


def is_magnitude(parametrizations: ParametrizationList, own_name: str) -> bool:
    """Whether a parametrized tensor only scales a weight, as the norms of weight_norm do: a zero in it is a whole unit.

    It is smaller than the weight, or another tensor of the weight's shape is normalised: to scale that changes nothing.

    Example:
        >>> from torch.nn.utils import parametrizations
        >>> thin = parametrizations.weight_norm(nn.Linear(1, 8)).parametrizations.weight  # both parts are (8, 1)
        >>> is_magnitude(thin, "original0"), is_magnitude(thin, "original1")
        (True, False)
    """
    tensors = _tensors(parametrizations)
    weight = _effective(parametrizations, tensors)
    if tensors[own_name].shape != weight.shape:
        return True
    others = [name for name, tensor in tensors.items() if name != own_name and tensor.shape == weight.shape]
    scaled = (_effective(parametrizations, {**tensors, name: 2 * tensors[name]}) for name in others)
    return any(torch.allclose(of_scaled, weight, equal_nan=True) for of_scaled in scaled)


def keeps_zeros(parametrizations: ParametrizationList, own_name: str) -> bool:
    """Whether a zero in a parametrized tensor is a zero in the weight that its layer uses, whatever else is in it.

    It is tried in a copy: half of the places are set to zero, then the other half, and the same with other halves.
    Where the weight is not a number then, as that of a normalised row is without weights, a zero is not at fault.

    Example:
        >>> from torch.nn.utils import parametrizations
        >>> normed = parametrizations.weight_norm(nn.Linear(4, 3)).parametrizations.weight
        >>> orthogonal = parametrizations.orthogonal(nn.Linear(4, 3)).parametrizations.weight
        >>> keeps_zeros(normed, "original1"), keeps_zeros(orthogonal, "original")
        (True, False)
    """
    tensors = _tensors(parametrizations)
    # zeros that are there already hide what is done to zeros
    tensors = {name: tensor.where(tensor != 0, 1) for name, tensor in tensors.items()}
    values = tensors[own_name]
    position = torch.arange(values.numel(), device=values.device).reshape(values.shape)
    for factor, side in itertools.product(SCATTERING, (0, 1)):
        half = (position * factor >> 16) % 2 == side
        try:
            weight = _effective(parametrizations, {**tensors, own_name: values.masked_fill(half, 0)})
        except (RuntimeError, ValueError):  # it takes no such values
            return False
        if weight[half].nan_to_num(0.0).any():
            return False
    return True


def normalised_by(parametrizations: ParametrizationList, own_name: str) -> tuple[int, ...] | None:
    """The axes whose indices tell apart what a parametrization divides by a norm of its own; None: it divides nothing.

    It is tried in a copy: where the entries at the first index of an axis are zero, the weight or its gradient is not
    finite if they hold a whole set. ``()``: the whole tensor is one set.

    Example:
        >>> from torch.nn.utils import parametrizations
        >>> rows = parametrizations.weight_norm(nn.Linear(4, 3)).parametrizations.weight
        >>> columns = parametrizations.weight_norm(nn.Linear(4, 3), dim=1).parametrizations.weight
        >>> spectral = parametrizations.spectral_norm(nn.Linear(4, 3)).parametrizations.weight
        >>> normalised_by(rows, "original1"), normalised_by(columns, "original1"), normalised_by(spectral, "original")
        ((0,), (1,), ())
    """
    tensors = _tensors(parametrizations)
    tensors = {name: tensor.where(tensor != 0, 1) for name, tensor in tensors.items()}
    values = tensors[own_name]
    if _is_finite(parametrizations, tensors, own_name, torch.zeros_like(values)):
        return None
    without = [
        values.index_fill(axis, torch.zeros(1, dtype=torch.int64).to(values.device), 0.0)
        for axis in range(values.dim())
    ]
    found = [axis for axis, part in enumerate(without) if not _is_finite(parametrizations, tensors, own_name, part)]
    return tuple(found)


def _is_finite(
    parametrizations: ParametrizationList, tensors: Mapping[str, Tensor], own_name: str, values: Tensor
) -> bool:
    """Whether the weight and its gradient are, with these values of one tensor."""
    values = values.clone().requires_grad_()
    try:
        with torch.enable_grad():
            weight = _effective(parametrizations, {**tensors, own_name: values})
            (gradient,) = torch.autograd.grad(weight.square().sum() + weight.sum(), values, materialize_grads=True)
    except (RuntimeError, ValueError):  # it takes no such values
        return True
    return bool(weight.isfinite().all() and gradient.isfinite().all())


def _tensors(parametrizations: ParametrizationList) -> dict[str, Tensor]:
    return {name: whole(parameter.detach()) for name, parameter in parametrizations.named_parameters()}


def _effective(parametrizations: ParametrizationList, tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight that the layer would use with these values; its own tensors stay as they are.

    It is taken as in evaluation: in training, spectral_norm changes its buffers at each look.
    """
    followed = any(tensor.requires_grad for tensor in tensors.values())
    with evaluating(parametrizations), torch.set_grad_enabled(followed):
        weight: Tensor = functional_call(parametrizations, dict(tensors), ())
    return weight


def pruned_by_torch(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Where ``torch.nn.utils.prune`` is at work in a module: path and tensor name, as its ``remove`` takes them.

    Example:
        >>> layers = nn.Sequential(nn.ReLU(), prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=0.5))
        >>> list(pruned_by_torch(layers))
        [('1', 'weight')]
    """
    for path, part in module.named_modules():
        own = {name for name, _ in part.named_parameters(recurse=False)}
        for buffer, _ in part.named_buffers(recurse=False):
            name = buffer.removesuffix("_mask")
            if name != buffer and f"{name}_orig" in own and prune.is_pruned(part):
                yield path, name
