"""DECIDE UNITS: the index of the units' scores says how many of them go, with all that belongs to each."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_sap.engine.decision import Decision, Limits
from lightning_sap.engine.groups import PrunableTensor, Scope, scores_of
from lightning_sap.engine.masks import MaskSet
from lightning_sap.engine.measure import check_finite, summary, sums_of
from lightning_sap.engine.unit_groups import UnitGroup, flagged
from lightning_sap.functional.amount import spread
from lightning_sap.functional.pqi import concatenate, power_sums, total
from lightning_sap.functional.select import smallest
from lightning_sap.policies.base import Policy, Standing, ask

SHARE = 8  # of the units that a floor keeps back, one in so many at a time


class Units(NamedTuple):
    """The units of a group: scores, and which are pruned."""

    group: UnitGroup
    scores: Tensor
    pruned: Tensor


def pruned_units(group: UnitGroup, masks: Mapping[str, Tensor]) -> Tensor:
    """Which units of a group are pruned: by these masks, no weight, bias or norm of theirs is left."""
    pruned = torch.ones(group.size, dtype=torch.bool)
    for place in (*group.rows, *group.companions):
        if place.name not in masks:
            return torch.zeros_like(pruned)
        mask = masks[place.name].movedim(place.axis, 0)
        gone = mask.reshape(len(mask), -1).all(1).cpu()
        pruned[place.units[~gone[place.indices]]] = False
    return pruned


def scores_of_units(group: UnitGroup, tensors: Mapping[str, PrunableTensor], scores: Mapping[str, Tensor]) -> Tensor:
    """Of each unit what the importance makes of its kept weights, by default the L2 norm, summed over its layers.

    Example:
        >>> from torch import nn
        >>> from lightning_sap.engine.unit_groups import unit_groups
        >>> weight = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
        >>> (group,) = unit_groups(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), ["0.weight"], None)
        >>> scores_of_units(group, {"0.weight": PrunableTensor(weight)}, {"0.weight": weight})
        tensor([5., 2.], dtype=torch.float64)
    """
    found = torch.zeros(group.size, dtype=torch.float64)
    for place in group.rows:
        kept, tensor = scores[place.name], tensors[place.name]
        if tensor.pruned is not None:
            kept = kept.masked_fill(tensor.pruned, 0.0)
        of_rows = tensor.importance.of_units(kept.movedim(place.axis, 0).flatten(1).double()).cpu()
        found.index_add_(0, place.units, of_rows[place.indices])
    return found


def decide_units(
    tensors: Mapping[str, PrunableTensor],
    groups: Sequence[UnitGroup],
    companions: MaskSet,
    *,
    policy: Policy,
    scope: Scope,
    round: int,
    limits: Limits | None = None,
    history: Sequence[Any] = (),
    metrics: Mapping[str, float] | None = None,
) -> Decision:
    """Measure the units' scores, decide how many go, pick exactly these, and return the new masks.

    Limits count weights, and are met as closely as whole units allow: what is reduced to one number (``least`` equal to
    ``most``) by the nearest, ``most`` alone from below. One unit of each group always stays. Nothing is changed.

    Args:
        tensors: The weights that are trained.
        groups: All groups of units; one whose weights are not all trained stays as it is.
        companions: Masks of the biases and norms of the units.
        policy: What says how many units.
        scope: ``"layer"``: the units of each group are one vector; ``"global"``: all of them.
        round: Number of the step.
        limits: What the step must keep to besides.
        history: Records of the rounds before, for the policy.
        metrics: Metrics of the round that ends, for the policy.
    """
    p, q, scores = policy.p, policy.q, scores_of(tensors)
    before = summary(sums_of(tensors, p, q, scores=scores), p, q)
    check_finite(before, tensors)
    masks = {name: tensor.mask() for name, tensor in tensors.items()}
    known = {**masks, **companions.pruned}
    units = [
        Units(group, scores_of_units(group, tensors, scores), pruned_units(group, known))
        for group in groups
        if all(name in tensors for name in group.names)
    ]
    if not units:
        return Decision(before, {}, {}, MaskSet(masks), companions)
    sums = concatenate([power_sums(u.scores, p, q, mask=~u.pruned) for u in units])
    names, sizes = [u.group.names for u in units], torch.tensor([u.group.size for u in units])
    if scope == "global":
        sums = concatenate([total(sums, p, q)])
        names, sizes = [tuple(dict.fromkeys(n for of in names for n in of))], sizes.sum(0, keepdim=True)
    standing = Standing(
        round=round, pruned=sizes - sums.count, names=tuple(names), history=history, metrics=dict(metrics or {})
    )
    wanted = ask(policy, sums, standing).drop
    choice = _Choice(units, masks, scope == "global")
    picked, finest = choice.within(wanted, limits or Limits())
    after = MaskSet(choice.masks(picked))
    dropped = {name: count - after.survivors[name] for name, count in before.survivors.items()}
    gone = [(u.group, u.pruned | new) for u, new in zip(units, picked, strict=True)]
    return Decision(before, dropped, dict.fromkeys(dropped, 0), after, _companions(companions, gone), finest)


def _companions(old: MaskSet, gone: Sequence[tuple[UnitGroup, Tensor]]) -> MaskSet:
    """Masks in which biases and norms of exactly these units are pruned; those of other groups stay."""
    masks = dict(old.pruned)
    shapes = {p.name: masks[p.name].shape for group, _ in gone for p in group.companions if p.name in masks}
    whole = flagged([(group, torch.ones_like(units)) for group, units in gone], shapes)
    for name, mask in flagged(gone, shapes).items():
        device = masks[name].device
        masks[name] = (masks[name] & ~whole[name].to(device)) | mask.to(device)
    return MaskSet(masks)


class _Choice:
    """Which units go, for any number of them."""

    def __init__(self, units: Sequence[Units], masks: Mapping[str, Tensor], together: bool) -> None:
        self.units, self.old, self.together = units, masks, together
        self.before = sum(int((~mask).sum()) for mask in masks.values())
        self.room = [max(0, int((~u.pruned).sum()) - 1) for u in units]

    def within(self, wanted: Tensor, limits: Limits) -> tuple[list[Tensor], int]:
        """The units that go within the limits, and how many weights one more would take, 0 where none can go."""
        kept = {name: int((~mask).sum()) for name, mask in self.old.items()}
        floors = {name: min(count, kept[name]) for name, count in limits.floors.items() if name in kept}
        while True:
            number = self._number(wanted, limits)
            picked = self.pick(wanted, number)
            masks = self.masks(picked)
            short = {name for name, floor in floors.items() if int((~masks[name]).sum()) < floor}
            if not short:
                return picked, self._lost(wanted, number + 1) - self._lost(wanted, number)
            for i, (unit, new) in enumerate(zip(self.units, picked, strict=True)):
                group, count = unit.group, int(new.sum())
                if count and short & {place.name for place in (*group.rows, *group.columns)}:
                    self.room[i] = count - max(1, count // SHARE)

    def pick(self, wanted: Tensor, number: int) -> list[Tensor]:
        """So many units: those wanted, or fewer or more in proportion to them, the smallest scores of each group."""
        scores, pruned = [u.scores for u in self.units], [u.pruned for u in self.units]
        if self.together:
            return smallest(scores, pruned, min(number, sum(self.room)), self.room)
        rooms = torch.tensor(self.room)
        wanted = torch.minimum(wanted, rooms)
        count = int(wanted.sum())
        more = spread(number - count, wanted, rooms - wanted) if number > count else 0
        counts = wanted + more if number >= count else spread(number, wanted, wanted)
        of_groups = zip(scores, pruned, counts.tolist(), strict=True)
        return [smallest([score], [gone], n, [n])[0] for score, gone, n in of_groups]

    def masks(self, picked: Sequence[Tensor]) -> dict[str, Tensor]:
        """Where weights are pruned once these units are, too: all that compute or read a pruned unit."""
        gone = [(u.group, u.pruned | new) for u, new in zip(self.units, picked, strict=True)]
        new = flagged(gone, {name: mask.shape for name, mask in self.old.items()})
        return {name: mask | new[name].to(mask.device) for name, mask in self.old.items()}

    def _number(self, wanted: Tensor, limits: Limits) -> int:
        """How many units go: as many as wanted, unless their weights are too few or too many."""
        room, (_, least, most) = sum(self.room), limits
        number = int(torch.minimum(wanted, torch.tensor([room] if self.together else self.room)).sum())

        def first(start: int, end: int, holds: Callable[[int], bool]) -> int:
            """The first number in a range of which it holds, if not its end."""
            return start + bisect.bisect_left(range(start, end), True, key=holds)

        if self._lost(wanted, number) < least:
            number = first(number, room, lambda n: self._lost(wanted, n) >= least)
        if most is not None and self._lost(wanted, number) > most:
            number = first(0, number, lambda n: self._lost(wanted, n) > most) - 1
            number = max(0, number)
            above = self._lost(wanted, number + 1) - most
            number += least == most and above < most - self._lost(wanted, number)
        return number

    def _lost(self, wanted: Tensor, number: int) -> int:
        """How many weights go with so many units."""
        masks = self.masks(self.pick(wanted, number))
        return self.before - sum(int((~mask).sum()) for mask in masks.values())
