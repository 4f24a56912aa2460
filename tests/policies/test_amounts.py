"""How many weights the policies take, and the ranges of their options."""

import math
import re

import oracle
import pytest
import torch
from helpers import NO_CAP, k_among_zeros

from lightning_sap import FixedFraction, SparsityInformed
from lightning_sap.functional.pqi import power_sums


def decide(policy, x, round_number=0, p=0.5, q=1.0):
    counts = policy(power_sums(x, p, q), round_number)
    assert counts.dtype == torch.int64
    return counts.item()


class TestPolicies:
    @pytest.mark.parametrize(("p", "q"), [(0.5, 1.0), (1.0, 2.0), (0.2, 1.0), (1.0, 1.4), (0.5, 8.0)])
    @pytest.mark.parametrize("d", [10, 2**24 + 3])
    @pytest.mark.parametrize("k", [1, 3])
    def test_k_equal_weights_among_zeros_are_kept_as_k(self, k, d, p, q):
        policy = SparsityInformed(p=p, q=q, beta=NO_CAP)
        assert decide(policy, k_among_zeros(k, d, dtype=torch.bfloat16), p=p, q=q) == d - k

    @pytest.mark.parametrize("policy", [SparsityInformed(p=0.5, q=1.0, eta_r=1.0), FixedFraction(0.5)])
    @pytest.mark.parametrize("x", [torch.zeros(0), torch.zeros(8)])
    def test_nothing_goes_of_a_group_without_weight(self, policy, x):
        assert decide(policy, x) == 0

    def test_constant_groups_go_by_eta_only(self):
        constant = torch.full((100,), 0.1)
        assert decide(SparsityInformed(p=0.5, q=1.0), constant) == 0
        assert decide(SparsityInformed(p=0.5, q=1.0, gamma=20.0), constant) == 0
        assert decide(SparsityInformed(p=0.5, q=1.0, eta_r=1.0), constant) == 75

    @pytest.mark.parametrize("options", [{}, {"eta_r": 0.001, "gamma": 1.2}, {"gamma": 5.0}, {"eta_r": 1.0}])
    @pytest.mark.parametrize(("p", "q"), [(0.5, 1.0), (1.0, 2.0), (0.2, 1.0), (1.0, 1.4)])
    def test_one_count_per_row(self, p, q, options):
        x = torch.randn(9, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        x[3] = 0
        counts = SparsityInformed(p=p, q=q, **options)(power_sums(x, p, q, dim=1), 2)
        assert counts.dtype == torch.int64
        assert counts.tolist() == [oracle.prune_count(row.numpy(), p, q, **options) for row in x]

    def test_a_range_beyond_one_double(self):
        """With p this small the tiny weight still counts: r = (1 + 1e-6)² / (1 + 1e-12) lies just above one."""
        x = torch.tensor([1e300, 1e-300], dtype=torch.float64)
        assert decide(SparsityInformed(p=0.01, q=0.02), x, p=0.01, q=0.02) == 0

    @pytest.mark.parametrize(
        ("fraction", "d", "count"),
        [(0.2, 10, 2), (0.2, 14, 2), (0.29, 100, 29), (0.57, 100, 57), (0.0, 10, 0), (0.5, 2**24 + 3, 2**23 + 1)],
    )
    def test_fixed_fraction(self, fraction, d, count):
        assert decide(FixedFraction(fraction), torch.ones(d, dtype=torch.bfloat16)) == count
        assert decide(FixedFraction(fraction), torch.ones(d, dtype=torch.bfloat16), round_number=7) == count

    def test_policies_are_values(self):
        assert FixedFraction(0.2) == FixedFraction(fraction=0.2) != FixedFraction(0.3)
        assert SparsityInformed(0.5, 1.0) == SparsityInformed(p=0.5, q=1.0, eta_r=0.0, gamma=1.0, beta=0.9)


class TestRanges:
    ORDERS = [{"p": 1.0, "q": 1.0}, {"p": 1.25, "q": 0.75}, {"p": 0.0, "q": 1.0}, {"p": -0.5, "q": 1.0}]
    OPTIONS = [
        {"eta_r": -0.125},
        {"eta_r": math.nan},
        {"gamma": -0.125},
        {"gamma": math.nan},
        {"beta": 1.0},
        {"beta": -0.125},
        {"beta": 1.5},
        {"beta": math.nan},
    ]

    @pytest.mark.parametrize("wrong", ORDERS + OPTIONS)
    def test_sparsity_informed(self, wrong):
        name, value = next(iter(wrong.items()))
        with pytest.raises(ValueError, match=f"{name}.*{re.escape(str(value))}"):
            SparsityInformed(**({"p": 0.5, "q": 1.0} | wrong))

    @pytest.mark.parametrize("fraction", [1.0, -0.125, 1.5, math.nan])
    def test_fixed_fraction(self, fraction):
        with pytest.raises(ValueError, match=f"fraction.*{re.escape(str(fraction))}"):
            FixedFraction(fraction)
