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

from lightning_sap.engine.coupling import NORMS, Coupled, Part, coupled_units, is_depthwise, is_plain


@dataclass
class Group(Coupled):
    """Units that go together; each tensor has one entry per unit of the layer at the root.

    Attributes:
        zero: Whether the unit is zero behind every layer of the group.
        silent: Whether it has no weights in any of the layers, whatever biases and norms add.
        unread: Whether no layer that reads it has weights for it.
        readers: How many layers read the units.
    """

    zero: Tensor = field(default_factory=lambda: torch.ones(0))
    silent: Tensor = field(default_factory=lambda: torch.ones(0))
    unread: Tensor = field(default_factory=lambda: torch.ones(0))
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
    for coupled in coupled_units(graph, names):
        group = Group(**vars(coupled))
        group.zero, group.silent, group.unread = torch.ones(3, group.size, dtype=torch.bool)
        for part in group.parts:
            _add(group, part)
        yield group


def _add(group: Group, part: Part) -> None:
    """Take one layer of the group into account."""
    layer = part.layer
    if part.opaque:
        group.zero[:] = False
    elif part.writes:
        if not isinstance(layer, nn.PReLU):  # which keeps zeros
            _spoil(group.zero, part.units, _is_zero(layer)[part.indices])
        if isinstance(layer, _ConvNd | nn.Linear) and not is_depthwise(layer):
            _spoil(group.silent, part.units, _columns(layer, part.axis)[part.indices])
    elif is_plain(layer):
        group.readers += 1
        _spoil(group.unread, part.units, _columns(layer, part.axis)[part.indices])


def _spoil(flags: Tensor, roots: Sequence[int], holds: Tensor) -> None:
    """Where it does not hold of a unit of some layer, it does not hold of the unit at the root."""
    flags[torch.tensor(roots, dtype=torch.long)[~holds]] = False


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
    return still if is_depthwise(layer) else still & _columns(layer, int(isinstance(layer, Transposed)))


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
