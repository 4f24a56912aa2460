"""Schedules that look outside: at the module or the Trainer, whose values no trial can foresee."""

from __future__ import annotations

import dis
import functools
import inspect
import math
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sap.rewind import Obstacle

KINDS = {"LightningModule", "LightningDataModule", "Trainer", "Callback"}  # of Lightning; any has the Trainer at hand
# What they hold and training does not move.
STEADY = {"trainer", "hparams", "max_epochs", "max_steps", "estimated_stepping_batches", *dir(math)}
DEPTH = 12  # objects within objects that are searched
OPAQUE = (Tensor, nn.Module, Optimizer, types.ModuleType, type, str, bytes, int, float)


def obstacle_to(scheduler: Any) -> Obstacle | None:
    """Why no round can replay this schedule, where it looks outside."""
    own = [kind for kind in type(scheduler).__mro__ if not kind.__module__.startswith(("torch.", "builtins"))]
    methods = [value for kind in own for value in vars(kind).values() if isinstance(value, types.FunctionType)]
    if not _looks_outside([scheduler, *methods], set()):
        return None
    return Obstacle(
        "it looks at the module or the Trainer, whose values no trial knows",
        "Write it as a function of its own steps alone, with plain numbers for all else",
    )


def overrides_step(module: LightningModule) -> bool:
    """Whether the module steps its schedules in an ``lr_scheduler_step`` of its own."""
    return not _hook(module).__module__.startswith(("lightning.", "pytorch_lightning."))


def sets_by_epoch(module: LightningModule, scheduler: Any) -> bool:
    """Whether that hook sets the schedule by an epoch that is not the schedule's own, as far as its code tells."""
    code = getattr(_hook(module), "__code__", None)
    if code is not None and "current_epoch" in _names(code):
        return True
    first = next(iter(inspect.signature(scheduler.step).parameters.values()), None)
    return first is not None and first.default is first.empty  # timm's: `step(epoch)`


def _hook(module: LightningModule) -> Any:
    return inspect.unwrap(getattr(module.lr_scheduler_step, "__func__", module.lr_scheduler_step))


def _looks_outside(value: Any, seen: set[int], depth: int = DEPTH) -> bool:
    if id(value) in seen or not depth:
        return False
    seen.add(id(value))
    if isinstance(value, weakref.ref):
        value = value()
    if _is_lightning(value):
        return True
    if isinstance(value, types.FunctionType):
        reached = dict(_reached(value))
        lightning = [each for each in reached.values() if _is_lightning(each)]
        if lightning and _is_steady(value.__code__, lightning):
            reached = {name: each for name, each in reached.items() if not _is_lightning(each)}
        return any(_looks_outside(each, seen, depth - 1) for each in reached.values())
    return any(_looks_outside(each, seen, depth - 1) for each in _parts(value))


def _is_lightning(value: Any) -> bool:
    """By the class that it names, which a weak proxy shares with what it stands for; of either package."""
    packages = ("lightning.", "pytorch_lightning.")
    kinds = value.__class__.__mro__
    return any(kind.__name__ in KINDS and kind.__module__.startswith(packages) for kind in kinds)


def _is_steady(code: types.CodeType, objects: list[Any]) -> bool:
    """Whether a function reads of these objects only what training does not move."""
    hparams = {key for each in objects for key in getattr(each, "hparams", {})}
    read = {
        instruction.argval
        for part in _codes(code)
        for instruction in dis.get_instructions(part)
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD")
    }
    return read <= STEADY | hparams


def _reached(function: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """What a function can reach: closure, defaults, and the globals that it names."""
    assert isinstance(function, types.FunctionType)
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        yield name, _content(cell)
    yield "its defaults", function.__defaults__
    yield "its keywords", function.__kwdefaults__
    for name in _names(code) & function.__globals__.keys():
        value = function.__globals__[name]
        own = not isinstance(value, types.FunctionType) or value.__globals__ is function.__globals__
        if own:  # not into the code of libraries
            yield f"global {name}", value


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (list, tuple, set)):
        yield from value
    elif not isinstance(value, OPAQUE) and hasattr(value, "__dict__"):  # a nested schedule, a callable object
        yield from vars(value).values()


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _names(code: types.CodeType) -> set[str]:
    return {name for part in _codes(code) for name in part.co_names}
