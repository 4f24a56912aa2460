"""UNITS: which entries of which parameters belong to a unit of a module, with all that must go together with it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lightning_sap.engine.coupling import Coupled, Part, coupled_units, is_depthwise
from lightning_sap.engine.tracing import copy_of, each_tensor, evaluating, graph_of, new_graph, within
from lightning_sap.engine.weights import COMPILE_PREFIX, parameter_names

TIME_LIMIT = 40.0  # seconds for torch-pruning, as in `shrink`
PURPOSE = "structure='unit'"
HOW = "Give the module `example_input_array` and a `forward` that takes it, or the callback example_inputs=..."
UNIT_WISE = (  # what keeps units apart, by the modules of torch.nn
    "torch.nn.modules.activation",
    "torch.nn.modules.dropout",
    "torch.nn.modules.pooling",
)
MIXES = (nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin, nn.GLU, nn.MultiheadAttention)


@dataclass(frozen=True)
class Place:
    """Entries of a parameter that belong to units of a group.

    Attributes:
        name: The parameter.
        axis: On which axis they lie.
        indices: Their indices on it.
        units: Of each the unit that it belongs to.
    """

    name: str
    axis: int
    indices: Tensor
    units: Tensor

    def flags(self, flagged: Tensor, length: int) -> Tensor:
        """Of each index on an axis of that length, whether it belongs to a flagged unit."""
        flags = torch.zeros(length, dtype=torch.bool)
        flags[self.indices] = flagged[self.units]
        return flags


@dataclass(frozen=True)
class UnitGroup:
    """Units that go together, and what goes with each.

    Attributes:
        size: How many units there are.
        rows: Weights that compute the units.
        companions: Biases, and weights and biases of norms, of the units.
        columns: Weights that read them.
    """

    size: int
    rows: tuple[Place, ...]
    companions: tuple[Place, ...]
    columns: tuple[Place, ...]

    @property
    def name(self) -> str:
        """The first of its layers."""
        return self.rows[0].name.rpartition(".")[0]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the weights that compute the units."""
        return tuple(dict.fromkeys(place.name for place in self.rows))


def unit_groups(module: nn.Module, weights: Collection[str], example_inputs: Any) -> list[UnitGroup]:
    """The groups of units that can go: no outputs of the network, and nothing that a layer computes together.

    They are in the order of the parameters.

    Args:
        module: Any module; it is not changed.
        weights: Names of the weights that may lose units; a group one of whose layers is not among them stays.
        example_inputs: What the module takes, as for ``shrink``; None: it must be one chain of layers.

    Raises:
        ValueError: If the module cannot be traced, or is no chain and has no example; it says how to give one.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [(group.name, group.size) for group in unit_groups(net, ["0.weight", "2.weight"], None)]
        [('0', 8)]
    """
    if example_inputs is None:
        coupled, root = _chain(module), module
        if coupled is None:
            kind = type(module).__name__
            raise ValueError(f"structure='unit' must see how {kind} couples its layers, and has no example. {HOW}")
    else:
        root = copy_of(module).to("cpu")  # without the Trainer of a module of Lightning
        coupled = _traced(root, example_inputs)
    shared = _shared(root)
    groups = [_group(found) for found in coupled if found.mixing is None and not found.is_output and found.size > 1]
    known = {name: position for position, name in enumerate(parameter_names(root))}
    free = [
        replace(group, rows=tuple(sorted(group.rows, key=lambda place: known[place.name])))
        for group in groups
        if all(name in weights for name in group.names)
        and all(place.name in known and place.name not in shared for place in _places(group))
    ]
    return sorted(free, key=lambda group: known[group.rows[0].name])


def _places(group: UnitGroup) -> Iterator[Place]:
    yield from (*group.rows, *group.companions, *group.columns)


def _traced(module: nn.Module, example_inputs: Any) -> list[Coupled]:
    """The groups of a module on the CPU that may be changed."""
    new_graph(PURPOSE)  # what is missing is said at once
    module.float()
    inputs = each_tensor(example_inputs, lambda x: x.detach().cpu().float() if x.is_floating_point() else x.cpu())
    names = {part: name for name, part in module.named_modules()}
    try:
        with (
            evaluating(module),
            warnings.catch_warnings(),
            torch.random.fork_rng(devices=[]),
            torch.compiler.set_stance("force_eager"),
            within(TIME_LIMIT, module),
        ):
            warnings.simplefilter("ignore")  # torch-pruning thinks aloud
            return list(coupled_units(graph_of(module, inputs, PURPOSE), names))
    except ValueError as error:
        raise ValueError(f"structure='unit': {error} {HOW}") from error


def _shared(module: nn.Module) -> set[str]:
    """Names of parameters that stand in several places of a module."""
    counts = Counter(id(own) for part in module.modules() for own in part.parameters(recurse=False))
    return {name for name, parameter in parameter_names(module).items() if counts[id(parameter)] > 1}


def _group(coupled: Coupled) -> UnitGroup:
    rows, companions, columns = list[Place](), list[Place](), list[Place]()
    for part in coupled.parts:
        layer, indices, units = part.layer, torch.tensor(part.indices), torch.tensor(part.units)
        name = f"{part.name}.".lstrip(".").replace(COMPILE_PREFIX, "")
        weight = Place(f"{name}weight", part.axis, indices, units)
        if not part.writes:
            columns.append(weight)
        elif isinstance(layer, _BatchNorm):
            companions += [Place(f"{name}{own}", 0, indices, units) for own in ("weight", "bias") if layer.affine]
        elif not isinstance(layer, nn.PReLU):  # which keeps zeros
            rows.append(weight)
            companions += [Place(f"{name}bias", 0, indices, units)] if layer.bias is not None else []
    return UnitGroup(coupled.size, tuple(rows), tuple(companions), tuple(columns))


def _chain(module: nn.Module) -> list[Coupled] | None:
    """The groups of a module that is one chain of layers, each called once; None if it is not known to be one."""
    path, found = "", module
    while not isinstance(found, nn.Sequential):
        parts = [(name, part) for name, part in found.named_children() if any(True for _ in part.parameters())]
        if len(parts) != 1 or any(True for _ in found.parameters(recurse=False)):
            return None
        name, found = parts[0]
        path += f"{name}."
    layers = list(_layers(found, path))
    chains = [part for part in found.modules() if isinstance(part, nn.Sequential)]
    once = sum(len(chain) for chain in chains) == len(layers) + len(chains) - 1
    if not (once and all(_is_unit_wise(layer) for _, layer in layers)):
        return None
    return _groups_of_chain(layers)


def _layers(chain: nn.Sequential, path: str) -> Iterator[tuple[str, nn.Module]]:
    for name, part in chain.named_children():
        if isinstance(part, nn.Sequential):
            yield from _layers(part, f"{path}{name}.")
        else:
            yield f"{path}{name}", part


def _is_unit_wise(layer: nn.Module) -> bool:
    if isinstance(layer, _ConvNd):
        return layer.groups == 1 or is_depthwise(layer)
    kept = isinstance(layer, nn.Linear | _BatchNorm | nn.Identity) or _flattens(layer)
    return kept or (type(layer).__module__ in UNIT_WISE and not isinstance(layer, MIXES))


def _flattens(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) == (1, -1)


def _groups_of_chain(layers: Iterable[tuple[str, nn.Module]]) -> list[Coupled] | None:
    """A group for each layer of a chain, with the norms behind it and the layer that reads it; the last is output."""
    groups = list[Coupled]()
    flat = True
    for name, layer in layers:
        flat |= _flattens(layer)
        if not isinstance(layer, nn.Linear | _ConvNd | _BatchNorm | nn.PReLU):
            continue
        reads = isinstance(layer, nn.Linear | _ConvNd) and not is_depthwise(layer)
        if groups and not (reads and isinstance(layer, nn.Linear) and not flat):
            groups[-1].parts.append(_part(name, layer, groups[-1].size, writes=not reads))
        elif groups:
            return None  # a Linear along the last axis of images
        if reads:
            flat = isinstance(layer, nn.Linear)
            size = int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore[arg-type]
            groups.append(Coupled(layer, name, size, [_part(name, layer, size, writes=True)]))
    if groups:
        groups[-1].is_output = True
    return groups or None


def _part(name: str, layer: Any, size: int, *, writes: bool) -> Part:
    """A layer of a chain; of a Linear behind a Flatten several channels belong to each unit."""
    channels = size if writes else int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)
    indices = list(range(channels))
    return Part(layer, name, writes, indices, [i * size // channels for i in indices], False)


def flagged(groups: Iterable[tuple[UnitGroup, Tensor]], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Where entries of parameters of these shapes belong to flagged units of groups: bool tensors on the CPU.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> (group,) = unit_groups(net, ["0.weight", "1.weight"], None)
        >>> flagged([(group, torch.tensor([True, False, False]))], {"0.bias": torch.Size([3])})
        {'0.bias': tensor([ True, False, False])}
    """
    found = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()}
    for group, units in groups:
        for place in _places(group):
            if place.name in found:
                mask = found[place.name]
                along = place.flags(units, mask.shape[place.axis])
                mask |= along.view([-1 if axis == place.axis else 1 for axis in range(mask.dim())])
    return found
