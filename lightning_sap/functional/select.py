"""PICK: exactly which weights go, the k smallest magnitudes over many tensors, ties by position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lightning_sap.functional.pqi import chunk_size
from lightning_sap.sharding import ALONE, Shards

KEYS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
FEW = 1 << 12  # weights among which the k-th is found without a sample
DIGIT = 16  # bits resolved by one pass of the histogram

Array: TypeAlias = Any  # on the CPU a NumPy array, whose comparisons and sorts are many times faster, else a tensor
Part: TypeAlias = tuple[Tensor, Tensor | None, Tensor]  # weights, where they are dead, where they are picked


def smallest(
    weights: Sequence[Tensor],
    dead: Sequence[Tensor | None],
    k: int,
    room: Sequence[int] | None = None,
    shards: Shards = ALONE,
) -> list[Tensor]:
    """Pick exactly k of the smallest surviving magnitudes of several tensors taken as one vector.

    The k-th smallest is looked for where a sample says it is, and by a radix select if it is not there; both work chunk
    by chunk on the bit patterns of the magnitudes, and no copy of all weights is made.

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
        [w.numel() - (0 if d is None else _count(_array(d))) for w, d in zip(weights, dead, strict=True)], shards
    )
    room = left if room is None else [min(a, b) for a, b in zip(left, room, strict=True)]
    if k > sum(room):
        raise ValueError(f"Cannot pick {k} weights where only {sum(room)} may go.")
    picked: dict[int, Tensor] = {}
    free = list(range(len(weights)))
    while True:
        chosen = _smallest([weights[i] for i in free], [dead[i] for i in free], k, shards)
        taken = _sums([_count(_array(c)) for c in chosen], shards)
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
    flags, wanted = _array(picked), _array(counts.to(rows.device))
    step = max(1, chunk_size(rows) // max(1, rows.shape[1]))
    for a in range(0, len(rows) if rows.shape[1] else 0, step):
        at = slice(a, a + step)
        flags[at] = _of_block(_keys(rows[at], None if dead is None else dead[at], rows.dtype), wanted[at])
    return picked


def _of_block(keys: Array, counts: Array) -> Array:
    """Where the ``counts[i]`` smallest keys of each row are."""
    most = max(1, int(counts.max()))
    ordered = _first_of_rows(keys, most) if isinstance(keys, np.ndarray) else keys.sort(dim=1).values
    last = ordered[range(len(keys)), counts - 1][:, None]
    last[counts == 0] = -1
    flags = keys <= last
    if _count(flags) > int(counts.sum()):  # in some rows more keys are equal to the last one than may go
        surplus = flags.sum(1) - counts
        tied = _where(surplus)
        equal = keys[tied] == last[tied]
        room = equal.sum(1) - surplus[tied]
        flags[tied] = flags[tied] & (~equal | (equal.cumsum(1) <= room[:, None]))
    return flags


def _first_of_rows(keys: Array, count: int) -> Array:
    """The ``count`` smallest keys of each row, in order."""
    first = np.partition(keys, count - 1, axis=1)[:, :count]
    first.sort(axis=1)
    return first


def _sums(numbers: list[int], shards: Shards) -> list[int]:
    """Each number summed over the processes."""
    return [int(n) for n in shards.sum(torch.tensor(numbers, dtype=torch.int64))]


def _smallest(weights: Sequence[Tensor], dead: Sequence[Tensor | None], k: int, shards: Shards) -> list[Tensor]:
    picked = [torch.zeros(w.shape, dtype=torch.bool, device=w.device) for w in weights]
    if k > 0:
        dtype = reduce(torch.promote_types, {w.dtype for w in weights})
        parts = list(zip(weights, dead, picked, strict=True))
        if shards.mesh is not None or not _pick_by_sample(parts, k, dtype):
            _pick_by_histogram(parts, k, dtype, shards)
    return picked


def _chunks(parts: Sequence[Part], dtype: torch.dtype) -> Iterator[tuple[Array, Array]]:
    """The keys of all weights, chunk by chunk, each with the place of its flags."""
    for w, d, flags in parts:
        flat, gone, place = w.reshape(-1), None if d is None else d.reshape(-1), _array(flags.view(-1))
        for start in range(0, len(flat), chunk_size(w)):
            at = slice(start, start + chunk_size(w))
            yield _keys(flat[at], None if gone is None else gone[at], dtype), place[at]


def _pick_by_sample(parts: Sequence[Part], k: int, dtype: torch.dtype) -> bool:
    """Flag the k smallest in one pass; False if the sample does not lead there.

    The sample gives two keys. What is below them is flagged and counted, what is between them is kept, and where the
    counts prove that the k-th smallest is among the kept, that is where it is found.
    """
    low, high = _bracket(parts, k, dtype)
    kept, space = [], max(FEW, sum(w.numel() for w, _, _ in parts) // 8)
    for keys, flags in _chunks(parts, dtype):
        flags[:] = keys < low
        between = _where((keys <= high) != flags)
        kept.append((flags, between, keys[between]))
        k -= _count(flags)
        space -= len(between)
        if k <= 0 or space < 0:
            return False
    candidates = np.concatenate([_to_numpy(keys) for _, _, keys in kept])
    if k > len(candidates):
        return False
    candidates.partition(k - 1)
    last = int(candidates[k - 1])
    ties = k - _count(candidates[:k] < last)
    for flags, between, keys in kept:
        flags[between[keys < last]] = True
        first = between[keys == last][:ties]
        flags[first] = True
        ties -= len(first)
    return True


def _bracket(parts: Sequence[Part], k: int, dtype: torch.dtype) -> tuple[int, int]:
    """Two keys between which the k-th smallest almost surely is."""
    smallest, largest = 0, torch.iinfo(KEYS[dtype]).max - 1  # of what is alive
    total = sum(w.numel() for w, _, _ in parts)
    if total <= FEW:
        return smallest, largest
    size = min(total, round(2 * total ** (2 / 3)))  # so many cost about as much as what is between the two keys
    sample = _sample(parts, total, size, dtype)
    rank = size * k / total
    margin = 1 + 3 * (rank * (1 - k / total)) ** 0.5  # three standard deviations: outside is one case in 400
    low, high = int(rank - margin), int(rank + margin)
    below = int(np.partition(sample, low)[low]) if low >= 0 else smallest
    above = int(np.partition(sample, high)[high]) if high < size else largest
    return below, min(above, largest)


def _sample(parts: Sequence[Part], total: int, size: int, dtype: torch.dtype) -> Any:
    """The keys of one weight out of each of ``size`` stretches of the same length, drawn at random."""
    random = np.random.default_rng(0).random(size)  # the user's generators are left alone
    drawn = ((np.arange(size) + random) * (total / size)).astype(np.int64).clip(max=total - 1)
    keys, start = [], 0
    for w, d, _ in parts:
        of_weight = drawn[slice(*np.searchsorted(drawn, (start, start + w.numel())))] - start
        at = torch.from_numpy(of_weight).to(w.device)
        gone = None if d is None else d.reshape(-1).index_select(0, at)
        keys.append(_to_numpy(_keys(w.detach().reshape(-1).index_select(0, at), gone, dtype)))
        start += w.numel()
    return np.concatenate(keys)


def _pick_by_histogram(parts: Sequence[Part], k: int, dtype: torch.dtype, shards: Shards) -> None:
    """Flag the k smallest of all processes, however many are equal, as far as they are here."""
    last, ties = _kth_key(parts, k, dtype, shards)
    equal = torch.tensor([sum(_count(keys == last) for keys, _ in _chunks([part], dtype)) for part in parts])
    of_ranks = torch.stack(shards.gather(equal), dim=1)  # in the order in which ties go: tensor, process
    before = of_ranks.view(-1).cumsum(0).view(of_ranks.shape) - of_ranks
    for part, earlier in zip(parts, before[:, shards.rank].tolist(), strict=True):
        left = max(0, ties - earlier)
        for keys, flags in _chunks([part], dtype):
            flags[:] = keys < last
            first = _where(keys == last)[:left]
            flags[first] = True
            left -= len(first)


def _kth_key(parts: Sequence[Part], k: int, dtype: torch.dtype, shards: Shards) -> tuple[int, int]:
    """Key of the k-th smallest survivor, and how many weights of that key are among the k smallest.

    A radix select: a histogram of 16 bits at a time finds the key in two passes over float32 weights.
    """
    prefix, bits = 0, torch.iinfo(KEYS[dtype]).bits
    for shift in range(bits - DIGIT, -1, -DIGIT):
        counts = np.zeros(1 << DIGIT, dtype=np.int64)
        for keys, _ in _chunks(parts, dtype):
            matching = torch.as_tensor(keys if shift + DIGIT == bits else keys[(keys >> (shift + DIGIT)) == prefix])
            digits = (matching >> shift) & ((1 << DIGIT) - 1)
            counts += torch.bincount(digits.to(torch.int64), minlength=1 << DIGIT).cpu().numpy()
        counts = shards.sum(torch.from_numpy(counts)).numpy()
        upto = counts.cumsum()
        digit = int(np.searchsorted(upto, k))
        k -= int(upto[digit] - counts[digit])
        prefix = prefix << DIGIT | digit
    return prefix, k


def _keys(weight: Tensor, dead: Tensor | None, dtype: torch.dtype) -> Array:
    """Integers ordered as the magnitudes are: their bit patterns; what is dead comes after all that is alive."""
    keys = weight.detach().to(dtype).abs().view(KEYS[dtype])
    if dead is not None:
        keys |= dead.to(keys.dtype).mul_(torch.iinfo(keys.dtype).max)
    return _array(keys)


def _array(tensor: Tensor) -> Array:
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def _to_numpy(array: Array) -> Any:
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()


def _count(flags: Array) -> int:
    return int(np.count_nonzero(flags) if isinstance(flags, np.ndarray) else flags.count_nonzero())


def _where(flags: Array) -> Array:
    return np.flatnonzero(flags) if isinstance(flags, np.ndarray) else flags.nonzero().view(-1)
