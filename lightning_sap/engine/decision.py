"""DECIDE: one step in one sentence: measure, decide, pick, mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_sap.engine.groups import PrunableTensor, Scope, check_scope, held_by
from lightning_sap.engine.masks import MaskSet
from lightning_sap.engine.measure import Measure, check_finite, summary, sums_of
from lightning_sap.functional.amount import spread
from lightning_sap.functional.pqi import PowerSums, check_tensors, concatenate, total
from lightning_sap.functional.select import smallest, smallest_of_rows
from lightning_sap.policies.base import Policy, check_policy
from lightning_sap.sharding import Shards, local, shard_like


class Limits(NamedTuple):
    """What a step must keep to besides its policy.

    Attributes:
        floors: For each name the least number of weights that must survive.
        least: Fewest weights the step may prune.
        most: Most weights the step may prune; None: no limit.
    """

    floors: Mapping[str, int] = {}
    least: int = 0
    most: int | None = None


@dataclass(frozen=True)
class Decision:
    """A decision: what was measured, which weights are pruned after it, and how many it adds to those before it."""

    before: Measure
    masks: MaskSet
    count: int


def prune_masks(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor] | None = None,
    *,
    policy: Policy,
    scope: Scope = "layer",
    units: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> dict[str, Tensor]:
    """One pruning step as a pure function: from weights and masks to new masks; nothing it is given is changed.

    Args:
        weights: Weights by name; any shape, device and floating dtype.
        masks: Bool tensors of the weights' shapes, True where a weight survives. None, or a name left out: all do.
        policy: How many weights a group loses, such as :class:`SparsityInformed` or :class:`FixedFraction`.
        scope: What forms a group: ``"global"`` all weights together, ``"layer"`` each tensor, ``"neuron"`` each unit.
        units: For scope ``"neuron"``, by name, a *view* of the tensor as ``(units, weights)``; default: axis 0 is the
            unit.

    Returns:
        New bool tensors by name, True where a weight survives: in each group exactly as many of the smallest magnitudes
        go as the policy says, ties to the lower position.

    Raises:
        ValueError: If the scope is unknown, a mask does not fit its weight, or a surviving weight is not finite.
        TypeError: If a weight is not of dtype float16, bfloat16, float32 or float64, or the policy is none.

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
    for what, given in (("masks", masks), ("units", units)):
        if surplus := sorted(set(given or {}) - set(weights)):
            raise ValueError(f"There are {what} for {surplus}, but no such weights; the weights are {sorted(weights)}.")
    pieces = {}
    for name, weight in weights.items():
        kept = (masks or {}).get(name)
        check_tensors(weight, kept, name)
        gone = None if kept is None else ~kept.to(weight.device)
        pieces[name] = PrunableTensor(weight.detach(), gone, (units or {}).get(name))
    pruned = decide(pieces, policy=policy, scope=scope, round=1).masks.pruned
    for mask in pruned.values():
        local(mask).logical_not_()  # in place: these masks are nobody else's
    return dict(pruned)


def decide(
    pieces: Mapping[str, PrunableTensor], *, policy: Policy, scope: Scope, round: int, limits: Limits | None = None
) -> Decision:
    """Measure the weights, decide how many go, pick exactly these, and return the new masks; nothing is changed."""
    limits = limits or Limits()
    if not pieces:
        return Decision(summary({}, policy.p, policy.q), MaskSet({}), 0)
    sums = sums_of(pieces, policy.p, policy.q, by_unit=scope == "neuron")
    before = summary(sums, policy.p, policy.q)
    check_finite(before)
    groups = concatenate(list(sums.values()))
    if scope == "global":
        groups = concatenate([total(groups, policy.p, policy.q)])
    spare = {name: max(0, count - limits.floors.get(name, 0)) for name, count in before.survivors.items()}
    counts = _limited(_asked(policy, groups, round), groups.count, _spare_of_groups(sums, spare, scope), limits)
    here = {name: piece.local() for name, piece in pieces.items()}
    picked = _pick(here, counts, scope, spare, sums, held_by(pieces))
    for name, piece in here.items():
        if piece.pruned is not None:
            picked[name] |= piece.pruned
    masks = MaskSet({name: shard_like(mask, pieces[name].weight) for name, mask in picked.items()})
    return Decision(before, masks, int(counts.sum()))


def _asked(policy: Policy, groups: PowerSums, round: int) -> Tensor:
    """What the policy wants to prune from each group."""
    counts: Any = policy(groups, round)
    kind = (getattr(counts, "dtype", None), getattr(counts, "shape", None))
    if kind != (torch.int64, groups.count.shape) or (counts < 0).any():
        raise ValueError(
            f"{policy!r} must return how many weights each group loses: int64 of at least 0, of shape "
            f"{tuple(groups.count.shape)}; got {counts}. Whole numbers are had by .floor().long()."
        )
    return torch.as_tensor(counts)


def _spare_of_groups(sums: Mapping[str, PowerSums], spare: Mapping[str, int], scope: Scope) -> list[tuple[int, int]]:
    """For each set of groups that shares a number of weights it can spare: how many groups, and that number."""
    if scope == "global":
        return [(1, sum(spare.values()))]
    return [(len(part.count), spare[name]) for name, part in sums.items()]


def _limited(counts: Tensor, alive: Tensor, spare: list[tuple[int, int]], limits: Limits) -> Tensor:
    """Counts of the groups, cut to what can be spared and to the limits; cuts and additions in proportion to them."""
    sizes, most = [groups for groups, _ in spare], [n for _, n in spare]
    asked = torch.split(torch.minimum(counts, alive), sizes)
    wanted = [want if int(want.sum()) <= n else spread(n, want, want) for want, n in zip(asked, most, strict=True)]
    counts = torch.cat(wanted)
    count = int(counts.sum())
    if limits.most is not None and count > limits.most:
        return spread(limits.most, counts, counts)
    if count < limits.least:
        left = zip(torch.split(alive - counts, sizes), wanted, most, strict=True)
        more = torch.cat([spread(n - int(want.sum()), room, room) for room, want, n in left])
        return counts + spread(limits.least - count, counts, more)
    return counts


def _pick(
    pieces: Mapping[str, PrunableTensor],
    counts: Tensor,
    scope: Scope,
    spare: Mapping[str, int],
    sums: Mapping[str, PowerSums],
    shards: Shards,
) -> dict[str, Tensor]:
    """Where weights go that are alive now and held by this process."""
    if scope == "global":
        weights, dead = [p.weight for p in pieces.values()], [p.pruned for p in pieces.values()]
        return dict(zip(pieces, smallest(weights, dead, int(counts), list(spare.values()), shards), strict=True))
    if scope == "layer":
        of_layer = zip(pieces.items(), counts.tolist(), strict=True)
        return {n: smallest([piece.weight], [piece.pruned], c, [c], shards)[0] for (n, piece), c in of_layer}
    picked = {}
    counts = counts.to(next(iter(pieces.values())).weight.device)  # at once, for each transfer waits for the device
    of_units = torch.split(counts, [len(part.count) for part in sums.values()])
    for (name, piece), c in zip(pieces.items(), of_units, strict=True):
        dead_rows = None if piece.pruned is None else piece.rows(piece.pruned)
        rows = piece.rows(piece.weight)
        picked[name] = piece.from_rows(smallest_of_rows(rows, dead_rows, shards.own(c, len(rows))))
    return picked
