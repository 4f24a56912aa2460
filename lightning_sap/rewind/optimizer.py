"""What an optimizer keeps beside the weights: made fresh, and zero where weights are pruned."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sap.engine.masks import zero_
from lightning_sap.rewind.kept import (
    OF_EVERY_OPTIMIZER,
    Kept,
    arguments_of,
    attributes_of,
    base_optimizers,
    everything_kept,
    is_plain,
    kept_in,
    options_of,
    parameters_of,
    parts_of,
    remembers,
    tensors_in,
)
from lightning_sap.sharding import local

OF_SCHEDULES = frozenset({"lr", "initial_lr"})


class OptimizerMemory:
    """What an optimizer, with all that it wraps, keeps before its first step; to be taken then.

    That is its ``state``, and those numbers and tensors of its parameter groups and attributes that are no arguments of
    its constructor: Prodigy's ``d``, a count of steps, slow weights. Truth values are modes, as schedule-free's
    ``train_mode``, and stay as they are.

    Args:
        optimizer: The optimizer, not stepped yet.
        leave: Further keys of the parameter groups to leave alone: those that a schedule changes.

    Example:
        >>> import torch
        >>> from torch import nn, optim
        >>> layer = nn.Linear(1, 1)
        >>> adam = optim.Adam(layer.parameters())
        >>> memory = OptimizerMemory(adam)
        >>> layer(torch.ones(1)).sum().backward()
        >>> _ = adam.step()
        >>> len(adam.state)
        2
        >>> memory.reset_()
        >>> len(adam.state)
        0
    """

    def __init__(self, optimizer: Optimizer, leave: Collection[str] = ()) -> None:
        self._optimizers = base_optimizers(optimizer)
        self._leave = {"params", *OF_SCHEDULES, *leave}
        self._copies = _copies_of_weights(self._optimizers)
        self._states = [self._copied(dict(each.state)) for each in self._optimizers]
        self._groups = [[self._copied(options_of(group)) for group in each.param_groups] for each in self._optimizers]
        self._attributes = [self._copied(self._own(each)) for each in self._optimizers]

    def reset_(self) -> None:
        """Put all of it back; copies of weights, such as slow ones, become copies of the weights as they are now."""
        every = zip(self._optimizers, self._states, self._groups, self._attributes, strict=True)
        for optimizer, state, groups, attributes in every:
            fresh = self._fresh_state(optimizer, state)
            optimizer.state.clear()
            optimizer.state.update(fresh)
            for i, group in enumerate(optimizer.param_groups):
                # a group that was added since began with the defaults, and like the others
                first = groups[i] if i < len(groups) else {**(groups or [{}])[0], **options_of(optimizer.defaults)}
                self._restore_(group, first, [key for key in group if not self._is_option(key)])
            own, arguments = vars(optimizer), arguments_of(optimizer)
            self._restore_(own, attributes, [key for key in own if key not in OF_EVERY_OPTIMIZER | arguments])
        with torch.no_grad():
            for kept in self._kept_copies():
                local(kept.tensor).copy_(local(kept.parameter))

    def _fresh_state(self, optimizer: Optimizer, first: Mapping[Any, Any]) -> dict[Any, Any]:
        fresh: dict[Any, Any] = self._copied(first)
        for parameter, state in optimizer.state.items():
            if parameter not in fresh and isinstance(state, Mapping):  # it was added since
                slow = {key: torch.clone(state[key]) for key in state if f"state.{key}" in self._copies}
                fresh |= {parameter: slow} if slow else {}
        return fresh

    def _restore_(self, live: dict[str, Any], first: Mapping[str, Any], keys: Iterable[str]) -> None:
        """Put back what counts or remembers, in place where it is a tensor that a captured step may hold on to."""
        for key in keys:
            value = first.get(key)
            if not (remembers(live[key]) or remembers(value)):
                continue
            if isinstance(live[key], Tensor) and isinstance(value, Tensor) and live[key].shape == value.shape:
                with torch.no_grad():
                    local(live[key]).copy_(local(value))
            elif key in first:
                live[key] = self._copied(value)
            else:
                del live[key]

    def _is_option(self, key: str) -> bool:
        """Whether the user or a schedule sets it, and not the optimizer by itself."""
        if key in self._leave:
            return True
        # the groups are shared, and a wrapper's argument may have the name of a base optimizer's count
        knowing = [each for each in self._optimizers if key in each.defaults]
        return any(key in arguments_of(each) for each in knowing[-1:] or self._optimizers)

    def _own(self, optimizer: Optimizer) -> dict[str, Any]:
        return {key: value for key, value in attributes_of(optimizer).items() if is_plain(value)}

    def _kept_copies(self) -> Iterator[Kept]:
        for optimizer in self._optimizers:
            yield from (kept for kept in everything_kept(optimizer) if kept.place in self._copies)

    def _copied(self, value: Any) -> Any:
        """A deep copy, in which the parameters are the live ones."""
        known = {id(p): p for optimizer in self._optimizers for p in parameters_of(optimizer)}
        # a slow copy of a weight may hang on it by a graph, which PyTorch refuses to copy
        graphs = {id(t): t.detach().clone() for t in tensors_in(value) if not t.is_leaf}
        return copy.deepcopy(value, {**graphs, **known})


def zero_pruned_(optimizers: Iterable[Optimizer], pruned: Mapping[Tensor, Tensor]) -> None:
    """Set what optimizers, with all that they wrap, keep for pruned weights to zero, in place.

    That is each floating-point tensor that has the parameter's shape, its length, or the length of all parameters of
    its group one after the other, as LBFGS keeps them. Other tensors, as rows and columns of Adafactor, are no matter
    of single weights. What :func:`cannot_zero` names stays as it is.

    Args:
        optimizers: The optimizers.
        pruned: By parameter a bool tensor, sharded as it is, True where it is pruned.

    Example:
        >>> import torch
        >>> from torch import nn, optim
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> sgd = optim.SGD(layer.parameters(), momentum=0.9)
        >>> layer(torch.ones(2)).sum().backward()
        >>> _ = sgd.step()
        >>> zero_pruned_([sgd], {layer.weight: torch.tensor([[True, False]])})
        >>> sgd.state[layer.weight]["momentum_buffer"]
        tensor([[0., 1.]])
    """
    every = {id(each): each for optimizer in optimizers for each in base_optimizers(optimizer)}
    with torch.no_grad():
        for optimizer in every.values():
            if cannot_zero(optimizer):
                continue
            joined = _joined(optimizer, pruned)
            for kept in everything_kept(optimizer):
                tensor = local(kept.tensor)
                where = _places(tensor, pruned.get(kept.parameter), joined.get(id(kept.parameter)))
                if where is not None and tensor.is_floating_point() and type(tensor) in (Tensor, nn.Parameter):
                    zero_(tensor, where)


def cannot_zero(optimizer: Optimizer) -> str | None:
    """Why single weights have no place in what an optimizer itself keeps, as a sentence; None if they have.

    SOAP, Shampoo, Kron and GaLore keep matrices that turn the axes of a gradient. What they keep besides may lie along
    the turned axes, and a zero there is a division by zero.
    """
    name = type(optimizer).__name__
    for kept in kept_in(optimizer.state, "state", parameters_of(optimizer)):
        axes = iter(kept.parameter.shape)
        if kept.tensor.dim() > 1 and not all(size in axes for size in kept.tensor.shape if size > 1):
            return f"{name} mixes the places of a weight by the matrices in {kept.place!r}"
    for state in optimizer.state.values():
        for key, value in state.items() if isinstance(state, Mapping) else ():
            if not is_plain(value):
                return f"{name} keeps {type(value).__name__} objects in 'state.{key}'"
    return None


def cannot_reset(optimizer: Optimizer) -> str | None:
    """What :class:`OptimizerMemory` cannot make fresh, as a sentence; None if it can make all of it fresh.

    Those are tensors in attributes that are other objects than numbers, tensors and containers of them.
    """
    for each in base_optimizers(optimizer):
        known = {id(parameter) for parameter in parameters_of(each)}
        for name, value in attributes_of(each).items():
            if not is_plain(value) and _hides_tensors(value, known):
                kind = type(value).__name__
                return f"{type(each).__name__} keeps tensors in its attribute {name!r} ({kind}), which stay as they are"
    return None


def _copies_of_weights(optimizers: Iterable[Optimizer]) -> set[str]:
    """Places where every tensor equals its parameter, and not all are zero."""
    equal: dict[str, list[bool]] = {}
    nonzero: set[str] = set()
    for kept in (kept for optimizer in optimizers for kept in everything_kept(optimizer)):
        tensor, parameter = local(kept.tensor), local(kept.parameter.detach())
        same = tensor.shape == parameter.shape and bool((tensor == parameter).all())
        equal.setdefault(kept.place, []).append(same)
        if same and tensor.any():
            nonzero.add(kept.place)
    return {place for place in nonzero if all(equal[place])}


def _joined(optimizer: Optimizer, pruned: Mapping[Tensor, Tensor]) -> dict[int, Callable[[int], Tensor | None]]:
    """By parameter the flags of its whole group one after the other, if a vector has that length."""

    def of(parameters: list[Tensor]) -> Callable[[int], Tensor | None]:
        @functools.cache  # LBFGS keeps many of that length
        def flags(length: int) -> Tensor | None:
            if length != sum(local(p).numel() for p in parameters) or not any(p in pruned for p in parameters):
                return None
            parts = [
                local(pruned[p]) if p in pruned else torch.zeros_like(local(p), dtype=torch.bool) for p in parameters
            ]
            return torch.cat([part.reshape(-1) for part in parts])

        return flags

    return {id(p): of(group["params"]) for group in optimizer.param_groups for p in group["params"]}


def _places(tensor: Tensor, flags: Tensor | None, joined: Callable[[int], Tensor | None] | None) -> Tensor | None:
    """Where a tensor holds something for pruned weights; None where that cannot be said of single places."""
    if flags is not None and tensor.shape == local(flags).shape:
        return local(flags)
    if tensor.dim() != 1:
        return None
    if flags is not None and tensor.numel() == local(flags).numel():
        return local(flags).reshape(-1)
    return joined(tensor.numel()) if joined is not None else None


def _hides_tensors(value: Any, known: Collection[int], depth: int = 3) -> bool:
    """Whether an object holds a tensor that is no parameter; not asked are modules, functions and other optimizers."""
    if isinstance(value, Tensor):
        return id(value) not in known
    if depth == 0 or isinstance(value, (nn.Module, Optimizer, type)):
        return False
    own = () if callable(value) else getattr(value, "__dict__", {}).values()
    return any(_hides_tensors(part, known, depth - 1) for part in (*parts_of(value), *own))
