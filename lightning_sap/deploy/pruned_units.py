"""Which units of which layers can go: those whose output is zero whatever comes in, and those that nobody reads.

Everything is told from the weights, along the dependency graph of torch-pruning, in which units that must go together
form one group. Nothing is told of a group through a layer that mixes its units: a norm over channels, attention, a
grouped convolution.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.conv import _ConvTransposeNd as Transposed

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)


@dataclass
class Group:
    """Units that go together; each tensor has one entry per unit of the layer at the root.

    Attributes:
        root: The layer that stands for the group.
        name: Its name in the module.
        zero: Whether the unit is zero behind every layer of the group.
        silent: Whether it has no weights in any of the layers, whatever biases and norms add.
        unread: Whether no layer that reads it has weights for it.
        layers: The names of all layers that write the units.
        mixing: The layer through which nothing can be told, None if there is none.
        is_output: Whether the units are outputs of the network.
        readers: How many layers read the units.
    """

    root: nn.Module
    name: str
    zero: Tensor
    silent: Tensor
    unread: Tensor
    layers: list[str] = field(default_factory=list)
    mixing: str | None = None
    is_output: bool = False
    readers: int = 0

    @property
    def removable(self) -> list[int]:
        """The units that can go; one unit of the layer always stays."""
        if self.is_output or self.mixing is not None:
            return []
        gone = self.zero | self.unread if self.readers else self.zero
        units: list[int] = gone.nonzero().flatten().tolist()
        return units if len(units) < len(gone) else units[1:]

    @property
    def constant(self) -> int:
        """How many units have no weights and stay for what a bias or a norm adds to them."""
        stays = self.silent & ~self.zero
        if self.readers:
            stays &= ~self.unread
        return 0 if self.is_output else int(stays.sum())


def groups_of(graph: Any, names: Mapping[nn.Module, str]) -> Iterator[Group]:
    """The groups of a dependency graph, with what the weights tell of their units."""
    for items in graph.get_all_groups():
        root = items[0].dep.target.module
        zero, silent, unread = torch.ones(3, len(items[0].idxs), dtype=torch.bool)
        group = Group(root, names[root], zero, silent, unread)
        for item in items:
            _add(group, graph, item, names)
        yield group


def _add(group: Group, graph: Any, item: Any, names: Mapping[nn.Module, str]) -> None:
    """Take one layer of the group into account."""
    node, layer = item.dep.target, item.dep.target.module
    writes = graph.is_out_channel_pruning_fn(item.dep.handler)
    if layer not in names and not isinstance(layer, nn.Parameter):  # an operation without weights
        group.is_output |= writes and not node.outputs
        return
    if writes and layer in names:
        group.layers.append(names[layer])
    roots = [root for root in item.root_idxs if root is not None]
    if len(roots) < len(item.idxs) or not _is_plain(layer):
        group.mixing = names.get(layer, type(layer).__name__)
        if len(roots) < len(item.idxs) or not isinstance(layer, (*NORMS, _ConvNd)):
            group.zero[:] = False
            return
        if not writes:
            return
    if writes:
        group.is_output |= not node.outputs
        if not isinstance(layer, nn.PReLU):  # which keeps zeros
            _spoil(group.zero, roots, _is_zero(layer)[item.idxs])
        if isinstance(layer, _ConvNd | nn.Linear) and not _is_depthwise(layer):
            _spoil(group.silent, roots, _columns(layer, _out_axis(layer))[item.idxs])
    else:
        group.readers += 1
        _spoil(group.unread, roots, _columns(layer, 1 - _out_axis(layer))[item.idxs])


def _spoil(flags: Tensor, roots: Sequence[int], holds: Tensor) -> None:
    """Where it does not hold of a unit of some layer, it does not hold of the unit at the root."""
    flags[torch.tensor(roots, dtype=torch.long)[~holds]] = False


def _is_plain(layer: object) -> bool:
    """Whether each unit of the layer is computed from what it reads, without the other units."""
    if isinstance(layer, _ConvNd):
        return layer.groups == 1 or _is_depthwise(layer)
    return isinstance(layer, nn.Linear | _BatchNorm | nn.PReLU)


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, _ConvNd) and layer.groups == layer.out_channels == layer.in_channels > 1


def _out_axis(layer: nn.Module) -> int:
    return 1 if isinstance(layer, Transposed) else 0


def _columns(layer: Any, axis: int) -> Tensor:
    """Of each index on the axis whether all weights there are zero."""
    weight: Tensor = layer.weight.detach()
    return (weight == 0).movedim(axis, 0).flatten(1).all(1).cpu()


def _is_zero(layer: Any) -> Tensor:
    """Of each unit that a layer writes whether it is zero where what comes in is zero or has no weights."""
    if isinstance(layer, _BatchNorm):
        return _norm_is_zero(layer)
    if isinstance(layer, NORMS):
        weight: Tensor | None = getattr(layer, "weight", None)
        bias: Tensor | None = getattr(layer, "bias", None)
        if weight is None or weight.dim() != 1:
            return torch.zeros(_size(layer), dtype=torch.bool)
        return ((weight == 0) if bias is None else (weight == 0) & (bias == 0)).cpu()
    still = torch.ones(_size(layer), dtype=torch.bool) if layer.bias is None else (layer.bias == 0).cpu()
    return still if _is_depthwise(layer) else still & _columns(layer, _out_axis(layer))


def _norm_is_zero(norm: _BatchNorm) -> Tensor:
    """Of each channel whether zero stays zero, in training as in evaluation."""
    running: Tensor | None = norm.running_mean
    mean = torch.zeros(norm.num_features) if running is None else running.cpu()
    if not norm.affine:
        return mean == 0
    return (norm.bias.cpu() == 0) & ((norm.weight.cpu() == 0) | (mean == 0))


def _size(layer: Any) -> int:
    for name in ("out_channels", "out_features", "num_channels", "num_features"):
        if hasattr(layer, name):
            return int(getattr(layer, name))
    return int(layer.normalized_shape[-1])
