"""COUPLED: output units of layers that must go together, as the dependency graph of torch-pruning tells them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.conv import _ConvTransposeNd as Transposed

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)


@dataclass(frozen=True)
class Part:
    """One layer that writes or reads units of a group.

    Attributes:
        layer: The layer, or a parameter that stands alone.
        name: Its name in the module; empty for such a parameter.
        writes: Whether the units are its outputs, or those of a norm; else it reads them.
        indices: Which of its channels belong to the group.
        units: Of each of these the unit; shorter where that is not known of all.
        opaque: Whether nothing can be told of the units through it.
    """

    layer: Any
    name: str
    writes: bool
    indices: list[int]
    units: list[int]
    opaque: bool

    @property
    def axis(self) -> int:
        """On which axis of its weight these channels lie."""
        return int(isinstance(self.layer, Transposed) == self.writes)


@dataclass
class Coupled:
    """Units that go together.

    Attributes:
        root: The layer that stands for the group.
        name: Its name in the module.
        size: How many units there are.
        parts: All layers of the group.
        mixing: The layer that computes the units together, so that single ones cannot go; None if there is none.
        is_output: Whether the units are outputs of the network.
    """

    root: nn.Module
    name: str
    size: int
    parts: list[Part] = field(default_factory=list)
    mixing: str | None = None
    is_output: bool = False

    @property
    def layers(self) -> list[str]:
        """The names of all layers that write the units."""
        return [part.name for part in self.parts if part.writes and part.name]


def coupled_units(graph: Any, names: Mapping[nn.Module, str]) -> Iterator[Coupled]:
    """The groups of a dependency graph; the layers by their names."""
    for items in graph.get_all_groups():
        root = items[0].dep.target.module
        group = Coupled(root, names[root], len(items[0].idxs))
        for item in items:
            _add(group, graph, item, names)
        yield group


def _add(group: Coupled, graph: Any, item: Any, names: Mapping[nn.Module, str]) -> None:
    node, layer = item.dep.target, item.dep.target.module
    writes = graph.is_out_channel_pruning_fn(item.dep.handler)
    if layer not in names and not isinstance(layer, nn.Parameter):  # an operation without weights
        group.is_output |= writes and not node.outputs
        return
    units = [root for root in item.root_idxs if root is not None]
    lost, plain = len(units) < len(item.idxs), is_plain(layer)
    opaque = lost or not (plain or isinstance(layer, (*NORMS, _ConvNd)))
    if lost or not plain:
        group.mixing = names.get(layer, type(layer).__name__)
    if not opaque:
        group.is_output |= writes and not node.outputs
    group.parts.append(Part(layer, names.get(layer, ""), writes, list(item.idxs), units, opaque))


def is_plain(layer: object) -> bool:
    """Whether each unit of the layer is computed from what it reads, without the other units."""
    if isinstance(layer, _ConvNd):
        return layer.groups == 1 or is_depthwise(layer)
    return isinstance(layer, nn.Linear | _BatchNorm | nn.PReLU)


def is_depthwise(layer: object) -> bool:
    """Whether each channel of a convolution reads the same channel alone."""
    return isinstance(layer, _ConvNd) and layer.groups == layer.out_channels == layer.in_channels > 1
