"""DECIDE: one step in one sentence: measure, decide, pick, mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_sap.engine.floors import Room, room_of
from lightning_sap.engine.groups import PrunableTensor, Scope, check_scope, held_by, scores_of
from lightning_sap.engine.masks import MaskSet
from lightning_sap.engine.measure import Measure, check_finite, summary, sums_of
from lightning_sap.engine.picking import first_of, growth_of_tensors, pick
from lightning_sap.functional.amount import spread
from lightning_sap.functional.pqi import PowerSums, check_tensors, concatenate, total
from lightning_sap.policies.base import Amounts, Importance, Policy, Standing, Turn, ask, check_policy
from lightning_sap.policies.importance import check_importance
from lightning_sap.sharding import local, shard_like


class Limits(NamedTuple):
    """What a step must keep to besides its policy.

    Attributes:
        floors: For each name the least number of weights that must be kept. What comes back in the step does not make
            room for more drops.
        least: Fewest weights by which the step reduces the kept ones, ``dropped - grown``. 0 beside no ``most`` limits
            nothing: more may come back than go.
        most: Most weights by which the step reduces the kept ones; None: no limit.
    """

    floors: Mapping[str, int] = {}
    least: int = 0
    most: int | None = None


@dataclass(frozen=True)
class Decision:
    """A decision: new masks are ``(pruned | dropped) & ~grown``.

    Attributes:
        before: What was measured before it.
        dropped: How many weights it prunes of each parameter; a parameter that is not named loses none.
        grown: How many pruned weights it lets come back in each parameter.
        masks: The masks after it.
        companions: The masks after it of biases and norms that go with whole units.
        finest: Of a decision on whole units, how many weights one more would take; 0 where none can go.
        short: By how many weights fewer are pruned than was asked for, since of each row or output unit some stay.
    """

    before: Measure
    dropped: dict[str, int]
    grown: dict[str, int]
    masks: MaskSet
    companions: MaskSet = field(default_factory=lambda: MaskSet({}))
    finest: int = 0
    short: int = 0

    @property
    def count(self) -> int:
        """How many weights it prunes."""
        return sum(self.dropped.values())

    @property
    def regrown(self) -> int:
        """How many pruned weights it lets come back."""
        return sum(self.grown.values())


def prune_masks(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor] | None = None,
    *,
    policy: Policy,
    scope: Scope = "layer",
    units: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    round: int = 1,
    importance: Importance | str = "magnitude",
) -> dict[str, Tensor]:
    """One pruning step as a pure function: from weights and masks to new masks; nothing it is given is changed.

    Args:
        weights: Weights by name; any shape, device and floating dtype.
        masks: Bool tensors of the weights' shapes, True where a weight is kept. None, or a name left out: all are.
        policy: How many weights a group loses, such as :class:`SparsityInformed` or :class:`FixedFraction`, and how
            many pruned ones come back.
        scope: What forms a group: ``"global"`` all weights together, ``"layer"`` each tensor, ``"neuron"`` each unit.
        units: For scope ``"neuron"``, by name, a *view* of the tensor as ``(units, weights)``; default: axis 0 is the
            unit.
        round: Number of the step, which is told to the policy.
        importance: By which score weights go: ``"magnitude"``, or an :class:`Importance`.

    Returns:
        New bool tensors by name, True where a weight is kept: in each group exactly as many of the smallest scores go
        as the policy says, ties to the lower position. Of the pruned weights come back those at the lowest positions.

    Raises:
        ValueError: If the scope or the importance is unknown, a mask does not fit its weight, a score does not fit its
            weight, or a kept weight or its score is not finite.
        TypeError: If the weights are not a mapping from names to tensors of dtype float16, bfloat16, float32 or
            float64, or the policy or the importance is none.

    Source: Diao et al., ICLR 2023, Algorithm 1.

    Example:
        >>> import torch
        >>> from lightning_sap import SparsityInformed
        >>> weights = {"fc.weight": torch.tensor([[4.0, -4.0], [0.0, 0.0]])}
        >>> prune_masks(weights, policy=SparsityInformed(p=0.5, q=1.0), scope="global")
        {'fc.weight': tensor([[ True,  True],
                [False, False]])}
    """
    check_scope(scope)
    check_policy(policy)
    importance = check_importance(importance)
    _check_mappings(weights, masks=masks, units=units)
    tensors = {}
    for name, weight in weights.items():
        kept = (masks or {}).get(name)
        check_tensors(weight, kept, name)
        pruned = None if kept is None else ~kept.to(weight.device)
        unit = (units or {}).get(name)
        tensors[name] = PrunableTensor(weight.detach(), pruned, unit, importance=importance)
    how: dict[str, Any] = {"policy": policy, "scope": scope, "round": round}
    turn = policy.turn(*_counts(tensors), round=round)
    after = (decide(tensors, **how) if turn is None else decide_turn(tensors, turn, **how)).masks.pruned
    for mask in after.values():
        local(mask).logical_not_()  # in place: these masks are nobody else's
    return dict(after)


def decide(
    tensors: Mapping[str, PrunableTensor],
    *,
    policy: Policy,
    scope: Scope,
    round: int,
    limits: Limits | None = None,
    history: Sequence[Any] = (),
    metrics: Mapping[str, float] | None = None,
) -> Decision:
    """Measure the scores, decide how many weights go and come back, pick exactly these, and return the new masks.

    Nothing is changed.

    Args:
        tensors: The weights; every process that holds rows of them calls this.
        policy: What says how many.
        scope: What forms a group.
        round: Number of the step.
        limits: What the step must keep to besides.
        history: Records of the rounds before, for the policy.
        metrics: Metrics of the round that ends, for the policy.
    """
    if not tensors:
        return Decision(summary({}, policy.p, policy.q), {}, {}, MaskSet({}))
    limits, scores, shards = limits or Limits(), scores_of(tensors), held_by(tensors)
    sums = sums_of(tensors, policy.p, policy.q, scope=scope, scores=scores)
    before = summary(sums, policy.p, policy.q)
    check_finite(before, tensors)
    groups = concatenate(list(sums.values()))
    if scope == "global":
        groups = concatenate([total(groups, policy.p, policy.q)])
    names, sizes = _groups(tensors, sums, scope)
    standing = Standing(
        round=round, pruned=sizes - groups.count, names=names, history=history, metrics=dict(metrics or {})
    )
    here = {name: tensor.local() for name, tensor in tensors.items()}
    room, asked = room_of(here, scores, scope, shards), ask(policy, groups, standing)
    (drop, grow), spare, short = _within(room, asked, groups.count, standing, before, sums, scope, limits)
    picked = pick(here, scores, room.excluded, drop, scope, spare, sums, shards)
    growth = growth_of_tensors(grow, tensors, before, sums, scope)
    for name, tensor in here.items():
        if tensor.pruned is not None:
            picked[name] |= tensor.pruned
            if growth[name].any():
                back = first_of(tensor, ~tensor.pruned, growth[name], scope, shards)
                picked[name] &= back.logical_not_()
    masks = MaskSet({name: shard_like(mask, tensors[name].weight) for name, mask in picked.items()})
    grown = {name: int(counts.sum()) for name, counts in growth.items()}
    dropped = {name: n - masks.survivors[name] + grown[name] for name, n in before.survivors.items()}
    return Decision(before, dropped, grown, masks, short=short)


def decide_turn(
    tensors: Mapping[str, PrunableTensor],
    turn: Turn,
    *,
    policy: Policy,
    scope: Scope,
    floors: Mapping[str, int] | None = None,
    **how: Any,
) -> Decision:
    """Decide on the parts of a network that a turn closes, each alone, and open what it opens; nothing is changed.

    Args:
        tensors: The weights; what the turn names beside them is passed over.
        turn: Which parameters are closed, and which are opened.
        policy: What says how many weights go.
        scope: What forms a group; ``"global"``: all weights that are closed together.
        floors: For each name the least number of weights that must be kept.
        **how: The further arguments of :func:`decide`.
    """
    masks = {name: tensor.mask() for name, tensor in tensors.items()}
    before = summary(sums_of(tensors, policy.p, policy.q), policy.p, policy.q)
    check_finite(before, tensors)
    dropped, short = dict[str, int](), 0
    for part in turn.close:
        closing = {name: tensors[name] for name in part.names if name in tensors}
        count = sum(before.survivors[name] for name in closing)
        least, most = max(0, count - part.most), max(0, count - part.least)
        limits = Limits(floors or {}, min(least, most), most)
        closed = decide(closing, policy=policy, scope=scope, limits=limits, **how)
        masks |= closed.masks.pruned
        dropped |= closed.dropped
        short += closed.short
    opened = {name: tensors[name]._replace(pruned=None) for name in turn.open if name in tensors}
    grown = {name: tensor.weight.numel() - before.survivors[name] for name, tensor in opened.items()}
    masks |= {name: tensor.mask() for name, tensor in opened.items()}
    return Decision(before, dropped, grown, MaskSet(masks), short=short)


def _counts(tensors: Mapping[str, PrunableTensor]) -> tuple[dict[str, int], dict[str, int]]:
    """By name how many weights there are, and how many are kept."""
    sizes = {name: tensor.weight.numel() for name, tensor in tensors.items()}
    pruned = MaskSet({name: tensor.pruned for name, tensor in tensors.items() if tensor.pruned is not None})
    return sizes, {**sizes, **pruned.survivors}


def _check_mappings(weights: Mapping[str, Any], **others: Mapping[str, Any] | None) -> None:
    """Raise unless these are mappings, and all but the weights of the weights' names."""
    for what, given in {"weights": weights, **others}.items():
        if given is None and what in others:
            continue
        if not isinstance(given, Mapping):
            raise TypeError(
                f"{what} must be a mapping from the names of weights, such as {{'fc.weight': ...}}, got "
                f"{type(given).__name__}; dict(module.named_parameters()) is one of tensors."
            )
        if surplus := sorted(set(given) - set(weights)):
            raise ValueError(f"There are {what} for {surplus}, but no such weights; the weights are {sorted(weights)}.")


def _groups(
    tensors: Mapping[str, PrunableTensor], sums: Mapping[str, PowerSums], scope: Scope
) -> tuple[tuple[tuple[str, ...], ...], Tensor]:
    """The names of the parameters that each group belongs to, and the sizes of the groups."""
    numbers = {name: tensor.weight.numel() for name, tensor in tensors.items()}
    if scope == "global":
        return (tuple(numbers),), torch.tensor([sum(numbers.values())])
    units = {name: len(part.count) for name, part in sums.items()}
    names = tuple(chain.from_iterable(repeat((name,), n) for name, n in units.items()))
    return names, torch.cat([torch.full((n,), numbers[name] // max(1, n)) for name, n in units.items()])


def _spare_of_groups(sums: Mapping[str, PowerSums], spare: Mapping[str, int], scope: Scope) -> list[tuple[int, int]]:
    """For each set of groups that shares a number of weights it can spare: how many groups, and that number."""
    if scope == "global":
        return [(1, sum(spare.values()))]
    return [(len(part.count), spare[name]) for name, part in sums.items()]


def _within(
    room: Room,
    asked: Amounts,
    kept: Tensor,
    standing: Standing,
    before: Measure,
    sums: Mapping[str, PowerSums],
    scope: Scope,
    limits: Limits,
) -> tuple[Amounts, dict[str, int], int]:
    """The amounts of the groups within limits and room, what each tensor can spare, and how many the room is short."""

    def within(held: Mapping[str, int], free: Tensor) -> tuple[Amounts, dict[str, int]]:
        least = {name: max(limits.floors.get(name, 0), held.get(name, 0)) for name in before.survivors}
        spare = {name: max(0, count - least[name]) for name, count in before.survivors.items()}
        return _limited(asked, free, standing.pruned, _spare_of_groups(sums, spare, scope), limits), spare

    freely, spare = within({}, kept)
    if room.of_groups is None:
        return freely, spare, 0
    amounts, spare = within(room.held, kept - room.of_groups)
    return amounts, spare, int(freely.drop.sum() - amounts.drop.sum())


def _limited(wanted: Amounts, kept: Tensor, pruned: Tensor, spare: list[tuple[int, int]], limits: Limits) -> Amounts:
    """Amounts of the groups, cut to what there is and to the limits; cuts and additions in proportion to them.

    Drops make up for what comes back; where they cannot, less comes back.
    """
    grow = torch.minimum(wanted.grow, pruned)
    grown, most = int(grow.sum()), limits.most
    if limits.least == 0 and most is None:
        return Amounts(_limited_drop(wanted.drop, kept, spare, 0, None), grow)
    drop = _limited_drop(wanted.drop, kept, spare, limits.least + grown, None if most is None else most + grown)
    left = max(0, int(drop.sum()) - limits.least)
    return Amounts(drop, grow if grown <= left else spread(left, grow, grow))


def _limited_drop(counts: Tensor, kept: Tensor, spare: list[tuple[int, int]], least: int, most: int | None) -> Tensor:
    sizes, rooms = [groups for groups, _ in spare], [n for _, n in spare]
    asked = torch.split(torch.minimum(counts, kept), sizes)
    wanted = [want if int(want.sum()) <= n else spread(n, want, want) for want, n in zip(asked, rooms, strict=True)]
    counts = torch.cat(wanted)
    count = int(counts.sum())
    if most is not None and count > most:
        return spread(most, counts, counts)
    if count < least:
        left = zip(torch.split(kept - counts, sizes), wanted, rooms, strict=True)
        more = torch.cat([spread(n - int(want.sum()), room, room) for room, want, n in left])
        return counts + spread(least - count, counts, more)
    return counts
