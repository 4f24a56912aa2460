"""MEASURE: indices of several weights, wherever these lie: on a device, in several processes, or measured before."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sap.engine.groups import PrunableTensor, Scope, held_by, scores_of
from lightning_sap.functional.fingerprint import fingerprints
from lightning_sap.functional.pqi import PowerSums, concatenate, index_of, merge, power_sums, total
from lightning_sap.policies.importance import Magnitude
from lightning_sap.sharding import Shards


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


def check_finite(measure: Measure, tensors: Mapping[str, PrunableTensor] | None = None) -> None:
    """Raise if a weight was not finite, or its score by another importance than magnitude."""
    bad = [name for name, index in measure.layers.items() if not math.isfinite(index)]
    others = {name: tensor.importance for name, tensor in (tensors or {}).items() if name in bad}
    if others and not isinstance(importance := others[bad[0]], Magnitude):
        raise ValueError(
            f"{importance!r} returned scores that are not finite in {bad}: nothing is pruned, the masks stay as they "
            "were. Return a finite score for every kept weight; if weights are not finite, the training has diverged."
        )
    if bad:
        raise ValueError(
            f"Weights that are not finite in {bad}: nothing is pruned, the masks stay as they were. The training has "
            "diverged; lower the learning rate or clip the gradients."
        )


def sums_of(
    tensors: Mapping[str, PrunableTensor],
    p: float,
    q: float,
    *,
    scope: Scope = "global",
    scores: Mapping[str, Tensor] | None = None,
) -> dict[str, PowerSums]:
    """Power sums of the scores of kept weights: of each tensor, shape ``(1,)``, or of its groups; on the CPU.

    Args:
        tensors: The weights; of sharded ones all shards are summed.
        p: Order of the smaller norm.
        q: Order of the larger norm.
        scope: ``"neuron"``: every output unit has its own sums; ``"layer"``: every matrix of a stack has.
        scores: Those of the weights that this process holds; None: they are asked for.
    """
    shards, orders = held_by(tensors), (p, q)
    scores = scores_of(tensors) if scores is None else scores
    apart = {name for name, tensor in tensors.items() if tensor.is_apart(scope)}
    remembering = {n: tensor for n, tensor in tensors.items() if tensor.memory is not None and n not in apart}
    here = fingerprints([scores[name] for name in remembering])
    bits = shards.sum(torch.tensor(here, dtype=torch.int64)).tolist()
    known = {}
    for (name, tensor), now in zip(remembering.items(), bits, strict=True):
        if tensor.memory and (sums := tensor.memory.recall(orders, tensor.pruned, now)):
            known[name] = sums
    fresh = {
        name: _sums_here(tensor.local(), scores[name], p, q, scope)
        for name, tensor in tensors.items()
        if name not in known
    }
    fresh = over_shards(on_cpu(fresh), shards, p, q, apart)
    for (name, tensor), now in zip(remembering.items(), bits, strict=True):
        if tensor.memory and name in fresh:
            tensor.memory.keep(orders, tensor.pruned, now, fresh[name])
    return {name: known.get(name) or fresh[name] for name in tensors}


def _sums_here(tensor: PrunableTensor, scores: Tensor, p: float, q: float, scope: Scope) -> PowerSums:
    mask = None if tensor.pruned is None else ~tensor.pruned
    if not tensor.is_apart(scope):
        return concatenate([power_sums(scores, p, q, mask=mask)])
    rows = tensor.groups(scores, scope)
    return power_sums(rows, p, q, mask=None if mask is None else tensor.groups(mask, scope), dim=1)


def summary(sums: Mapping[str, PowerSums], p: float, q: float) -> Measure:
    """Indices of all weights as one vector and of each tensor, from power sums of any grouping."""
    if not sums:
        return Measure(0.0, {}, {})
    layers = concatenate([total(part, p, q) for part in sums.values()])
    index = index_of(layers, p, q).tolist()
    overall = float(index_of(total(layers, p, q), p, q))
    return Measure(overall, dict(zip(sums, index, strict=True)), dict(zip(sums, layers.count.tolist(), strict=True)))


def on_cpu(sums: dict[str, PowerSums]) -> dict[str, PowerSums]:
    """The same on the CPU, in one transfer, which waits for all that is under way on the device."""
    devices = [part.count.device for part in sums.values()]
    if all(device.type == "cpu" for device in devices):
        return sums
    # all integers here are below 2^53
    tables = [torch.stack([field.to(devices[0], torch.float64) for field in part]) for part in sums.values()]
    parts = torch.split(torch.cat(tables, dim=1).cpu(), [len(part.count) for part in sums.values()], dim=1)
    return {
        name: PowerSums(count.to(torch.int64), exponent.to(torch.int64), sum_p, sum_q)
        for name, (count, exponent, sum_p, sum_q) in zip(sums, parts, strict=True)
    }


def over_shards(
    sums: dict[str, PowerSums], shards: Shards, p: float, q: float, apart: Collection[str]
) -> dict[str, PowerSums]:
    """Power sums with those of other processes: of what is apart one process after the other, of the rest added."""
    if shards.mesh is None or not sums:
        return sums
    lengths = shards.gather(torch.tensor([len(part.count) for part in sums.values()]))
    fields = [shards.gather(field) for field in concatenate(list(sums.values()))]
    of_ranks = [
        [PowerSums(*parts) for parts in zip(*(field.split(length.tolist()) for field in of_rank), strict=True)]
        for length, of_rank in zip(lengths, zip(*fields, strict=True), strict=True)
    ]
    of_names = zip(sums, zip(*of_ranks, strict=True), strict=True)
    return {name: concatenate(parts) if name in apart else merge(parts, p, q) for name, parts in of_names}
