"""One step: measure, decide, pick, mask. And the protocol by which a monitor finds pruners."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_sap.functional.amount import Policy, check_policy, spread
from lightning_sap.functional.pqi import PowerSums, check_tensors, concatenate, index_of, power_sums, total
from lightning_sap.functional.select import smallest, smallest_of_rows
from lightning_sap.history import History, RoundRecord
from lightning_sap.masks import MaskSet
from lightning_sap.sharding import Shards, local, shard_like, shards_of
from lightning_sap.sums import Memory, fingerprints, on_cpu, over_shards
from lightning_sap.weights import prunable_weights

Scope = Literal["neuron", "layer", "global"]


class Piece(NamedTuple):
    """A weight to measure and prune.

    Attributes:
        weight: The weights, any shape and floating dtype, sharded or not.
        pruned: Bool tensor of the same shape, True where a weight is pruned already; None: nowhere.
        units: View of a tensor of that shape as ``(units, weights of a unit)``; None: axis 0 is the unit.
        memory: Where its power sums are kept, so that they are not taken twice; None: nowhere.
    """

    weight: Tensor
    pruned: Tensor | None = None
    units: Callable[[Tensor], Tensor] | None = None
    memory: Memory | None = None

    def local(self) -> Piece:
        """What this process holds of it."""
        return self._replace(weight=local(self.weight), pruned=None if self.pruned is None else local(self.pruned))

    def rows(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as ``(units, weights of a unit)``."""
        if self.units is not None:
            return self.units(tensor)
        return tensor.flatten(1) if tensor.dim() > 1 else tensor.reshape(-1, 1)

    def from_rows(self, rows: Tensor) -> Tensor:
        """Undo :meth:`rows`."""
        if self.units is None:
            return rows.reshape(self.weight.shape)
        position = self.rows(torch.arange(rows.numel(), device=rows.device).reshape(self.weight.shape))
        return (
            torch.empty_like(rows).view(-1).scatter(0, position.reshape(-1), rows.reshape(-1)).view(self.weight.shape)
        )


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
class Measure:
    """PQ Indices of a set of weights: of all as one vector, of each, and how many survive in each."""

    overall: float
    layers: dict[str, float]
    survivors: dict[str, int]

    @property
    def layer_mean(self) -> float:
        """Mean of the indices of the weights; 0 where there are none."""
        return sum(self.layers.values()) / len(self.layers) if self.layers else 0.0


@dataclass(frozen=True)
class Step:
    """A decision: what was measured, which weights are pruned after it, and how many it adds to those before it."""

    before: Measure
    masks: MaskSet
    count: int


@runtime_checkable
class MonitoredPruner(Protocol):
    """What a monitor may ask of a pruner."""

    def orders(self) -> tuple[float, float]:
        """Orders p and q of the index by which it prunes."""

    def pieces(self, module: nn.Module) -> dict[str, Piece]:
        """The weights it prunes, live, with their masks."""

    def prunes(self) -> bool:
        """Whether it has rounds, or only holds masks."""

    def current_round(self) -> int:
        """Number of prunings so far."""

    def ends_round(self, epoch: int) -> bool:
        """Whether that epoch is planned to be the last of a round."""

    def index_after_pruning(self) -> float | None:
        """Index right after the latest pruning, before retraining; at the start of training before the first."""

    def archive_rounds(self) -> None:
        """Save each round of the coming training, so that it can be restored."""

    def close_run(self, module: nn.Module) -> None:
        """Be up to date at the end of a fit that trained nothing, since its checkpoint was of a run that was over."""

    def note_phase(self, round: int, phase: str, reason: str) -> None:
        """Take into the history how the round that just ended was judged."""

    @property
    def history(self) -> History:
        """One record for each round that ended."""

    def restore_round(self, round: int, module: nn.Module | None = None) -> RoundRecord:
        """Put the trained weights and the masks of a round back, and return its record."""


@runtime_checkable
class RoundWitness(Protocol):
    """What a pruner may ask of a monitor."""

    def see_epoch(self, trainer: Any, module: Any) -> None:
        """Take in the epoch that ends, before its round is saved: a run resumed from there does not see its end."""


def check_scope(scope: str) -> None:
    """Raise unless the scope is known."""
    if scope not in get_args(Scope):
        raise ValueError(f"Unknown scope {scope!r}; it must be one of 'neuron', 'layer' and 'global'.")


def check_finite(measure: Measure) -> None:
    """Raise if a weight was not finite."""
    if bad := [name for name, index in measure.layers.items() if not math.isfinite(index)]:
        raise ValueError(
            f"Weights that are not finite in {bad}: nothing is pruned, the masks stay as they were. The training has "
            "diverged; lower the learning rate or clip the gradients."
        )


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
        pieces[name] = Piece(weight.detach(), gone, (units or {}).get(name))
    pruned = prune_step(pieces, policy=policy, scope=scope, round=1).masks.pruned
    for mask in pruned.values():
        local(mask).logical_not_()  # in place: these masks are nobody else's
    return dict(pruned)


def prune_step(
    pieces: Mapping[str, Piece], *, policy: Policy, scope: Scope, round: int, limits: Limits | None = None
) -> Step:
    """Measure the weights, decide how many go, pick exactly these, and return the new masks; nothing is changed."""
    limits = limits or Limits()
    if not pieces:
        return Step(summary({}, policy.p, policy.q), MaskSet({}), 0)
    sums = sums_of(pieces, policy.p, policy.q, by_unit=scope == "neuron")
    before = summary(sums, policy.p, policy.q)
    check_finite(before)
    groups = concatenate(list(sums.values()))
    if scope == "global":
        groups = concatenate([total(groups, policy.p, policy.q)])
    spare = {name: max(0, count - limits.floors.get(name, 0)) for name, count in before.survivors.items()}
    counts = _limited(_asked(policy, groups, round), groups.count, _spare_of_groups(sums, spare, scope), limits)
    here = {name: piece.local() for name, piece in pieces.items()}
    picked = _pick(here, counts, scope, spare, sums, _shards(pieces))
    for name, piece in here.items():
        if piece.pruned is not None:
            picked[name] |= piece.pruned
    masks = MaskSet({name: shard_like(mask, pieces[name].weight) for name, mask in picked.items()})
    return Step(before, masks, int(counts.sum()))


def dense_pieces(module: nn.Module) -> dict[str, Piece]:
    """The weights of a module that are prunable by default, live, nothing of them pruned."""
    return {name: Piece(w.parameter.detach(), None, w.units) for name, w in prunable_weights(module).items()}


def dead_units(pieces: Mapping[str, Piece]) -> dict[str, tuple[int, int]]:
    """For each tensor how many of its output units have no weights left, and how many it has; of all its shards."""
    here = {name: piece.local() for name, piece in pieces.items()}
    dead = {name: piece.rows(piece.pruned).all(1) for name, piece in here.items() if piece.pruned is not None}
    if not dead:
        return dict.fromkeys(pieces, (0, 0))
    device = next(iter(dead.values())).device
    counts = torch.stack([units.sum().to(device) for units in dead.values()]).cpu()
    both = torch.stack([counts, torch.tensor([len(units) for units in dead.values()])])
    of_shards = zip(*_shards(pieces).sum(both).tolist(), strict=True)
    return dict.fromkeys(pieces, (0, 0)) | dict(zip(dead, of_shards, strict=True))


def sums_of(pieces: Mapping[str, Piece], p: float, q: float, *, by_unit: bool = False) -> dict[str, PowerSums]:
    """Power sums of the survivors of each piece, of all its shards: shape ``(1,)``, or ``(units,)``; on the CPU."""
    shards, orders = _shards(pieces), (p, q)
    remembering = {} if by_unit else {name: piece for name, piece in pieces.items() if piece.memory is not None}
    here = fingerprints([piece.local().weight for piece in remembering.values()])
    bits = shards.sum(torch.tensor(here, dtype=torch.int64)).tolist()
    known = {}
    for (name, piece), now in zip(remembering.items(), bits, strict=True):
        if piece.memory and (sums := piece.memory.recall(orders, piece.pruned, now)):
            known[name] = sums
    fresh = {name: _sums_here(piece.local(), p, q, by_unit) for name, piece in pieces.items() if name not in known}
    fresh = over_shards(on_cpu(fresh), shards, p, q, by_unit)
    for (name, piece), now in zip(remembering.items(), bits, strict=True):
        if piece.memory and name in fresh:
            piece.memory.keep(orders, piece.pruned, now, fresh[name])
    return {name: known.get(name) or fresh[name] for name in pieces}


def _sums_here(piece: Piece, p: float, q: float, by_unit: bool) -> PowerSums:
    mask = None if piece.pruned is None else ~piece.pruned
    if not by_unit:
        return concatenate([power_sums(piece.weight, p, q, mask=mask)])
    return power_sums(piece.rows(piece.weight), p, q, mask=None if mask is None else piece.rows(mask), dim=1)


def summary(sums: Mapping[str, PowerSums], p: float, q: float) -> Measure:
    """Indices of all weights as one vector and of each tensor, from power sums of any grouping."""
    if not sums:
        return Measure(0.0, {}, {})
    layers = concatenate([total(part, p, q) for part in sums.values()])
    index = index_of(layers, p, q).tolist()
    overall = float(index_of(total(layers, p, q), p, q))
    return Measure(overall, dict(zip(sums, index, strict=True)), dict(zip(sums, layers.count.tolist(), strict=True)))


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


def _shards(pieces: Mapping[str, Piece]) -> Shards:
    return shards_of(piece.weight for piece in pieces.values())


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
    pieces: Mapping[str, Piece],
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
