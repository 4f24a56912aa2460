"""WHO: processes that train copies of one model prune alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_sap.engine.decision import Decision
from lightning_sap.engine.groups import PrunableTensor
from lightning_sap.engine.masks import MaskSet
from lightning_sap.functional.fingerprint import fingerprints
from lightning_sap.functional.pqi import count_true
from lightning_sap.sharding import is_sharded


class Fingerprint(NamedTuple):
    """All that the decision on one parameter depends on, in a few numbers."""

    shape: tuple[int, ...]
    dtype: str
    survivors: int
    mask: int
    weights: int


def check_agreement(trainer: Trainer, tensors: Mapping[str, PrunableTensor]) -> None:
    """Raise on every rank unless all ranks hold the same weights and masks; a collective where they are replicated.

    Compared are the bits, from which the power sums follow: sums of the same bits may still differ in their last digit
    between devices of two kinds, and that is what the decision of rank 0 settles.

    Raises:
        ValueError: If they differ; it names the parameters and the ranks.
    """
    if _replicated(trainer.world_size, (tensor.weight for tensor in tensors.values())):
        check_same(tensors)


def check_same(tensors: Mapping[str, PrunableTensor]) -> None:
    """Raise on every rank unless all ranks hold the same weights and masks; a collective.

    Raises:
        ValueError: If they differ; it names the parameters and the ranks.
    """
    all_ranks = of_ranks(_fingerprints(tensors))
    names = dict.fromkeys(name for of_rank in all_ranks for name in of_rank)
    faults = [fault for name in names if (fault := _fault(name, [of_rank.get(name) for of_rank in all_ranks]))]
    if faults:
        raise ValueError(
            f"The ranks do not hold the same model, so nothing is pruned: {'; '.join(faults)}. Look for what changes "
            "a weight outside of the optimizer step, or skips the averaging of its gradient, on these ranks only."
        )


def broadcast_decision(trainer: Trainer, step: Decision, weights: Mapping[str, Tensor]) -> Decision:
    """The decision of rank 0, on every rank; a collective where they are replicated."""
    if not _replicated(trainer.world_size, weights.values()):
        return step
    return of_rank_zero(step, weights)


def of_rank_zero(step: Decision, weights: Mapping[str, Tensor]) -> Decision:
    """The decision of rank 0, on every rank; a collective."""
    packed = step.before, step.dropped, step.grown, step.masks.pack(), step.companions.pack(), step.finest, step.short
    box: list[Any] = [packed]
    torch.distributed.broadcast_object_list(box, src=0)
    before, dropped, grown, masks, companions, finest, short = box[0]
    placed = MaskSet.unpack(companions).moved(step.companions.pruned)
    return Decision(before, dropped, grown, MaskSet.unpack(masks).like(weights), placed, finest, short)


def union(trainer: Trainer, names: Iterable[str]) -> set[str]:
    """The names that any rank has; a collective."""
    return set(names) if trainer.world_size == 1 else set().union(*of_ranks(set(names)))


def place() -> tuple[int, int]:
    """Which process this is, and of how many."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def of_ranks(value: Any) -> list[Any]:
    """What each process found, by rank; a collective."""
    found = [value] * place()[1]
    if len(found) > 1:
        torch.distributed.all_gather_object(found, value)
    return found


def _replicated(processes: int, weights: Iterable[Tensor]) -> bool:
    """Whether several ranks hold the same weights; with sharded ones there is but one decision, from all shards."""
    several = processes > 1 and torch.distributed.is_available() and torch.distributed.is_initialized()
    return several and not any(map(is_sharded, weights))


def _fingerprints(tensors: Mapping[str, PrunableTensor]) -> dict[str, Fingerprint]:
    masks = {name: tensor.weight.new_zeros(1, dtype=torch.bool) for name, tensor in tensors.items()}
    masks |= {name: tensor.pruned for name, tensor in tensors.items() if tensor.pruned is not None}
    counts = count_true(list(masks.values())).tolist()
    numbers = zip(
        counts, fingerprints(list(masks.values())), fingerprints([p.weight for p in tensors.values()]), strict=True
    )
    return {
        name: Fingerprint(
            tuple(tensor.weight.shape), str(tensor.weight.dtype), tensor.weight.numel() - n, mask, weights
        )
        for (name, tensor), (n, mask, weights) in zip(tensors.items(), numbers, strict=True)
    }


def _fault(name: str, by_rank: list[Fingerprint | None]) -> str | None:
    """What is wrong with one parameter, seen from rank 0; None where nothing is."""
    first = by_rank[0]
    others = [rank for rank, found in enumerate(by_rank) if found != first]
    if not others:
        return None
    if first is None or any(by_rank[rank] is None for rank in others):
        present = [rank for rank, found in enumerate(by_rank) if found is not None]
        return f"{name!r} is prunable on ranks {present} only"
    fields = {f for rank in others for f in Fingerprint._fields if getattr(by_rank[rank], f) != getattr(first, f)}
    of_mask = {"survivors", "mask"}
    what = [word for word, found in (("weights", fields - of_mask), ("mask", fields & of_mask)) if found]
    return f"{' and '.join(what)} of {name!r} differ on ranks {others} from rank 0"
