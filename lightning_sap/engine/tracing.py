"""TRACE: a module is copied, called on example inputs, and followed by torch-pruning, within a time limit."""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)

Module = TypeVar("Module", bound=nn.Module)


def copy_of(module: Module) -> Module:
    """A deep copy of a module.

    Raises:
        ValueError: If it holds what cannot be copied.
    """
    try:
        return copy.deepcopy(module)
    except (TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{type(module).__name__} cannot be copied: {error}") from error


def call(module: nn.Module, inputs: Any) -> Any:
    """What the module says of example inputs: one argument, a tuple or list of them, or a mapping of names to them."""
    if isinstance(inputs, Mapping):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple | list) else module(inputs)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """All parts in evaluation mode; afterwards each in the mode that it was in."""
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in training.items():
            part.training = mode


def each_tensor(value: Any, change: Any) -> Any:
    """Nested inputs with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: each_tensor(part, change) for name, part in value.items()}
    return type(value)(each_tensor(part, change) for part in value) if type(value) in (list, tuple) else value


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of nested inputs or outputs, in order."""
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in inner for tensor in tensors_in(part)]


def new_graph(purpose: str) -> Any:
    """An empty dependency graph of torch-pruning.

    Raises:
        ModuleNotFoundError: If that is not installed; it says what for it is needed.
    """
    try:
        from torch_pruning import DependencyGraph
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{purpose} needs torch-pruning: pip install "torch-pruning<2".') from error
    return DependencyGraph()


def graph_of(module: nn.Module, inputs: Any, purpose: str) -> Any:
    """The dependency graph of a module, all of whose parameters then require gradients.

    Raises:
        ValueError: If torch-pruning cannot trace it; it names the module.
    """
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)  # it follows the gradients
    try:
        with torch.enable_grad():
            graph = new_graph(purpose).build_dependency(module, inputs, forward_fn=call, verbose=False)
        if not any(isinstance(part, LAYERS) for part in graph.module2node):
            raise RuntimeError("no gradient leads from the outputs to a Linear or a convolution")
        return graph
    except Exception as error:
        raise ValueError(
            f"{type(module).__name__} is refused: torch-pruning cannot trace it ({type(error).__name__}: {error})."
        ) from error


class LateError(BaseException):
    """The time is over; no handler of exceptions on the way keeps it."""


@contextmanager
def within(seconds: float, module: nn.Module) -> Iterator[None]:
    """Refuse the module when the time is over; it is looked at whenever a function of torch-pruning is called.

    No other function is left by an exception: in a finalizer or a callback of the garbage collector it would be lost.

    Raises:
        ValueError: If the block takes longer; it names the module.
    """
    import torch_pruning

    end, theirs = time.monotonic() + seconds, os.path.dirname(torch_pruning.__file__)

    def look(frame: FrameType, event: str, argument: Any) -> None:  # noqa: ARG001
        if time.monotonic() > end and frame.f_code.co_filename.startswith(theirs):
            raise LateError

    before = sys.gettrace()
    sys.settrace(look)
    try:
        yield
    except LateError as error:
        kind = type(module).__name__
        raise ValueError(
            f"{kind} is refused: torch-pruning did not come to an end with it within {seconds:g} seconds."
        ) from error
    finally:
        sys.settrace(before)
