"""Trials of a schedule: what it will do is seen on a copy, so that nothing live moves."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sap.rewind.ticks import Ticks


def take_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Copies of the options of each parameter group (learning rate, momentum, weight decay, …)."""
    return [copy.deepcopy({key: v for key, v in group.items() if key != "params"}) for group in optimizer.param_groups]


@dataclass(frozen=True)
class Trial:
    """What a schedule does when it is left alone.

    Attributes:
        rates: Learning rate (summed over the groups) at each tick.
        ended: Whether the schedule ended before the ticks did.
        changed: The options of the parameter groups that it changes.
    """

    rates: list[float]
    ended: bool
    changed: frozenset[str]


def try_schedule(
    scheduler: Any, first: dict[str, Any], groups: Sequence[dict[str, Any]], ticks: Ticks, length: int
) -> Trial | None:
    """Step a copy of a schedule through so many ticks, from its first state; None if there can be no copy.

    The copy has an optimizer of its own, with the same options and without the parameters.
    """
    try:
        twin = _copy_of(scheduler, groups)
        twin.load_state_dict(copy.deepcopy(first))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the optimizer has not stepped yet
            return _run(twin, ticks, length)
    except Exception:  # the schedule may be a user's own, which can need anything that a copy does not have
        return None


def _copy_of(scheduler: Any, groups: Sequence[dict[str, Any]]) -> Any:
    optimizer = Optimizer([nn.Parameter(torch.zeros(1))], {})
    optimizer.param_groups = [{**copy.deepcopy(group), "params": [nn.Parameter(torch.zeros(1))]} for group in groups]
    return copy.deepcopy(scheduler, {id(scheduler.optimizer): optimizer})


def _run(twin: Any, ticks: Ticks, length: int) -> Trial:
    groups = twin.optimizer.param_groups
    before, last_call = take_groups(twin.optimizer), getattr(twin, "total_steps", None)
    rates: list[float] = []
    changed: set[str] = {"lr"}
    calls = 0
    for tick in range(length):
        due = ticks.calls(tick)
        if last_call is not None and due >= last_call:
            return Trial(rates, True, frozenset(changed))
        try:
            for _ in range(due - calls):
                twin.step()
        except ValueError:  # a schedule that refuses to go beyond its end
            return Trial(rates, True, frozenset(changed))
        if due > calls:
            changed |= _differing(before, groups)
        calls = due
        rates.append(sum(float(group["lr"]) for group in groups))
    return Trial(rates, False, frozenset(changed))


def _differing(before: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]]) -> set[str]:
    return {
        key
        for old, new in zip(before, groups, strict=True)
        for key, value in new.items()
        if key != "params" and (key not in old or not _equal(old[key], value))
    }


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return bool(one == other)
