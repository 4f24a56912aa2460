"""How many weights go: by the PQ Index, or always the same fraction."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_sap.functional.amount import check_at_least_zero, check_beta, check_fraction, count_to_prune, floor
from lightning_sap.functional.pqi import PowerSums, check_orders
from lightning_sap.functional.scalars import make_plain_
from lightning_sap.policies.base import LARGEST_SCALED, Policy


@dataclass(frozen=True)
class SparsityInformed(Policy):
    r"""The paper's policy: prune what the PQ Index says a group can spare, see :func:`prune_count`.

    Args:
        p: Order of the smaller norm, ``0 < p < q``.
        q: Order of the larger norm.
        eta_r: Slack in the bound on how many weights to keep, at least 0.
        gamma: Scale of the amount, at least 0.
        beta: Largest fraction of a group pruned at once, in ``[0, 1)``.

    Raises:
        ValueError: If an argument is out of its range.

    Source: Diao et al., ICLR 2023, Algorithm 1.

    Example:
        >>> import torch
        >>> from lightning_sap.functional import power_sums
        >>> SparsityInformed(p=0.5, q=1.0)(power_sums(torch.tensor([0.0, 0.0, 1.0, 1.0]), 0.5, 1.0), 1)
        tensor(2)
    """

    p: float = 0.5
    q: float = 1.0
    eta_r: float = 0.0
    gamma: float = 1.0
    beta: float = 0.9

    def __post_init__(self) -> None:
        """Check the ranges."""
        make_plain_(self)
        check_orders(self.p, self.q)
        check_at_least_zero("eta_r", self.eta_r)
        check_at_least_zero("gamma", self.gamma)
        check_beta(self.beta)

    def __call__(self, sums: PowerSums, round: int) -> Tensor:  # noqa: ARG002 (the same in every round)
        """Number of weights to prune from each group: int64, the shape of the groups."""
        p, q = self.p, self.q
        d = sums.count.to(torch.float64)
        # r straight from the sums: d and the scale cancel, and nothing is lost where the index is close to 1
        kept = torch.exp((q * torch.log(sums.sum_p) - p * torch.log(sums.sum_q)) / (q - p))
        kept = torch.where(sums.sum_q == 0, d, kept * (1 + self.eta_r) ** (-q / (q - p)))
        return count_to_prune(kept, d, self.gamma, self.beta)

    def _times(self, scale: float) -> SparsityInformed:
        return replace(self, gamma=scale * self.gamma)


@dataclass(frozen=True)
class FixedFraction(Policy):
    """Prune the same fraction of the kept weights in every round, ``floor(f · d)``: the lottery ticket's policy.

    Of a group that is all zero nothing goes.

    Args:
        fraction: Fraction ``f`` of a group's kept weights, in ``[0, 1)``.

    Raises:
        ValueError: If the fraction is out of its range.

    Source: Frankle and Carbin, *The Lottery Ticket Hypothesis*, ICLR 2019.

    Example:
        >>> import torch
        >>> from lightning_sap.functional import power_sums
        >>> FixedFraction(0.2)(power_sums(torch.ones(10), 0.5, 1.0), 1)
        tensor(2)
    """

    fraction: float

    def __post_init__(self) -> None:
        """Check the range."""
        make_plain_(self)
        check_fraction("fraction", self.fraction, "0.2 takes a fifth")

    def __call__(self, sums: PowerSums, round: int) -> Tensor:  # noqa: ARG002 (the same in every round)
        """Number of weights to prune from each group: int64, the shape of the groups."""
        return floor(self.fraction * sums.count.to(torch.float64)).masked_fill(sums.sum_q == 0, 0)

    def _times(self, scale: float) -> FixedFraction:
        return replace(self, fraction=min(scale * self.fraction, max(self.fraction, LARGEST_SCALED)))
