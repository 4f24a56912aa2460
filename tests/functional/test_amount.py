"""How many weights go: the bound, its rounding and its ranges."""

import math
import re

import oracle
import pytest
import torch
from helpers import NO_CAP, k_among_zeros
from hypothesis import given
from hypothesis import strategies as st

from lightning_sap import pq_index, prune_count, retained_lower_bound
from lightning_sap.functional.amount import ceil, floor, spread


class TestRetainedLowerBound:
    @pytest.mark.parametrize(
        ("index", "d", "p", "q", "eta_r", "bound"),
        [
            (0.0, 100, 0.5, 1.0, 0.0, 100.0),
            (0.25, 100, 0.5, 1.0, 0.0, 75.0),
            (0.5, 100, 1.0, 2.0, 0.0, 25.0),
            (0.25, 100, 0.5, 1.0, 1.0, 18.75),  # 75 · 2⁻²
            (0.5, 8, 1.0, 3.0, 0.0, 8 * 0.5**1.5),
            (0.75, 4, 0.5, 1.0, 0.0, 1.0),
        ],
    )
    def test_retained_lower_bound_by_hand(self, index, d, p, q, eta_r, bound):
        r = retained_lower_bound(index, d, p, q, eta_r=eta_r)
        assert r.dtype == torch.float64
        assert r.item() == pytest.approx(bound, rel=1e-14)

    def test_retained_lower_bound_takes_and_returns_tensors(self):
        index, d = torch.tensor([0.0, 0.25, 0.5], dtype=torch.float64), torch.tensor([10, 100, 2])
        assert retained_lower_bound(index, d, 0.5, 1.0).tolist() == pytest.approx([10.0, 75.0, 1.0])

    def test_retained_lower_bound_is_the_participation_ratio_for_one_and_two(self):
        w = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        ratio = w.abs().sum() ** 2 / w.square().sum()
        r = retained_lower_bound(pq_index(w, 1.0, 2.0), w.numel(), 1.0, 2.0)
        assert r.item() == pytest.approx(ratio.item(), rel=1e-12)

    @pytest.mark.parametrize(("p", "q"), [(0.5, 1.0), (1.0, 2.0), (1.0, 1.4)])
    @pytest.mark.parametrize(("k", "d"), [(1, 1), (1, 10), (3, 10), (7, 7), (1, 9999), (37, 9999), (4999, 9999)])
    def test_k_equal_weights_among_zeros_are_kept_as_k(self, k, d, p, q):
        index = pq_index(k_among_zeros(k, d), p, q)
        assert retained_lower_bound(index, d, p, q).item() == pytest.approx(k, rel=1e-9)
        assert prune_count(index, d, p, q, beta=NO_CAP).item() == d - k


class TestPruneCount:
    @pytest.mark.parametrize(
        ("index", "d", "options", "count"),
        [
            (0.25, 100, {}, 25),
            (0.25, 100, {"gamma": 2.0}, 50),
            (0.25, 100, {"gamma": 1.2}, 30),
            (0.25, 100, {"gamma": 5.0}, 90),
            (0.25, 100, {"gamma": 5.0, "beta": 0.5}, 50),
            (0.25, 100, {"gamma": 0.0}, 0),
            (0.25, 100, {"beta": 0.0}, 0),
            (0.25, 100, {"eta_r": 1.0}, 81),  # 100 − ⌈18.75⌉
            (0.0, 100, {}, 0),
            (0.0, 100, {"gamma": 20.0}, 0),
            (0.0, 0, {}, 0),
            (0.0, 1, {"eta_r": 1.0}, 0),
            (0.26, 10, {}, 2),  # 10 − ⌈7.4⌉
            (0.75, 4, {}, 3),
            (0.75, 3, {}, 2),
            (-1e-6, 100, {}, 0),  # an index that rounding took below zero
        ],
    )
    def test_prune_count_by_hand(self, index, d, options, count):
        c = prune_count(index, d, 0.5, 1.0, **options)
        assert c.dtype == torch.int64
        assert c.item() == count

    @pytest.mark.parametrize(
        ("index", "d", "gamma", "beta", "count"),
        [
            (0.9, 100, 1.0, 0.29, 29),  # 0.29 · 100 = 28.999999999999996
            (0.9, 100, 1.0, 0.57, 57),  # 0.57 · 100 = 56.99999999999999
            (0.1, 1000, 1.15, 0.9, 115),  # 1.15 · 100 = 114.99999999999999
            (1 - 0.1 - 0.2, 10, 1.0, 0.9, 7),  # 10 · (1 − I) = 3.0000000000000004
            (1 - (0.7 + 0.2 + 0.1), 10, 1.0, 0.9, 0),  # 10 · (1 − I) = 9.999999999999998
        ],
    )
    def test_whole_numbers_survive(self, index, d, gamma, beta, count):
        assert prune_count(index, d, 0.5, 1.0, gamma=gamma, beta=beta).item() == count

    def test_whole_numbers_and_halves_stay_apart_in_the_largest_groups(self):
        numbers = torch.tensor([99_999_999.85, 99_999_999.95, 3e9, 3e9 + 0.5], dtype=torch.float64)
        assert floor(numbers).tolist() == [99_999_999, 100_000_000, 3_000_000_000, 3_000_000_000]
        assert ceil(numbers).tolist() == [100_000_000, 100_000_000, 3_000_000_000, 3_000_000_001]

    def test_fractions_are_rounded_away_from_pruning(self):
        r = torch.tensor([7.000001, 7.5, 7.999999], dtype=torch.float64)
        assert prune_count(1 - r / 10, 10, 0.5, 1.0).tolist() == [2, 2, 2]
        assert prune_count(0.5, 10, 0.5, 1.0, gamma=0.799999).item() == 3

    def test_prune_count_is_one_count_per_group(self):
        index, d = torch.tensor([0.0, 0.25, 0.9, 0.0], dtype=torch.float64), torch.tensor([10, 100, 10, 0])
        assert prune_count(index, d, 0.5, 1.0).tolist() == [0, 25, 9, 0]

    def test_counts_above_the_integers_of_float32(self):
        d = 2**24 + 3
        assert prune_count(0.75, d, 0.5, 1.0).item() == d - math.ceil(d / 4) == 12582914
        assert prune_count(0.9999, d, 0.5, 1.0, beta=0.5).item() == d // 2 == 8388609


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
    def test_prune_count_refuses_arguments_out_of_range(self, wrong):
        name, value = next(iter(wrong.items()))
        with pytest.raises(ValueError, match=f"{name}.*{re.escape(str(value))}"):
            prune_count(0.5, 10, **({"p": 0.5, "q": 1.0} | wrong))

    @pytest.mark.parametrize("wrong", ORDERS + OPTIONS[:2])
    def test_retained_lower_bound_refuses_arguments_out_of_range(self, wrong):
        name, value = next(iter(wrong.items()))
        with pytest.raises(ValueError, match=f"{name}.*{re.escape(str(value))}"):
            retained_lower_bound(0.5, 10, **({"p": 0.5, "q": 1.0} | wrong))


def split(total, shares, room):
    return spread(total, torch.tensor(shares), torch.tensor(room)).tolist()


class TestSpread:
    def test_equal_remainders_go_to_the_lower_position_whatever_stands_before_the_point(self):
        assert split(24, [17, 13, 26, 24, 0, 20, 12], [30, 27, 4, 13, 4, 1, 9]) == [5, 4, 4, 7, 0, 1, 3]
        assert split(8, [4, 0, 1, 3, 3, 1], [3, 0, 1, 3, 3, 2]) == [3, 0, 1, 2, 2, 0]

    @given(st.data(), st.sampled_from([3, 40, 2**30, 2**40]))
    def test_spread_equals_the_oracle(self, data, most):
        numbers = st.lists(st.tuples(st.integers(0, most), st.integers(0, most)), min_size=1, max_size=8)
        shares, room = zip(*data.draw(numbers), strict=True)
        total = data.draw(st.integers(0, 2 * most))
        assert split(total, shares, room) == oracle.spread(total, shares, room)
