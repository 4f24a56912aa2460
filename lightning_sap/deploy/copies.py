"""Copies of a module, how to call it on example inputs, and which axis of its weights is the output channel."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from lightning_sap.engine.weights import groups_on_axis_1

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


def output_axes(module: nn.Module) -> dict[str, int]:
    """By name the parameters whose output channel is axis 1: those of transposed convolutions, and of ``Conv1D``."""
    return {
        f"{name}.weight" if name else "weight": 1 for name, part in module.named_modules() if groups_on_axis_1(part)
    }


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
