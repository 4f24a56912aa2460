"""PICK: exactly so many of the smallest scores of each group, and which weights come back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_sap.engine.groups import PrunableTensor, Scope
from lightning_sap.engine.measure import Measure
from lightning_sap.functional.pqi import PowerSums
from lightning_sap.functional.select import smallest, smallest_of_rows
from lightning_sap.sharding import Shards


def pick(
    tensors: Mapping[str, PrunableTensor],
    scores: Mapping[str, Tensor],
    excluded: Mapping[str, Tensor | None],
    counts: Tensor,
    scope: Scope,
    spare: Mapping[str, int],
    sums: Mapping[str, PowerSums],
    shards: Shards,
) -> dict[str, Tensor]:
    """Which of the kept weights held by this process go."""
    if scope == "global":
        barred, rooms = list(excluded.values()), list(spare.values())
        return dict(zip(tensors, smallest(list(scores.values()), barred, int(counts), rooms, shards), strict=True))
    if any(tensor.is_apart(scope) for tensor in tensors.values()):
        counts = counts.to(next(iter(scores.values())).device)  # at once, for each transfer waits for the device
    of_tensors = zip(tensors.items(), torch.split(counts, [len(part.count) for part in sums.values()]), strict=True)
    return {name: pick_of(tensor, scores[name], excluded[name], c, scope, shards) for (name, tensor), c in of_tensors}


def pick_of(
    tensor: PrunableTensor,
    scores: Tensor,
    excluded: Tensor | None,
    counts: Tensor,
    scope: Scope,
    shards: Shards,
) -> Tensor:
    """The smallest of each group of a tensor, so many of them."""
    if not tensor.is_apart(scope):
        count = int(counts)
        return smallest([scores], [excluded], count, [count], shards)[0]
    rows = tensor.groups(scores, scope)
    excluded = None if excluded is None else tensor.groups(excluded, scope)
    return tensor.from_groups(smallest_of_rows(rows, excluded, shards.own(counts, len(rows))), scope)


def growth_of_tensors(
    grow: Tensor, tensors: Mapping[str, PrunableTensor], before: Measure, sums: Mapping[str, PowerSums], scope: Scope
) -> dict[str, Tensor]:
    """How many weights come back in each tensor, or in each of its units; of one group the tensors named first."""
    if scope != "global":
        return dict(zip(tensors, torch.split(grow, [len(part.count) for part in sums.values()]), strict=True))
    pruned = torch.tensor([tensor.weight.numel() - before.survivors[name] for name, tensor in tensors.items()])
    earlier = pruned.cumsum(0) - pruned
    of_tensors = (grow - earlier).clamp(min=0).minimum(pruned)
    return dict(zip(tensors, torch.split(of_tensors, 1), strict=True))


def first_of(tensor: PrunableTensor, excluded: Tensor, counts: Tensor, scope: Scope, shards: Shards) -> Tensor:
    """Where a tensor's, or each unit's, first weights are, but for those excluded: of equal scores the lower go."""
    equal = torch.zeros((), dtype=torch.float16, device=excluded.device).expand(excluded.shape)
    return pick_of(tensor, equal, excluded, counts, scope, shards)
