"""AMOUNT: how many weights go, in numbers alone (Diao et al., ICLR 2023, arXiv 2302.05601)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_sap.functional.pqi import check_orders
from lightning_sap.functional.scalars import is_real

TOLERANCE = 1e-9  # of the number rounded, but never so much that a whole number would turn into its neighbour
LARGEST_SLACK = 0.25


def ceil(x: Tensor) -> Tensor:
    """Ceiling by which whole numbers survive the order in which sums were taken; int64.

    Example:
        >>> import torch
        >>> ceil(torch.tensor([3.0000000001, 3.1], dtype=torch.float64))
        tensor([3, 4])
    """
    return torch.ceil(x - _slack(x)).to(torch.int64)


def floor(x: Tensor) -> Tensor:
    """Floor by which whole numbers survive the order in which sums were taken; int64.

    Example:
        >>> import torch
        >>> floor(torch.tensor([2.9999999999, 2.9], dtype=torch.float64))
        tensor([3, 2])
    """
    return torch.floor(x + _slack(x)).to(torch.int64)


def retained_lower_bound(index: Tensor | float, d: Tensor | int, p: float, q: float, eta_r: float = 0.0) -> Tensor:
    r"""Lower bound on how many of ``d`` weights to keep, not rounded.

    .. math:: r = d\,(1 + \eta_r)^{-\frac{q}{q-p}}\,(1 - I)^{\frac{pq}{q-p}}

    With ``eta_r = 0, p = 1, q = 2`` it is the participation ratio ``‖w‖₁² / ‖w‖₂²``.

    Args:
        index: PQ Index of each group, any shape.
        d: Number of surviving weights of each group.
        p: Order of the smaller norm, ``0 < p < q``.
        q: Order of the larger norm.
        eta_r: Slack in the bound, at least 0: the larger, the fewer are kept.

    Returns:
        float64 tensor of the groups' shape.

    Raises:
        ValueError: If not ``0 < p < q``, or if ``eta_r`` is negative.

    Source: Diao et al., ICLR 2023, Theorem 2.

    Example:
        >>> retained_lower_bound(0.75, 4, p=0.5, q=1.0)
        tensor(1., dtype=torch.float64)
    """
    check_orders(p, q)
    check_at_least_zero("eta_r", eta_r)
    index, d = _groups(index, d)
    slack: float = (1 + eta_r) ** (-q / (q - p))
    return d * slack * torch.pow((1 - index).clamp(min=0.0), p * q / (q - p))


def prune_count(
    index: Tensor | float,
    d: Tensor | int,
    p: float,
    q: float,
    *,
    eta_r: float = 0.0,
    gamma: float = 1.0,
    beta: float = 0.9,
) -> Tensor:
    r"""Number of weights to prune from each group.

    .. math:: c = \max(0, \min(\lfloor \gamma\,(d - \lceil r \rceil) \rfloor, \lfloor \beta d \rfloor))

    Args:
        index: PQ Index of each group, any shape.
        d: Number of surviving weights of each group.
        p: Order of the smaller norm, ``0 < p < q``.
        q: Order of the larger norm.
        eta_r: Slack in the bound ``r`` of :func:`retained_lower_bound`, at least 0.
        gamma: Scale of the amount, at least 0.
        beta: Largest fraction of a group pruned at once, in ``[0, 1)``.

    Returns:
        int64 tensor of the groups' shape.

    Raises:
        ValueError: If an argument is out of its range.

    Source: Diao et al., ICLR 2023, Algorithm 1.

    Example:
        >>> prune_count(0.5, 100, p=0.5, q=1.0)
        tensor(50)
        >>> prune_count(0.99, 100, p=0.5, q=1.0)
        tensor(90)
    """
    check_at_least_zero("gamma", gamma)
    check_beta(beta)
    kept = retained_lower_bound(index, d, p, q, eta_r)
    return count_to_prune(kept, torch.as_tensor(d).to(kept), gamma, beta)


def spread(total: int, shares: Tensor, room: Tensor) -> Tensor:
    """Split a whole number over groups in proportion to their shares, no group getting more than its room.

    What does not fit into one group goes to those with room left, in proportion to their shares (to their room where
    all shares are 0); largest remainders first, ties to the lower position.

    Args:
        total: The number to split; where all rooms together are smaller, that much is split.
        shares: Non-negative weight of each group, int64, shape ``(groups,)``.
        room: Most that each group can take, int64, shape ``(groups,)``.

    Returns:
        int64 tensor of shape ``(groups,)``.

    Example:
        >>> import torch
        >>> spread(7, torch.tensor([1, 2, 3]), torch.tensor([9, 9, 2]))
        tensor([2, 3, 2])
    """
    given = torch.zeros_like(room)
    total = min(total, int(room.sum()))
    while (left := total - int(given.sum())) > 0:
        space = room - given
        weight = torch.where(space > 0, shares, 0)
        weight = weight if weight.any() else space
        everything = int(weight.sum())
        portion = (left * weight.to(torch.float64) / everything).to(torch.int64)
        remainder = left * weight - portion * everything  # exact, so that ties are ties: what overflows in both cancels
        portion, remainder = portion + remainder // everything, remainder % everything
        short = left - int(portion.sum())
        portion[torch.argsort(remainder, descending=True, stable=True)[:short]] += 1
        given += torch.minimum(portion, space)
    return given


def _slack(x: Tensor) -> Tensor:
    return (TOLERANCE * x.clamp(min=1.0)).clamp(max=LARGEST_SLACK)


def _groups(index: Tensor | float, d: Tensor | int) -> tuple[Tensor, Tensor]:
    """Index and count as float64 tensors of one device."""
    index = torch.as_tensor(index, dtype=torch.float64)
    return index, torch.as_tensor(d).to(index)


def count_to_prune(kept: Tensor, d: Tensor, gamma: float, beta: float) -> Tensor:
    """How many of ``d`` weights go where ``kept`` of them are to be kept: whole numbers, at least 0."""
    spare = gamma * (d - ceil(kept).to(torch.float64))
    return torch.minimum(floor(spare), floor(beta * d)).clamp(min=0)


def check_at_least_zero(name: str, value: float) -> None:
    """Raise unless the value is finite and not negative."""
    if not (is_real(value) and 0 <= value < math.inf):
        raise ValueError(f"{name} must be a number of at least 0, got {value!r}.")


def check_fraction(name: str, value: float, advice: str) -> None:
    """Raise unless the value is in ``[0, 1)``; the advice says what a value would do."""
    if not (is_real(value) and 0 <= value < 1):
        raise ValueError(f"{name} must be in [0, 1), got {value!r}; {advice}.")


def check_beta(value: float) -> None:
    """Raise unless it can be the largest fraction that one pruning takes."""
    check_fraction(
        "beta", value, "it is the largest fraction of a group that one pruning takes, and 0.9 is the default"
    )
