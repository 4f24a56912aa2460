"""EFFECTIVE: the weight that a layer computes with, where that is not the parameter itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import prune
from torch.nn.utils.parametrize import ParametrizationList

from lightning_sap.sharding import whole

SCATTERING = (0x9E3779B1, 0x85EBCA6B)  # factors that spread the bits of a position over all bits


def is_full_size(parametrizations: ParametrizationList, parameter: nn.Parameter) -> bool:
    """False for a smaller part of a parametrization, such as the norms of weight_norm: a zero there is a whole unit."""
    return _effective(parametrizations, _tensors(parametrizations)).shape == parameter.shape


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


def _tensors(parametrizations: ParametrizationList) -> dict[str, Tensor]:
    return {name: whole(parameter.detach()) for name, parameter in parametrizations.named_parameters()}


def _effective(parametrizations: ParametrizationList, tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight that the layer would use with these values; its own tensors stay as they are.

    It is taken as in evaluation: in training, spectral_norm changes its buffers at each look.
    """
    modes = [(module, module.training) for module in parametrizations.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            weight: Tensor = functional_call(parametrizations, dict(tensors), ())
    finally:
        for module, mode in modes:
            module.training = mode
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
