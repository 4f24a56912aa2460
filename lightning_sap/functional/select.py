"""PICK: exactly which weights go, the k with the smallest scores over many tensors, ties by position.

The magnitudes of scores are compared by their bit patterns, integers of the same order. All works chunk by chunk,
without a copy of all scores; a tensor that is not contiguous, or narrower than others beside it, is copied, one at a
time. On the CPU, NumPy compares and partitions many times faster than PyTorch. What runs elsewhere never waits for the
device, but for ``smallest`` over several tensors of which some have too little room.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_sap.functional.pqi import BITS, chunk_size, count_true
from lightning_sap.functional.scratch import scratch
from lightning_sap.sharding import ALONE, Shards

FEW = 1 << 12  # scores among which the k-th is found without a sample
DIGIT = 16  # bits resolved by one pass of the histogram


class Part(NamedTuple):
    """A tensor to pick from: its scores, where none may be picked (None: nowhere), and where to flag those picked."""

    scores: Tensor
    excluded: Tensor | None
    flags: Tensor


def smallest(
    scores: Sequence[Tensor],
    excluded: Sequence[Tensor | None],
    k: int,
    room: Sequence[int] | None = None,
    shards: Shards = ALONE,
) -> list[Tensor]:
    """Pick exactly the k smallest magnitudes of the scores of several tensors taken as one vector.

    On the CPU the k-th smallest is looked for where a sample says it is, and by a radix select if counting shows that
    it is not there; elsewhere by a radix select.

    Args:
        scores: Tensors of any shape and floating dtype.
        excluded: For each tensor a bool tensor of its shape, True where none may be picked; None: nowhere.
        k: How many to pick, at most as many as are not excluded.
        room: Most that may be picked of each tensor, at most what is not excluded; the next smallest elsewhere go
            instead. None: all that is not excluded, which is counted then.
        shards: The processes that hold the rows of the tensors; ``k`` and ``room`` are of all rows. They exchange
            histograms and counts, never scores.

    Returns:
        For each tensor a bool tensor of its shape, True where a score is picked. Ties go to the lower position:
        order of the tensors, then flat index (of sharded tensors: process, then flat index).

    Raises:
        ValueError: If fewer than k may be picked.

    Example:
        >>> import torch
        >>> smallest([torch.tensor([3.0, 1.0]), torch.tensor([-1.0, 2.0])], [None, None], 1)
        [tensor([False,  True]), tensor([False, False])]
    """
    if room is None:
        barred = shards.sum(count_true([torch.zeros(0) if x is None else x for x in excluded])).tolist()
        sizes = shards.sum(torch.tensor([s.numel() for s in scores])).tolist()
        room = [size - n for size, n in zip(sizes, barred, strict=True)]
    if k > sum(room):
        raise ValueError(f"Cannot pick {k} weights where only {sum(room)} may go.")
    picked: dict[int, Tensor] = {}
    free = list(range(len(scores)))
    while True:
        chosen = _smallest([scores[i] for i in free], [excluded[i] for i in free], k, shards)
        # of one tensor no more than k are taken, which fit
        taken = shards.sum(count_true(chosen)).tolist() if len(free) > 1 else [k] * len(free)
        full = {i for i, n in zip(free, taken, strict=True) if n > room[i]}
        if not full:
            picked.update(zip(free, chosen, strict=True))
            return [picked[i] for i in range(len(scores))]
        for i in full:  # a tensor over its room stays so when the others must give more: settle it for good
            picked[i] = _smallest([scores[i]], [excluded[i]], room[i], shards)[0]
            k -= room[i]
        free = [i for i in free if i not in full]


def smallest_of_rows(rows: Tensor, excluded: Tensor | None, counts: Tensor) -> Tensor:
    """Pick exactly ``counts[i]`` of the smallest magnitudes of each row, ties to the lower position.

    Args:
        rows: Scores of shape ``(units, weights of a unit)``.
        excluded: Bool tensor of the same shape, True where none may be picked; None: nowhere.
        counts: int64 tensor of shape ``(units,)``.

    Returns:
        Bool tensor of the shape of ``rows``, True where a score is picked.

    Example:
        >>> import torch
        >>> smallest_of_rows(torch.tensor([[3.0, 1.0, 1.0], [0.0, 2.0, 1.0]]), None, torch.tensor([1, 2]))
        tensor([[False,  True, False],
                [ True, False,  True]])
    """
    picked = torch.empty(rows.shape, dtype=torch.bool, device=rows.device)
    rows, counts = rows.detach(), counts.to(rows.device)
    if not rows.numel():
        return picked
    step = max(1, chunk_size(rows) // rows.shape[1])
    space: Any = None
    if rows.device.type == "cpu":
        memory = scratch(2 * step * rows.shape[1] * rows.element_size()).view(BITS[rows.dtype])
        space = memory.view(2, step, rows.shape[1]).numpy()
    for a in range(0, len(rows), step):
        at = slice(a, a + step)
        barred = None if excluded is None else excluded[at]
        if space is None:
            picked[at] = _of_rows(_keys(rows[at], barred, rows.dtype), counts[at, None])
        else:
            _flag_rows(rows[at], barred, counts[at].numpy(), picked[at].numpy(), space[:, : len(rows[at])])
    return picked


def _flag_rows(rows: Tensor, excluded: Tensor | None, counts: Any, flags: Any, space: Any) -> None:
    """Flag the ``counts[i]`` smallest of each row, in memory given."""
    keys, ordered = space
    largest = np.iinfo(keys.dtype).max
    np.bitwise_and(_numpy(rows), largest, out=keys)
    if excluded is not None:
        keys |= np.multiply(excluded.numpy(), keys.dtype.type(largest), out=ordered)
    ordered[:] = keys
    least, most = max(1, int(counts.min())), max(1, int(counts.max()))
    ordered.partition(most - 1, axis=1)
    ordered[:, :most].partition(least - 1, axis=1)
    ordered = ordered[:, least - 1 : most]
    ordered.sort(axis=1)  # from the last of the row that loses fewest to that of the one that loses most
    last = ordered[np.arange(len(ordered)), np.maximum(counts - least, 0)]
    last[counts == 0] = -1
    np.less_equal(keys, last[:, None], out=flags)
    if np.count_nonzero(flags) > counts.sum():  # in some rows more are equal to the last than may go
        surplus = np.count_nonzero(flags, axis=1) - counts
        tied = np.flatnonzero(surplus)
        equal = keys[tied] == last[tied, None]
        room = np.count_nonzero(equal, axis=1) - surplus[tied]
        flags[tied] &= ~equal | (equal.cumsum(axis=1) <= room[:, None])


def _of_rows(keys: Tensor, counts: Tensor) -> Tensor:
    """The same for a device that is not to be waited for."""
    last = keys.sort(dim=1).values.gather(1, (counts - 1).clamp(min=0))
    below, equal = keys < last, keys == last
    return below | (equal & (equal.cumsum(1) <= counts - below.sum(1, keepdim=True)))


def _smallest(scores: Sequence[Tensor], excluded: Sequence[Tensor | None], k: int, shards: Shards) -> list[Tensor]:
    fresh = torch.empty if k > 0 else torch.zeros  # every flag is written where some are picked
    picked = [fresh(w.shape, dtype=torch.bool, device=w.device) for w in scores]
    if k > 0:
        dtype = reduce(torch.promote_types, {w.dtype for w in scores})
        parts = [Part(w.detach(), d, flags) for w, d, flags in zip(scores, excluded, picked, strict=True)]
        on_cpu = shards.mesh is None and all(w.device.type == "cpu" for w in scores)
        if not (on_cpu and _pick_by_sample(parts, k, dtype)):
            _pick_by_histogram(parts, k, dtype, shards)
    return picked


def _chunks(part: Part) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Scores, where they are excluded, and flags, chunk by chunk in the order of flat indices."""
    scores, excluded, flags = part.scores.reshape(-1), part.excluded, part.flags.view(-1)
    barred = None if excluded is None else excluded.reshape(-1)
    for a in range(0, len(scores), chunk_size(scores)):
        at = slice(a, a + chunk_size(scores))
        yield scores[at], None if barred is None else barred[at], flags[at]


def _pick_by_sample(parts: Sequence[Part], k: int, dtype: torch.dtype) -> bool:
    """Flag the k smallest in one pass; False if the sample does not lead there.

    The sample gives two keys. What is below them is flagged and counted, what is between them is kept, and where the
    counts prove that the k-th smallest is among the kept, that is where it is found.
    """
    sizes = [part.scores.numel() for part in parts]
    low, high = _bracket(parts, k, dtype)
    kept, start, below, held = [], 0, 0, 0
    for keys, barred, flags, between in _keys_of_chunks(parts, dtype):
        np.less(keys, low, out=flags)
        np.less_equal(keys, high, out=between)
        if barred is not None:
            np.greater(flags, barred, out=flags)  # and not excluded
            np.greater(between, barred, out=between)
        np.not_equal(between, flags, out=between)
        at = _places(between)
        kept.append((at + start, keys[at]))
        start, below, held = start + len(keys), below + np.count_nonzero(flags), held + len(at)
        if below >= k or held > max(FEW, sum(sizes) // 8):
            return False
    if below + held < k:
        return False
    positions, keys = (np.concatenate(part) for part in zip(*kept, strict=True))
    last = np.partition(keys, k - below - 1)[k - below - 1]
    chosen = keys < last
    chosen[np.flatnonzero(keys == last)[: k - below - np.count_nonzero(chosen)]] = True
    ends = np.cumsum(sizes)
    bounds = np.searchsorted(positions, [0, *ends])
    for part, a, b, end, size in zip(parts, bounds, bounds[1:], ends, sizes, strict=False):
        part.flags.view(-1).numpy()[positions[a:b] - (end - size)] = chosen[a:b]
    return True


def _places(flags: Any) -> Any:
    """Where flags are True, as ``np.flatnonzero`` has it, in less time where few are: eight are looked at at once."""
    end = len(flags) // 8 * 8
    eights = flags[:end].view(np.uint64)
    some = np.flatnonzero(eights != 0)
    at = np.flatnonzero(eights[some].view(bool))
    return np.concatenate([(some[at >> 3] << 3) + (at & 7), end + np.flatnonzero(flags[end:])])


def _keys_of_chunks(parts: Sequence[Part], dtype: torch.dtype) -> Iterator[tuple[Any, Any, Any, Any]]:
    """Keys, where excluded, flags, and space for as many flags, as NumPy arrays; keys and space are used over again."""
    step, largest = chunk_size(parts[0].scores), torch.iinfo(BITS[dtype]).max
    longest = min(step, max(part.scores.numel() for part in parts))
    memory = scratch(longest * (dtype.itemsize + 1))
    keys, space = memory[:-longest].view(BITS[dtype]).numpy(), memory[-longest:].view(torch.bool).numpy()
    for part in parts:
        bits, flags = _numpy(part.scores.reshape(-1).to(dtype)), part.flags.view(-1).numpy()
        barred = None if part.excluded is None else part.excluded.reshape(-1).numpy()
        for a in range(0, len(bits), step):
            at = slice(a, a + step)
            n = len(flags[at])
            np.bitwise_and(bits[at], largest, out=keys[:n])
            yield keys[:n], None if barred is None else barred[at], flags[at], space[:n]


def _bracket(parts: Sequence[Part], k: int, dtype: torch.dtype) -> tuple[int, int]:
    """Two keys between which the k-th smallest almost surely is."""
    smallest, largest = 0, torch.iinfo(BITS[dtype]).max
    total = sum(part.scores.numel() for part in parts)
    if total <= FEW:
        return smallest, largest
    sample = _sample(parts, total, dtype)
    size = len(sample)
    rank = size * k / total
    margin = 1 + 4 * (rank * (1 - k / total)) ** 0.5  # four standard deviations: outside is one case in 15,000
    low, high = int(rank - margin), int(rank + margin)
    below, above = smallest, largest
    if high < size:
        sample.partition(high)
        above = int(sample[high])
    if low >= 0:
        sample[:high].partition(low)
        below = int(sample[low])
    return below, above


def _sample(parts: Sequence[Part], total: int, dtype: torch.dtype) -> Any:
    """The keys of one score in every so many: about as many keys as will be between two of them."""
    stride = max(1, round(total ** (1 / 3) / 3))
    while math.gcd(stride, 210) > 1:  # in step neither with rows nor with kernels
        stride += 1
    keys, first = [], 0
    for part in parts:
        scores = part.scores.reshape(-1)[first::stride]
        barred = None if part.excluded is None else part.excluded.reshape(-1)[first::stride]
        keys.append(_keys(scores, barred, dtype).numpy())
        first = (first - part.scores.numel()) % stride
    return np.concatenate(keys)


def _pick_by_histogram(parts: Sequence[Part], k: int, dtype: torch.dtype, shards: Shards) -> None:
    """Flag the k smallest of all processes, however many are equal, as far as they are here."""
    last, ties = _kth_key(parts, k, dtype, shards)
    equal = torch.stack([_equal(part, last, dtype) for part in parts])
    of_ranks = torch.stack(shards.gather(equal), dim=1)  # in the order in which ties go: tensor, process
    before = of_ranks.view(-1).cumsum(0).view(of_ranks.shape) - of_ranks
    for part, earlier in zip(parts, before[:, shards.rank], strict=True):
        key, left = last.to(part.scores.device), (ties - earlier).to(part.scores.device)
        for scores, barred, flags in _chunks(part):
            keys = _keys(scores, barred, dtype)
            same = keys == key
            flags.copy_((keys < key) | (same & (same.cumsum(0) <= left)))
            left = left - same.count_nonzero()


def _kth_key(parts: Sequence[Part], k: int, dtype: torch.dtype, shards: Shards) -> tuple[Tensor, Tensor]:
    """Key of the k-th smallest, and how many scores of that key are among the k smallest.

    A radix select: a histogram of 16 bits at a time finds the key in two passes over float32 scores.
    """
    device = parts[0].scores.device
    prefix = torch.zeros(1, dtype=torch.int64, device=device)
    rank = torch.full_like(prefix, k)
    for shift in range(torch.iinfo(BITS[dtype]).bits - DIGIT, -1, -DIGIT):
        counts = torch.zeros(1 << DIGIT, dtype=torch.int64, device=device)
        for part in parts:
            counts += _histogram(part, prefix, shift, dtype).to(device)
        counts = shards.sum(counts)
        upto = counts.cumsum(0)
        digit = torch.searchsorted(upto, rank)
        rank = rank - (upto - counts).gather(0, digit)
        prefix = prefix << DIGIT | digit
    return prefix.squeeze(0), rank.squeeze(0)


def _histogram(part: Part, prefix: Tensor, shift: int, dtype: torch.dtype) -> Tensor:
    """How many keys that begin with the prefix go on with each digit."""
    counts = torch.zeros((1 << DIGIT) + 1, dtype=torch.int64, device=part.scores.device)
    prefix = prefix.to(counts.device)
    for scores, barred, _ in _chunks(part):
        digits = _keys(scores, barred, dtype).to(torch.int64) >> shift
        others = digits >> DIGIT != prefix
        digits = (digits & ((1 << DIGIT) - 1)).masked_fill_(others, 1 << DIGIT)
        counts.scatter_add_(0, digits, torch.ones_like(counts[:1]).expand_as(digits))
    return counts[:-1]


def _equal(part: Part, key: Tensor, dtype: torch.dtype) -> Tensor:
    """How many scores have the key, on the device of the key."""
    found = torch.zeros_like(key)
    for scores, barred, _ in _chunks(part):
        found += (_keys(scores, barred, dtype) == key.to(scores.device)).count_nonzero().to(found.device)
    return found


def _keys(scores: Tensor, excluded: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Integers ordered as the magnitudes are: their bit patterns; what is excluded comes after all others."""
    keys = scores.to(dtype).abs().view(BITS[dtype])
    return keys if excluded is None else keys | excluded.to(keys.dtype).mul_(torch.iinfo(keys.dtype).max)


def _numpy(scores: Tensor) -> Any:
    """The bit patterns of scores on the CPU."""
    return scores.view(BITS[scores.dtype]).numpy()
