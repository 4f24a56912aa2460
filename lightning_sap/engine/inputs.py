"""INPUTS: which layers multiply a weight by what they read, and the sizes of that in the weight's own layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import ParametrizationList

from lightning_sap.engine.matrices import groups_on_axis_1
from lightning_sap.engine.selection import Owner
from lightning_sap.engine.weights import PrunableWeight, owners_of_parameters
from lightning_sap.functional.pqi import NO_FLOAT64


def input_layers(
    module: nn.Module, weights: Mapping[str, PrunableWeight]
) -> tuple[dict[str, list[nn.Module]], dict[str, str]]:
    """For each weight the layers that multiply it by their input, and for the others why there are none.

    Example:
        >>> from lightning_sap.engine.weights import prunable_weights
        >>> net = nn.Sequential(nn.Linear(4, 2), nn.Bilinear(2, 2, 3))
        >>> found, missing = input_layers(net, prunable_weights(net))
        >>> found, missing
        ({'0.weight': [Linear(in_features=4, out_features=2, bias=True)]}, {'1.weight': "it is 'weight' of Bilinear"})
    """
    owners, found, missing = owners_of_parameters(module), dict[str, list[nn.Module]](), dict[str, str]()
    for name, weight in weights.items():
        places = owners[id(weight.parameter)][1] if id(weight.parameter) in owners else []
        reasons = [reason for owner in places if (reason := _obstacle(owner))]
        if reasons or not places:
            missing[name] = (reasons or ["it belongs to no layer"])[0]
        else:
            found[name] = list({id(owner.module): owner.module for owner in places}.values())
    return found, missing


def _obstacle(owner: Owner) -> str | None:
    """Why it is not known what a layer multiplies a parameter by."""
    layer = owner.module
    if isinstance(layer, ParametrizationList):
        return "it is parametrized"
    if any(isinstance(around, nn.MultiheadAttention) for around in owner.ancestors):
        return "it belongs to MultiheadAttention"
    if owner.own_name == "weight" and (isinstance(layer, nn.Linear | _ConvNd) or groups_on_axis_1(layer)):
        return None
    return f"it is {owner.own_name!r} of {type(layer).__name__}"


def sum_type(tensor: Tensor) -> torch.dtype:
    """In which floating dtype sums over a training are kept where a tensor is."""
    return torch.float32 if tensor.device.type in NO_FLOAT64 else torch.float64


def channels_last(layer: nn.Module, x: Tensor) -> Tensor:
    """The input of a layer, its channels or features on the last axis."""
    return x.movedim(-1 - _spatial(layer), -1)


def sums_of_squares(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of each input channel the sum of its squares in a layout that broadcasts to the weight's; and how many entries.

    Example:
        >>> sums_of_squares(nn.Linear(2, 3), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        (tensor([[10., 20.]], dtype=torch.float64), tensor(2., dtype=torch.float64))
        >>> sums, _ = sums_of_squares(nn.Conv1d(4, 2, 3, groups=2), torch.arange(4.0).view(1, 4, 1))
        >>> sums[..., 0]
        tensor([[0., 1.],
                [4., 9.]], dtype=torch.float64)
    """
    rows = channels_last(layer, x.detach())
    rows = rows.reshape(-1, rows.shape[-1])
    rows = rows if rows.dtype == torch.float64 else rows.float()
    sums = rows.square().sum(0).to(sum_type(x))
    return in_layout(layer, sums), sums.new_tensor(len(rows))


def in_layout(layer: nn.Module, channels: Tensor) -> Tensor:
    """Numbers of input channels in a shape that broadcasts to that of the layer's weight."""
    groups = layer.groups if isinstance(layer, _ConvNd) and not isinstance(layer, _ConvTransposeNd) else 1
    if groups > 1:
        channels = channels.view(groups, -1).repeat_interleave(layer.out_channels // groups, 0)  # type: ignore[operator]
    return channels.reshape(layout(layer, layer.weight.shape))  # type: ignore[arg-type]


def layout(layer: nn.Module, shape: Sequence[int]) -> tuple[int, ...]:
    """That shape, of a weight of the shape given."""
    spatial = (1,) * _spatial(layer)
    if isinstance(layer, _ConvTransposeNd) or (not isinstance(layer, _ConvNd) and groups_on_axis_1(layer)):
        return (shape[0], 1, *spatial)
    grouped = isinstance(layer, _ConvNd) and layer.groups > 1
    return (shape[0] if grouped else 1, shape[1], *spatial)


def _spatial(layer: nn.Module) -> int:
    """How many axes behind the channels are positions."""
    return len(layer.kernel_size) if isinstance(layer, _ConvNd) else 0
