"""Whole units that are pruned are taken out of the network, and what cannot be proved is refused."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_sap.deploy.pruned_units import Group, groups_of
from lightning_sap.engine.tracing import call, copy_of, each_tensor, evaluating, graph_of, new_graph, tensors_in, within

CLOSE = 1e-5  # largest difference between outputs, relative to the largest output if that is above 1
ROUNDINGS = 64  # the same in steps of the outputs' dtype, for those coarser than float32

Module = TypeVar("Module", bound=nn.Module)

log = logging.getLogger(__name__)


def shrink(
    module: Module, example_inputs: Any, *, exclude: str | Sequence[str] = (), time_limit: float = 40.0
) -> Module:
    """A smaller copy without the units that are pruned as a whole; it computes the same.

    A unit goes if it is zero behind every layer that writes it, whose weights, biases and norms are all zero there, or
    if no layer that reads it has weights for it; together with all units that are tied to it by additions and the like;
    then those that can go now that these are gone. Outputs of the network never go, and one unit of a layer always
    stays. The copy's outputs are compared with the module's, on the example and on a disturbed one. It trains on,
    exports and saves as any other module does.

    Args:
        module: Any module. It is not changed.
        example_inputs: What it takes: one tensor, a tuple of arguments, or a mapping of keyword arguments.
        exclude: Globs of layer names whose units stay.
        time_limit: Seconds after which a module is refused that torch-pruning has not come to an end with.

    Returns:
        The copy, on the same device, in the same mode, with parameters that require gradients as before.

    Raises:
        ModuleNotFoundError: If torch-pruning is not installed: ``pip install "torch-pruning<2"``.
        ValueError: If the module cannot be traced in time, or if the outputs without its pruned units are not those
            with them; the message names module or layers.

    Source: Fang et al., *DepGraph: Towards Any Structural Pruning*, CVPR 2023, arXiv 2301.12900, for the graph.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with torch.no_grad():
        ...     _ = model[0].weight[3:].zero_(), model[0].bias[3:].zero_()
        >>> [tuple(p.shape) for p in shrink(model, torch.randn(1, 4)).parameters()]
        [(3, 4), (3,), (2, 3), (2,)]
    """
    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    kind = type(module).__name__
    new_graph("shrink")  # what is missing is said at once
    with torch.inference_mode(False):
        copy, inputs = copy_of(module), _plain(example_inputs)
        with evaluating(copy):
            expected = _outputs(copy, inputs)
        if differs := _differs(copy, inputs, expected):
            raise ValueError(f"{kind} is refused: called twice on the same inputs, {differs}.")
        with within(time_limit, copy):
            small, removed = _proved(copy, inputs, expected, patterns)
        for name, parameter in small.named_parameters():
            parameter.requires_grad_(module.get_parameter(name).requires_grad)
    counts = [sum(parameter.numel() for parameter in of.parameters()) for of in (small, module)]
    units = sum(map(len, removed.values()))
    log.info("shrink: %d units of %d layers removed, %d of %d parameters stay", units, len(removed), *counts)
    return small


def _proved(
    module: Module, inputs: Any, expected: list[list[Tensor]], exclude: list[str]
) -> tuple[Module, dict[str, list[int]]]:
    """A copy whose outputs are those of the module, and which units are gone, by layer."""
    while True:
        small, removed, groups = _without_pruned_units(module, inputs, exclude)
        if not removed or _differs(small, inputs, expected) is None:
            _tell_constants(groups)
            return small, removed
        exclude = exclude + _outputs_among(module, inputs, expected, removed, exclude)


def _without_pruned_units(
    module: Module, inputs: Any, exclude: Sequence[str], only: str | None = None
) -> tuple[Module, dict[str, list[int]], list[Group]]:
    """A copy without them, which ones are gone, by layer, and the groups that stay; `only` looks at one layer."""
    small, gone, groups = copy_of(module), dict[str, list[int]](), list[Group]()
    with evaluating(small), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch-pruning thinks aloud
        while True:
            try:
                graph, names = graph_of(small, inputs, "shrink"), {part: name for name, part in small.named_modules()}
            except ValueError:
                if gone:  # it worked before: the outputs will tell which layers could not do without their units
                    return small, gone, groups
                raise
            groups = [group for group in groups_of(graph, names) if not _is_left(group, exclude, only)]
            _check(groups)
            found = {group.name: units for group in groups if (units := group.removable)}
            found = {name: units for name, units in found.items() if _remove(graph, small, name, units)}
            for name, units in found.items():
                gone[name] = gone.get(name, []) + units
            if not found or only is not None:
                return small, gone, groups


def _is_left(group: Group, exclude: Sequence[str], only: str | None) -> bool:
    """Whether the units of a group stay whatever they are."""
    return only not in (None, group.name) or any(fnmatchcase(name, glob) for name in group.layers for glob in exclude)


def _remove(graph: Any, module: nn.Module, name: str, units: list[int]) -> bool:
    """Take units of a layer, and all that are tied to them, out of the module; False where a layer would be empty."""
    layer = module.get_submodule(name)
    try:
        group = graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels, units)
        if not graph.check_pruning_group(group):
            return False
        group.prune()
    except Exception as error:
        raise ValueError(
            f"{name}: its pruned units cannot be removed ({type(error).__name__}: {error}); leave them with "
            f"exclude={name!r}."
        ) from error
    return True


def _check(groups: Sequence[Group]) -> None:
    """Raise where units are pruned, and going would change what a layer makes of the others."""
    for group in groups:
        if group.mixing is not None and not group.is_output and bool(group.zero.any()):
            raise ValueError(
                f"{group.name}: {int(group.zero.sum())} of its units are pruned, but {group.mixing} computes what it "
                f"reads or writes together, so that single units cannot go; leave them with exclude={group.name!r}."
            )


def _tell_constants(groups: Sequence[Group]) -> None:
    held = {group.name: group.constant for group in groups if group.mixing is None and group.constant}
    if held:
        warnings.warn(
            f"{sum(held.values())} units have no weights left but a bias or norm that is not zero, and so stay, in "
            f"{', '.join(held)}: what they pass on is constant, but not zero. Set bias and norm of a unit to zero with "
            "its weights.",
            stacklevel=5,
        )


def _outputs_among(
    module: nn.Module, inputs: Any, expected: list[list[Tensor]], layers: Mapping[str, list[int]],
    exclude: Sequence[str],
) -> list[str]:  # fmt: skip
    """The layers without whose units the outputs have other shapes: they are outputs, and stay.

    Raises:
        ValueError: If it is the values that differ, with the layers' names.
    """
    shapes, values = [], {}
    for name in layers:
        small, removed, _ = _without_pruned_units(module, inputs, exclude, only=name)
        differs = _differs(small, inputs, expected) if removed else None
        if differs == "other shapes":
            shapes.append(name)
        elif differs is not None:
            values[name] = differs
    if values or not shapes:
        told = "; ".join(f"{name}: {differs}" for name, differs in values.items()) or ", ".join(layers)
        raise ValueError(
            f"The outputs without the pruned units are not those with them ({told}). Something behind these layers "
            "does not keep zeros, as Sigmoid does not, or remembers a size; leave them with "
            f"exclude={list(values or layers)}."
        )
    return shapes


def _differs(module: nn.Module, inputs: Any, expected: list[list[Tensor]]) -> str | None:
    """How the outputs differ from those expected; None if they do not."""
    try:
        with evaluating(module):
            found = _outputs(module, inputs)
    except Exception as error:
        return f"{type(error).__name__} ({str(error).splitlines()[0] if str(error) else 'no message'})"
    if [len(tensors) for tensors in found] != [len(tensors) for tensors in expected]:
        return "other shapes"
    for ours, theirs in zip(chain(*found), chain(*expected), strict=True):
        if ours.shape != theirs.shape:
            return "other shapes"
        if not ours.numel():
            continue
        scale = max(1.0, float(theirs.abs().max()))
        step = torch.finfo(theirs.dtype).eps if theirs.is_floating_point() else 0.0
        allowed = max(CLOSE, ROUNDINGS * step if step > 1e-6 else 0.0) * scale
        distance = torch.where(ours == theirs, 0, (ours - theirs).abs().double()).nan_to_num(nan=0.0)
        if not torch.equal(ours.isnan(), theirs.isnan()) or float(distance.max()) > allowed:
            return f"outputs differ by {float(distance.max()):.2g}"
    return None


def _outputs(module: nn.Module, inputs: Any) -> list[list[Tensor]]:
    """The outputs on the example, and on a disturbed one if the module takes it."""
    with torch.no_grad():
        outputs = [tensors_in(call(module, inputs))]
        try:
            outputs.append(tensors_in(call(module, _disturbed(inputs))))
        except (ValueError, RuntimeError, IndexError, AssertionError):
            outputs.append([])
    return outputs


def _plain(value: Any) -> Any:
    """Inputs that gradients can be traced through, whatever mode they were made in."""
    return each_tensor(value, lambda tensor: tensor.detach().clone())


def _disturbed(value: Any) -> Any:
    """Inputs with noise of their own size added; whole numbers stay."""
    generator = torch.Generator().manual_seed(0)

    def disturb(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        size = float(tensor.double().std(correction=0)) if tensor.numel() else 0.0
        noise = torch.randn(tensor.shape, generator=generator).to(tensor)
        return tensor + (size if 0 < size < float("inf") else 1.0) * noise

    return each_tensor(value, disturb)
