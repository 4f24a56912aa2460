"""KEEP: the largest scores of each row, which are not picked."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sap.functional.pqi import BITS, chunk_size


def largest_of_rows(rows: Tensor, excluded: Tensor | None, count: int) -> Tensor:
    """Flag the ``count`` largest magnitudes of each row, of equals those at the higher positions.

    They are what is left of a row when its smallest scores are picked one after the other, ties to the lower position.

    Args:
        rows: Scores of shape ``(sets, weights of a set)``, of a floating dtype.
        excluded: Bool tensor of the same shape, True where none may be flagged; None: nowhere.
        count: How many of each row, at least 1; fewer where fewer may be.

    Returns:
        Bool tensor of the shape of ``rows``.

    Example:
        >>> import torch
        >>> largest_of_rows(torch.tensor([[3.0, -4.0, 4.0], [0.0, 2.0, 1.0]]), None, 1)
        tensor([[False, False,  True],
                [False,  True, False]])
    """
    flags = torch.empty(rows.shape, dtype=torch.bool, device=rows.device)
    if not rows.numel():
        return flags
    rows, step = rows.detach(), max(1, chunk_size(rows) // rows.shape[1])
    for a in range(0, len(rows), step):
        barred = None if excluded is None else excluded[a : a + step]
        flags[a : a + step] = _flagged(rows[a : a + step], barred, min(count, rows.shape[1]))
    return flags


def _flagged(rows: Tensor, excluded: Tensor | None, count: int) -> Tensor:
    keys = rows.abs().view(BITS[rows.dtype])  # integers ordered as the magnitudes are
    if excluded is not None:
        keys = keys.masked_fill(excluded, -1)
    last = keys.amax(1, keepdim=True) if count == 1 else keys.topk(count, dim=1).values[:, -1:]
    last.clamp_(min=0)  # where a row has fewer, all of them
    flags = keys >= last
    surplus = flags.sum(1, keepdim=True) - count
    tied = (surplus > 0).squeeze(1).nonzero().squeeze(1)
    if len(tied):  # more are equal to the last than are wanted: the first of these are let go
        equal = keys[tied] == last[tied]
        flags[tied] &= ~(equal & (equal.cumsum(1) <= surplus[tied]))
    return flags
