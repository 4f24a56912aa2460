"""ENDS: which parameters act on the inputs of a module and which compute its outputs, read off a forward's graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_sap.engine.tracing import call, each_tensor, evaluating, tensors_in
from lightning_sap.sharding import is_sharded

MANY = frozenset({-1, -2})  # the hosts of a part of the graph, where there are more than one


class Ends(NamedTuple):
    """Ids of the parameters at both ends of a module."""

    inputs: frozenset[int]
    outputs: frozenset[int]


class _Part(NamedTuple):
    """What lies below a node of the graph.

    Attributes:
        hosts: The hosts of parameters.
        parameters: Where it is one host, its parameters.
        data: Whether inputs of the module do.
    """

    hosts: frozenset[int] = frozenset()
    parameters: frozenset[int] = frozenset()
    data: bool = False

    @property
    def is_weight(self) -> bool:
        """Whether it is what one layer computes with, not what it computes."""
        return len(self.hosts) == 1 and not self.data


def ends_of(module: nn.Module, example_inputs: Any, hosts: Mapping[int, int]) -> Ends | None:
    """The parameters at both ends of a module; None where a forward on the example does not tell.

    A parameter computes an output if nothing but operations without parameters of two axes comes behind it, and acts
    on an input if none comes before it. The module is called once, in evaluation mode, and left as it was.

    Args:
        module: The module.
        example_inputs: What it takes: a tensor, a tuple of arguments or a mapping of keyword arguments.
        hosts: By the id of each parameter of two or more axes, what tells its layer from others.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
        >>> weights = [net[0].weight, net[2].weight, net[3].weight]
        >>> found = ends_of(net, torch.zeros(1, 4), {id(weight): i for i, weight in enumerate(weights)})
        >>> found == (frozenset({id(weights[0])}), frozenset({id(weights[2])}))
        True
    """
    parameters = list(module.parameters())
    if any(map(is_sharded, parameters)) or any(isinstance(p, nn.UninitializedParameter) for p in parameters):
        return None
    flags = [parameter.requires_grad for parameter in parameters]
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    device = next((parameter.device for parameter in parameters), torch.device("cpu"))
    devices = [device] if device.type == "cuda" else []
    try:
        for parameter in parameters:
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
        with evaluating(module), torch.enable_grad(), torch.random.fork_rng(devices):
            inputs = each_tensor(example_inputs, lambda x: _leaf(x, device))
            outputs = call(module, inputs)
    except Exception:  # whatever a user's forward raises: then it does not tell
        return None
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)
        for buffer, before in buffers:
            buffer.copy_(before)
    nodes = [tensor.grad_fn for tensor in tensors_in(outputs) if tensor.grad_fn is not None]
    return _read(nodes, hosts, frozenset(id(tensor) for tensor in tensors_in(inputs))) if nodes else None


def _leaf(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy that is followed in the graph, where it can be."""
    copy = tensor.detach().clone().to(device)
    return copy.requires_grad_(copy.is_floating_point())


def _read(outputs: Collection[Any], hosts: Mapping[int, int], inputs: Collection[int]) -> Ends | None:
    """Both ends of a graph that has these nodes as outputs."""
    parts = _parts(outputs, hosts, inputs)
    first, last = set[int](), set[int]()
    for node, part in parts.items():
        below = [parts[child] for child in _children(node)] if part.data else []
        acting = [each for each in below if each.is_weight]
        if acting and not any(each.hosts for each in below if not each.is_weight):
            first |= set().union(*(each.parameters for each in acting))
    waiting, seen = list(outputs), set[Any]()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        acting = [parts[child] for child in _children(node) if parts[child].is_weight]
        last |= set().union(*(each.parameters for each in acting))
        waiting += [] if acting else _children(node)
    return Ends(frozenset(first), frozenset(last)) if last else None


def _parts(outputs: Collection[Any], hosts: Mapping[int, int], inputs: Collection[int]) -> dict[Any, _Part]:
    """What lies below each node."""
    found: dict[Any, _Part] = {}
    waiting = list(outputs)
    while waiting:
        missing = [child for child in _children(waiting[-1]) if child not in found]
        if missing:
            waiting += missing
            continue
        node = waiting.pop()
        own, below = id(getattr(node, "variable", None)), [found[child] for child in _children(node)]
        data = own in inputs or "Embedding" in type(node).__name__ or any(part.data for part in below)
        if own in hosts:
            found[node] = _Part(frozenset({hosts[own]}), frozenset({own}), data)
            continue
        together = frozenset[int]().union(*(part.hosts for part in below))
        one = frozenset[int]().union(*(part.parameters for part in below)) if len(together) == 1 else frozenset[int]()
        found[node] = _Part(together if len(together) < 2 else MANY, one, data)
    return found


def _children(node: Any) -> list[Any]:
    return [child for child, _ in node.next_functions if child is not None]
