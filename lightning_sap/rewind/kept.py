"""What an optimizer holds, and for which parameter."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

SERIES = (list, tuple, deque)
OF_EVERY_OPTIMIZER = frozenset({"state", "param_groups", "defaults"})


class Kept(NamedTuple):
    """A tensor that an optimizer keeps for a parameter, and where: such as ``state.exp_avg``."""

    place: str
    parameter: Tensor
    tensor: Tensor


def base_optimizers(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer and those that it wraps, in any of its attributes, each once; the outermost comes first.

    Example:
        >>> from torch import nn, optim
        >>> [type(each).__name__ for each in base_optimizers(optim.Adam(nn.Linear(1, 1).parameters()))]
        ['Adam']
    """
    found: dict[int, Optimizer] = {}
    waiting = [optimizer]
    while waiting:
        each = waiting.pop(0)
        if id(each) not in found:
            found[id(each)] = each
            waiting += optimizers_in(attributes_of(each))
    return list(found.values())


def everything_kept(optimizer: Optimizer) -> Iterator[Kept]:
    """Every tensor that an optimizer itself keeps for a parameter."""
    yield from kept_in(optimizer.state, "state", parameters_of(optimizer))
    for group in optimizer.param_groups:
        yield from kept_in(options_of(group), "group", group["params"])
    yield from kept_in(attributes_of(optimizer), "attribute", parameters_of(optimizer))


def kept_in(value: Any, place: str, parameters: list[Tensor], of: Tensor | None = None) -> Iterator[Kept]:
    """Tensors in containers, of the parameter that a mapping has as key, or that has the same place in a series."""
    if isinstance(value, Tensor):
        if of is not None and value is not of:
            yield Kept(place, of, value)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            is_parameter = isinstance(key, Tensor)
            inner = place if is_parameter else f"{place}.{key}"
            yield from kept_in(part, inner, parameters, key if is_parameter else of)
    elif isinstance(value, SERIES):
        flat = list(_flat(value))
        if of is None and [getattr(t, "shape", None) for t in flat] == [p.shape for p in parameters]:
            yield from (Kept(place, p, t) for p, t in zip(parameters, flat, strict=True) if t is not p)
        else:
            for part in value:
                yield from kept_in(part, place, parameters, of)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, SERIES):
        for part in value:
            yield from _flat(part)
    else:
        yield value


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Its parameters, group after group."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group without its parameters."""
    return {key: value for key, value in group.items() if key != "params"}


def attributes_of(optimizer: Optimizer) -> dict[str, Any]:
    """What it has besides what every optimizer has."""
    return {key: value for key, value in vars(optimizer).items() if key not in OF_EVERY_OPTIMIZER}


def arguments_of(optimizer: Optimizer) -> set[str]:
    """What the constructors of its classes take."""
    constructors = [vars(kind)["__init__"] for kind in type(optimizer).__mro__[:-1] if "__init__" in vars(kind)]
    return {name for constructor in constructors for name in inspect.signature(constructor).parameters}


def parts_of(value: Any) -> Iterable[Any]:
    """What a container holds."""
    return value.values() if isinstance(value, Mapping) else value if isinstance(value, SERIES) else ()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors in containers, however deep."""
    if isinstance(value, Tensor):
        yield value
    for part in parts_of(value):
        yield from tensors_in(part)


def optimizers_in(value: Any) -> list[Optimizer]:
    """Optimizers in containers, however deep."""
    if isinstance(value, Optimizer):
        return [value]
    return [optimizer for part in parts_of(value) for optimizer in optimizers_in(part)]


def is_plain(value: Any) -> bool:
    """Whether it is a number, a text, a tensor, or a container of these."""
    if isinstance(value, (Mapping, *SERIES)):
        return all(map(is_plain, parts_of(value)))
    return value is None or isinstance(value, (bool, int, float, complex, str, Tensor))


def remembers(value: Any) -> bool:
    """Whether a step may have changed it: a number or a tensor, or a container with one."""
    if isinstance(value, (Mapping, *SERIES)):
        return is_plain(value) and any(map(remembers, parts_of(value)))
    return isinstance(value, (int, float, complex, Tensor)) and not isinstance(value, bool)
