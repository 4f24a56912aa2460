"""HIDDEN: tensors beside the parameters: buffers, and what parts of a module hold in plain attributes."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_sap.engine.weights import COMPILE_PREFIX

DEPTH = 5  # objects within objects that are searched
LONGEST = 10_000  # longer lists are data
REGISTERED = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
OTHERS = ("lightning.", "pytorch_lightning.", "torch.", "torchmetrics.", "builtins.")  # hold no averages


def hidden_tensors(module: nn.Module, holders: Mapping[str, object] | None = None) -> dict[str, Tensor]:
    """The floating-point tensors of a module that are none of its parameters, by the paths to them.

    They are its buffers, and whatever its parts, or other objects, keep in plain attributes: tensors, modules, objects
    with these, and lists, tuples and dicts of them. A network that averages another is often kept like that, so that
    no optimizer sees it.

    Args:
        module: The module.
        holders: Other objects to search, by the names that begin their paths.

    Example:
        >>> import torch
        >>> module = nn.Linear(4, 2)
        >>> module.register_buffer("ema_weight", torch.zeros(2, 4))
        >>> module.average = [nn.Linear(4, 2, bias=False)]
        >>> list(hidden_tensors(module))
        ['ema_weight', 'average.0.weight']
    """
    seen = {id(parameter) for parameter in module.parameters()} | {id(part) for part in module.modules()}
    found = buffers(module)
    seen |= {id(buffer) for buffer in found.values()}
    roots: dict[str, object] = {path: part for path, part in module.named_modules()}
    for path, root in {**roots, **(holders or {})}.items():
        for key, value in list(getattr(root, "__dict__", {}).items()):
            if key not in REGISTERED and not _is_computed(root, key):
                found.update(_search(_clean(f"{path}.{key}"), value, seen, DEPTH))
    return found


def _is_computed(root: object, key: str) -> bool:
    """Whether it is what a layer computes from its parameter at each forward, as the old weight_norm keeps it."""
    own = root._parameters if isinstance(root, nn.Module) else {}
    return f"{key}_v" in own or f"{key}_orig" in own


def buffers(module: nn.Module) -> dict[str, Tensor]:
    """The floating-point buffers of a module, by the names that they have without compilation."""
    return {_clean(name): buffer for name, buffer in module.named_buffers() if _has_values(buffer)}


def _search(path: str, value: Any, seen: set[int], depth: int) -> Iterator[tuple[str, Tensor]]:
    if id(value) in seen or not depth:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        if _has_values(value):
            yield path, value
    elif isinstance(value, nn.Module):
        for key, each in itertools.chain(value.named_parameters(), value.named_buffers()):
            yield from _search(_clean(f"{path}.{key}"), each, seen, depth)
    elif isinstance(value, (list, tuple, dict)) and len(value) <= LONGEST:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, each in list(items):
            yield from _search(f"{path}.{key}", each, seen, depth - 1)
    elif _is_plain(value):
        for key, each in list(vars(value).items()):
            yield from _search(f"{path}.{key}", each, seen, depth - 1)


def _has_values(tensor: Tensor) -> bool:
    return not (is_lazy(tensor) or tensor.is_meta) and tensor.is_floating_point()


def _is_plain(value: Any) -> bool:
    """Whether it is an object of the user's, or of a package that may keep averages."""
    if isinstance(value, (Optimizer, type, *weakref.ProxyTypes)) or not hasattr(value, "__dict__"):
        return False
    return not any(f"{kind.__module__}.".startswith(OTHERS) for kind in type(value).__mro__[:-1])


def _clean(path: str) -> str:
    return path.lstrip(".").replace(COMPILE_PREFIX, "")
