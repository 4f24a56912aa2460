"""MEASURE: how sparse is this vector (Diao et al., ICLR 2023, arXiv 2302.05601)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_sap.functional.scalars import is_real
from lightning_sap.functional.scratch import scratch

CHUNK = {"cpu": 1 << 17}  # entries read at a time: what that takes stays in the caches of one core
DEVICE_CHUNK = 1 << 22
BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
DTYPES = tuple(BITS)
ROUNDING = 1e-14  # an index of this size is the rounding of the sums of a constant group
NO_FLOAT64 = ("mps",)  # the sums of tensors on these devices are finished on the CPU
LOWEST_EXPONENT, HIGHEST_EXPONENT = -1073, 1024  # of float64, as frexp has them; all-zero pieces take the lowest one
LARGEST_ORDER = 1000.0  # 2^-1000 is still a normal float64
LARGEST_PLAIN_ORDER = 6.0  # to which magnitudes of float32, 2^-149 to 2^128, can be raised in float64 without scaling


class PowerSums(NamedTuple):
    """All that the PQ Index needs of a group of weights; these sums add over pieces, layers and machines.

    Attributes:
        count: Number of surviving weights ``d``, int64.
        exponent: Power of two ``e`` by which the magnitudes were divided before they were raised, int64.
        sum_p: ``Σ (|w| / 2^e)^p``, float64.
        sum_q: ``Σ (|w| / 2^e)^q``, float64.

    All four have the shape of the groups: ``()`` for one group, ``(units,)`` for one per unit.
    """

    count: Tensor  # type: ignore[assignment]  # shadows tuple.count, which nobody calls
    exponent: Tensor
    sum_p: Tensor
    sum_q: Tensor


def check_orders(p: float, q: float) -> None:
    """Raise unless 0 < p < q, and q is not so large that half of the largest magnitude counts as nothing."""
    if not (is_real(p) and is_real(q) and 0 < p < q <= LARGEST_ORDER):
        raise ValueError(
            f"The orders of the PQ Index must satisfy 0 < p < q <= {LARGEST_ORDER:g}, got p={p!r} and q={q!r}; "
            "try p=0.5, q=1.0."
        )


def pq_index(
    x: Tensor,
    p: float = 0.5,
    q: float = 1.0,
    *,
    mask: Tensor | None = None,
    dim: int | tuple[int, ...] | None = None,
) -> Tensor:
    r"""PQ Index of a tensor: the larger, the sparser.

    .. math:: I_{p,q}(w) = 1 - d^{1/q - 1/p} \frac{\|w\|_p}{\|w\|_q}

    It lies in ``[0, 1 - d^(1/q - 1/p)]``, and neither scaling nor repeating the vector changes it. A group that is
    empty, constant or all zero has index 0.

    Args:
        x: Weights, any shape, device and floating dtype.
        p: Order of the smaller norm, ``0 < p < q``.
        q: Order of the larger norm, at most 1000.
        mask: Bool tensor of the shape of ``x``; only entries where it is True (survivors) count. None: all do.
        dim: Dimensions that form a vector; the others are a batch. None: the whole tensor is one vector.

    Returns:
        float64 tensor, scalar for ``dim=None``, else the shape of ``x`` without ``dim``.

    Raises:
        ValueError: If not ``0 < p < q <= 1000``, or if the mask is not a bool tensor of the shape of ``x``.
        TypeError: If ``x`` is not a tensor of dtype float16, bfloat16, float32 or float64.

    Source: Diao et al., *Pruning Deep Neural Networks from a Sparsity Perspective*, ICLR 2023, Definition 1.

    Example:
        >>> import torch
        >>> pq_index(torch.tensor([0.0, 0.0, 0.0, 2.0]))
        tensor(0.7500, dtype=torch.float64)
        >>> pq_index(torch.tensor([[1.0, 1.0], [0.0, 3.0]]), dim=1)
        tensor([0.0000, 0.5000], dtype=torch.float64)
    """
    return index_of(power_sums(x, p, q, mask=mask, dim=dim), p, q)


def index_of(sums: PowerSums, p: float, q: float) -> Tensor:
    """PQ Index from power sums, ``1 - (power mean of order p) / (power mean of order q)``; float64, their shape."""
    check_orders(p, q)
    count = sums.count.to(torch.float64)
    log_ratio = torch.log(sums.sum_p / count) / p - torch.log(sums.sum_q / count) / q
    index = -torch.expm1(log_ratio)
    return torch.where((sums.sum_q == 0) | (index <= ROUNDING), 0.0, index)


def power_sums(
    x: Tensor,
    p: float,
    q: float,
    *,
    mask: Tensor | None = None,
    dim: int | tuple[int, ...] | None = None,
) -> PowerSums:
    """Count, Σ|w|^p and Σ|w|^q of a tensor in one pass, a chunk at a time, safe for every finite weight.

    Args, raises: see :func:`pq_index`.

    Example:
        >>> import torch
        >>> power_sums(torch.tensor([0.5, -0.5, 0.0]), 1.0, 2.0)
        PowerSums(count=tensor(3), exponent=tensor(0), sum_p=tensor(1., dtype=torch.float64), \
sum_q=tensor(0.5000, dtype=torch.float64))
    """
    check_orders(p, q)
    check_tensors(x, mask)
    rows = as_rows(x, dim)
    alive = None if mask is None else as_rows(mask, dim)
    plain = x.dtype != torch.float64 and q <= LARGEST_PLAIN_ORDER
    sums = _no_sums(rows, alive)
    for at, magnitudes, out in _blocks(rows, alive):
        if plain:
            sums.sum_p[at].add_(_raised(magnitudes, p, out).sum(1))
            sums.sum_q[at].add_(_raised(magnitudes, q, out).sum(1))
        else:
            so_far = PowerSums(*(field[at] for field in sums))
            for field, merged in zip(sums, merge([so_far, _scaled_sums(magnitudes, p, q, out)], p, q), strict=True):
                field[at] = merged
    if plain:
        sums.exponent.masked_fill_(sums.sum_q != 0, 0)
    return PowerSums(*(part.reshape(() if dim is None else _batch_shape(x, dim)) for part in sums))


def merge(parts: Sequence[PowerSums], p: float, q: float) -> PowerSums:
    """Power sums of the union of disjoint pieces, each of the same groups: they add once scaled alike.

    Example:
        >>> import torch
        >>> halves = [power_sums(torch.tensor([w]), 1.0, 2.0) for w in (0.5, 8.0)]
        >>> merge(halves, 1.0, 2.0).sum_p
        tensor(8.5000, dtype=torch.float64)
    """
    return parts[0] if len(parts) == 1 else total(PowerSums(*map(torch.stack, zip(*parts, strict=True))), p, q)


def total(sums: PowerSums, p: float, q: float) -> PowerSums:
    """Power sums of all groups along the first axis together, without that axis."""
    if len(sums.exponent) == 1:
        return PowerSums(*(field[0] for field in sums))
    top = sums.exponent.amax(0) if len(sums.exponent) else sums.exponent.sum(0)
    shift = (sums.exponent - top).to(torch.float64)
    sum_p, sum_q = sums.sum_p * torch.exp2(shift * p), sums.sum_q * torch.exp2(shift * q)
    return PowerSums(sums.count.sum(0), top, sum_p.sum(0), sum_q.sum(0))


def concatenate(parts: Sequence[PowerSums]) -> PowerSums:
    """Power sums of several sets of groups as those of one set, in order."""
    return PowerSums(*(torch.cat([part.reshape(-1) for part in field]) for field in zip(*parts, strict=True)))


def gini_index(x: Tensor, *, mask: Tensor | None = None, dim: int | tuple[int, ...] | None = None) -> Tensor:
    r"""Gini index of the magnitudes, the paper's companion measure of sparsity.

    .. math:: G(w) = \frac{\sum_{i=1}^{d} (2i - d - 1)\,|w|_{(i)}}{d \sum_i |w|_i}, \quad |w|_{(1)} \le |w|_{(2)} \dots

    It sorts a float64 copy of ``x``: exact, and dear on large tensors. A group that is empty or all zero has index 0.

    Args:
        x: Weights, any shape, device and floating dtype.
        mask: Bool tensor of the shape of ``x``; only entries where it is True count. None: all do.
        dim: Dimensions that form a vector; the others are a batch. None: the whole tensor is one vector.

    Returns:
        float64 tensor, scalar for ``dim=None``, else the shape of ``x`` without ``dim``.

    Raises:
        ValueError: If the mask is not a bool tensor of the shape of ``x``.
        TypeError: If ``x`` is not a tensor of dtype float16, bfloat16, float32 or float64.

    Source: Hurley and Rickard, *Comparing Measures of Sparsity*, 2009, as used by Diao et al., ICLR 2023.

    Example:
        >>> import torch
        >>> gini_index(torch.tensor([0.0, 0.0, 0.0, 2.0]))
        tensor(0.7500, dtype=torch.float64)
    """
    check_tensors(x, mask)
    rows = _magnitudes(as_rows(x, dim))
    alive = torch.ones_like(rows, dtype=torch.bool) if mask is None else as_rows(mask, dim).to(rows.device)
    ordered = rows.masked_fill(~alive, -1.0).sort(dim=1).values.clamp(min=0.0)  # the pruned come first, as zeros
    count = alive.sum(1, keepdim=True)
    rank = torch.arange(1, rows.shape[1] + 1, device=rows.device) - (rows.shape[1] - count)
    largest = ordered.amax(1, keepdim=True) if rows.shape[1] else ordered.new_ones(len(ordered), 1)
    ordered = ordered / largest.masked_fill(largest == 0, 1.0)
    total = ordered.sum(1)
    gini = ((2 * rank - count - 1) * ordered).sum(1) / (count.squeeze(1) * total)
    return torch.where(total == 0, 0.0, gini).reshape(() if dim is None else _batch_shape(x, dim))


def check_tensors(x: object, mask: object, name: str = "x") -> None:
    """Raise unless ``x`` is a tensor of a known floating dtype and the mask, if any, a bool tensor of its shape."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor of one of the dtypes {DTYPES}, got {type(x).__name__}; convert it with "
            "torch.tensor(...) or torch.from_numpy(...)."
        )
    if x.is_complex():
        raise TypeError(
            f"{name} is complex ({x.dtype}), but must be of one of the dtypes {DTYPES}; give its magnitudes, .abs(), "
            "or its parts, torch.view_as_real(...)."
        )
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be of one of the dtypes {DTYPES}, got {x.dtype}; convert it, say with .float().")
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"The mask of {name} must be a bool torch.Tensor or None, got {type(mask).__name__}.")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape):
        raise ValueError(
            f"The mask of {name} must be a bool tensor of its shape {tuple(x.shape)}, "
            f"got {mask.dtype} of shape {tuple(mask.shape)}."
        )


def count_true(masks: Sequence[Tensor]) -> Tensor:
    """How many entries of each are True, int64, on the CPU; of those on one other device, at one transfer.

    Example:
        >>> import torch
        >>> count_true([torch.tensor([True, False]), torch.ones(2, 2, dtype=torch.bool)])
        tensor([1, 4])
    """
    if all(mask.device.type == "cpu" for mask in masks):  # NumPy counts many times faster
        return torch.tensor([np.count_nonzero(mask.numpy()) for mask in masks], dtype=torch.int64)
    return torch.stack([mask.count_nonzero().to(masks[0].device) for mask in masks]).cpu()


def chunk_size(x: Tensor) -> int:
    """How many entries of a tensor are read at a time."""
    return CHUNK.get(x.device.type, DEVICE_CHUNK)


def as_rows(x: Tensor, dim: int | tuple[int, ...] | None) -> Tensor:
    """View (or copy, where no view exists) as (vectors, entries)."""
    x = x.detach()
    if dim is None:
        return x.reshape(1, -1)
    inner = _inner_dims(x, dim)
    moved = x.movedim(inner, tuple(range(x.dim() - len(inner), x.dim())))
    batch = _batch_shape(x, dim).numel()
    return moved.reshape(batch, x.numel() // batch if batch else 0)


def _inner_dims(x: Tensor, dim: int | tuple[int, ...]) -> tuple[int, ...]:
    dims = (dim,) if isinstance(dim, int) else dim
    return tuple(sorted(range(x.dim())[d] for d in dims))


def _batch_shape(x: Tensor, dim: int | tuple[int, ...]) -> torch.Size:
    inner = _inner_dims(x, dim)
    return torch.Size(size for axis, size in enumerate(x.shape) if axis not in inner)


def _device_of_sums(x: Tensor) -> torch.device:
    return torch.device("cpu") if x.device.type in NO_FLOAT64 else x.device


def _magnitudes(block: Tensor) -> Tensor:
    """A float64 copy of the absolute values."""
    return torch.empty(block.shape, dtype=torch.float64, device=_device_of_sums(block)).copy_(block).abs_()


def _no_sums(rows: Tensor, alive: Tensor | None) -> PowerSums:
    """Power sums of the rows before anything is added to them, but with the counts."""
    device, vectors = _device_of_sums(rows), len(rows)
    count = torch.full((vectors,), rows.shape[1], device=device)
    if alive is not None:
        count = _count_true_in_rows(alive).to(device)
    sums = torch.zeros(2, vectors, dtype=torch.float64, device=device)
    return PowerSums(count, torch.full_like(count, LOWEST_EXPONENT), *sums)


def _count_true_in_rows(rows: Tensor) -> Tensor:
    if rows.device.type != "cpu":
        return rows.count_nonzero(dim=1)
    return count_true([rows]) if len(rows) == 1 else torch.from_numpy(np.count_nonzero(rows.numpy(), axis=1))


def _blocks(rows: Tensor, alive: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Chunk by chunk which rows it is of, its magnitudes in float64, those of the dead 0, and space for their powers.

    What is yielded is written over by the next.
    """
    step, device = chunk_size(rows), _device_of_sums(rows)
    length = min(step, rows.numel())
    space = scratch(2 * length * torch.float64.itemsize, device).view(torch.float64).view(2, length)
    height = max(1, step // max(1, rows.shape[1]))
    magnitudes, out = space
    for top in range(0, len(rows), height):
        for left in range(0, rows.shape[1], step):
            at = slice(top, top + height), slice(left, left + step)
            block = rows[at].to(device)
            if magnitudes.shape != block.shape:
                magnitudes, out = space[:, : block.numel()].view(2, *block.shape)
            if alive is not None:
                # all bits of the dead go to 0, also of those that are not finite; masked_fill_ takes four times as long
                bits = out.view(-1).view(BITS[block.dtype])[: block.numel()].view(block.shape)
                block = torch.mul(block.view(bits.dtype), alive[at].to(device), out=bits).view(block.dtype)
            yield at[0], magnitudes.copy_(block).abs_(), out


def _scaled_sums(magnitudes: Tensor, p: float, q: float, out: Tensor) -> PowerSums:
    """Power sums of each row, scaled so that nothing overflows or underflows; without the counts."""
    largest = magnitudes.amax(1)
    exponent = torch.frexp(largest).exponent.to(torch.int64).clamp(LOWEST_EXPONENT, HIGHEST_EXPONENT)  # or not finite
    exponent = exponent.masked_fill(largest == 0, LOWEST_EXPONENT)
    sums = (_power_sum(magnitudes, exponent.to(torch.float64), order, out) for order in (p, q))
    return PowerSums(torch.zeros_like(exponent), exponent, *sums)


def _power_sum(magnitudes: Tensor, exponent: Tensor, order: float, out: Tensor) -> Tensor:
    """Σ (m / 2^e)^order over each row."""
    if order <= 0.5:  # nothing overflows, but what is divided first may underflow and still count
        return _raised(magnitudes, order, out).sum(1) * _power_of_two(-exponent, order)
    half = torch.floor(exponent / 2).unsqueeze(1)  # 2^-e itself may be no float64
    scaled = torch.mul(magnitudes, torch.exp2(-half), out=out).mul_(torch.exp2(half - exponent.unsqueeze(1)))
    return _raised(scaled, order, out).sum(1)


def _power_of_two(exponent: Tensor, order: float) -> Tensor:
    """2^(exponent · order), of a whole exponent; without the error that a large product would bring in."""
    coarse = math.ldexp(round(math.ldexp(order, 30)), -30)  # its product is exact, and what is left over is small
    return torch.exp2(exponent * coarse) * torch.exp2(exponent * (order - coarse))


def _raised(magnitudes: Tensor, order: float, out: Tensor) -> Tensor:
    """Powers of magnitudes, the common ones without the slow way that suits all; ``out`` may be written to."""
    if order == 1:
        return magnitudes
    if order == 0.5:
        if out.device.type != "cpu":
            return torch.sqrt(magnitudes, out=out)
        np.sqrt(magnitudes.numpy(), out=out.numpy())  # NumPy takes half as long as PyTorch
        return out
    return torch.square(magnitudes, out=out) if order == 2 else torch.pow(magnitudes, order, out=out)
