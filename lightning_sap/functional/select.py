"""PICK: exactly which weights go, the k smallest magnitudes over many tensors, ties by position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from lightning_sap.functional.pqi import chunk_size
from lightning_sap.sharding import ALONE, Shards

DIGIT = 16  # bits resolved by one pass over the weights
KEYS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


def smallest(
    weights: Sequence[Tensor],
    dead: Sequence[Tensor | None],
    k: int,
    room: Sequence[int] | None = None,
    shards: Shards = ALONE,
) -> list[Tensor]:
    """Pick exactly k of the smallest surviving magnitudes of several tensors taken as one vector.

    A radix select on the bit patterns of the magnitudes: a histogram of 16 bits at a time, filled chunk by chunk,
    finds the k-th smallest in two passes over float32 weights; no copy of all weights is made.

    Args:
        weights: Tensors of any shape and floating dtype.
        dead: For each tensor a bool tensor of its shape, True where a weight is pruned already; None: nowhere.
        k: How many to pick, at most the number of survivors.
        room: Most that may be taken from each tensor; the next smallest elsewhere go instead. None: no limit.
        shards: The processes that hold the rows of the tensors; ``k`` and ``room`` are of all rows. They exchange
            histograms and counts, never weights.

    Returns:
        For each tensor a bool tensor of its shape, True where a weight is picked. Ties go to the lower position:
        order of the tensors, then flat index (of sharded tensors: process, then flat index).

    Raises:
        ValueError: If fewer than k weights may be picked.

    Example:
        >>> import torch
        >>> smallest([torch.tensor([3.0, 1.0]), torch.tensor([-1.0, 2.0])], [None, None], 1)
        [tensor([False,  True]), tensor([False, False])]
    """
    left = _sums(
        [w.numel() if d is None else w.numel() - int(d.sum()) for w, d in zip(weights, dead, strict=True)], shards
    )
    room = left if room is None else [min(a, b) for a, b in zip(left, room, strict=True)]
    if k > sum(room):
        raise ValueError(f"Cannot pick {k} weights where only {sum(room)} may go.")
    picked: dict[int, Tensor] = {}
    free = list(range(len(weights)))
    while True:
        chosen = _smallest([weights[i] for i in free], [dead[i] for i in free], k, shards)
        taken = _sums([int(c.sum()) for c in chosen], shards)
        full = {i for i, n in zip(free, taken, strict=True) if n > room[i]}
        if not full:
            picked.update(zip(free, chosen, strict=True))
            return [picked[i] for i in range(len(weights))]
        for i in full:  # a tensor over its room stays so when the others must give more: settle it for good
            picked[i] = _smallest([weights[i]], [dead[i]], room[i], shards)[0]
            k -= room[i]
        free = [i for i in free if i not in full]


def smallest_of_rows(rows: Tensor, dead: Tensor | None, counts: Tensor) -> Tensor:
    """Pick exactly ``counts[i]`` of the smallest surviving magnitudes of each row, ties to the lower position.

    Args:
        rows: Weights of shape ``(units, weights)``.
        dead: Bool tensor of the same shape, True where a weight is pruned already; None: nowhere.
        counts: int64 tensor of shape ``(units,)``.

    Returns:
        Bool tensor of the shape of ``rows``, True where a weight is picked.

    Example:
        >>> import torch
        >>> smallest_of_rows(torch.tensor([[3.0, 1.0, 1.0], [0.0, 2.0, 1.0]]), None, torch.tensor([1, 2]))
        tensor([[False,  True, False],
                [ True, False,  True]])
    """
    picked = torch.zeros(rows.shape, dtype=torch.bool, device=rows.device)
    step = max(1, 8 * chunk_size(rows) // max(1, rows.shape[1]))
    rank = torch.arange(rows.shape[1], device=rows.device)
    for a in range(0, len(rows), step):
        keys = _keys(rows[a : a + step], rows.dtype)
        if dead is not None:
            keys = keys.masked_fill(dead[a : a + step], torch.iinfo(keys.dtype).max)
        order = keys.argsort(dim=1, stable=True)
        picked[a : a + step].scatter_(1, order, rank < counts[a : a + step, None].to(rank.device))
    return picked


def _sums(numbers: list[int], shards: Shards) -> list[int]:
    """Each number summed over the processes."""
    return [int(n) for n in shards.sum(torch.tensor(numbers, dtype=torch.int64))]


def _smallest(weights: Sequence[Tensor], dead: Sequence[Tensor | None], k: int, shards: Shards) -> list[Tensor]:
    if k == 0 or not weights:
        return [torch.zeros(w.shape, dtype=torch.bool, device=w.device) for w in weights]
    dtype = reduce(torch.promote_types, {w.dtype for w in weights})
    threshold, ties = _kth_key(weights, dead, k, dtype, shards)
    picked = []
    for w, d in zip(weights, dead, strict=True):
        below, equal = _below_and_equal(w, d, threshold, dtype, want_equal=ties > 0)
        if ties > 0:
            at = equal.view(-1).nonzero().view(-1)
            found = [int(n) for n in shards.gather(torch.tensor([len(at)]))]
            below.view(-1)[at[: max(0, ties - sum(found[: shards.rank]))]] = True
            ties -= sum(found)
        picked.append(below)
    return picked


def _kth_key(
    weights: Sequence[Tensor], dead: Sequence[Tensor | None], k: int, dtype: torch.dtype, shards: Shards
) -> tuple[int, int]:
    """Key of the k-th smallest survivor, and how many weights of that key are among the k smallest."""
    prefix = 0
    for shift in range(torch.iinfo(KEYS[dtype]).bits - DIGIT, -1, -DIGIT):
        counts = np.zeros(1 << DIGIT, dtype=np.int64)
        for w, d in zip(weights, dead, strict=True):
            for keys in _surviving_keys(w, d, dtype):
                top = shift + DIGIT == torch.iinfo(keys.dtype).bits
                matching = keys if top else keys[(keys >> (shift + DIGIT)) == prefix]
                digits = (matching >> shift) & ((1 << DIGIT) - 1)
                counts += torch.bincount(digits.to(torch.int64), minlength=1 << DIGIT).cpu().numpy()
        counts = shards.sum(torch.from_numpy(counts)).numpy()
        upto = counts.cumsum()
        digit = int(np.searchsorted(upto, k))
        k -= int(upto[digit] - counts[digit])
        prefix = prefix << DIGIT | digit
    return prefix, k


def _below_and_equal(
    weight: Tensor, dead: Tensor | None, threshold: int, dtype: torch.dtype, *, want_equal: bool
) -> tuple[Tensor, Tensor]:
    """Where a survivor's key is below the threshold, and (if wanted) where it is equal."""
    below = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    equal = torch.zeros_like(below) if want_equal else below
    flat, step = weight.detach().reshape(-1), chunk_size(weight)
    for a in range(0, len(flat), step):
        keys, at = _keys(flat[a : a + step], dtype), slice(a, a + step)
        alive = True if dead is None else ~dead.reshape(-1)[at]
        below.view(-1)[at] = (keys < threshold) & alive
        if want_equal:
            equal.view(-1)[at] = (keys == threshold) & alive
    return below, equal


def _surviving_keys(weight: Tensor, dead: Tensor | None, dtype: torch.dtype) -> Iterator[Tensor]:
    """Keys of the survivors of a tensor, chunk by chunk."""
    flat, step = weight.detach().reshape(-1), chunk_size(weight)
    gone = None if dead is None else dead.reshape(-1)
    for a in range(0, len(flat), step):
        keys = _keys(flat[a : a + step], dtype)
        yield keys if gone is None else keys[~gone[a : a + step]]


def _keys(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers ordered as the magnitudes are: the bit patterns of the absolute values."""
    return weight.detach().to(dtype).abs().view(KEYS[dtype])
