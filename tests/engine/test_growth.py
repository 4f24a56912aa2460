"""A step that drops and grows: exactly so many come back, the first of those that were pruned before it."""

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_sap import Amounts, Policy, prune_masks
from lightning_sap.engine.decision import Limits, decide
from lightning_sap.engine.groups import PrunableTensor
from lightning_sap.functional.select import smallest

SCOPES = ["neuron", "layer", "global"]
A = torch.tensor([[1.0, -2.0, 0.0, 0.0], [0.0, 5.0, -6.0, 7.0]])  # three of eight are pruned
B = torch.tensor([[0.0, 9.0], [-3.0, 0.0]])  # two of four
PRUNED = {"a": A == 0, "b": B == 0}


class DropGrow(Policy):
    """Drops a fraction of what is kept of each group, and grows back a fraction of what is pruned."""

    regrows = True

    def __init__(self, drop, grow):
        self.drop, self.grow = drop, grow

    def __call__(self, sums, round, standing):
        return Amounts((self.drop * sums.count).floor().long(), (self.grow * standing.pruned).floor().long())


def step(scope, drop, grow, limits=None, pruned=PRUNED):
    pieces = {name: PrunableTensor(w, pruned[name]) for name, w in {"a": A, "b": B}.items()}
    return decide(pieces, policy=DropGrow(drop, grow), scope=scope, round=1, limits=limits)


def masks(found):
    return {name: mask.int().tolist() for name, mask in found.masks.pruned.items()}


class TestByHand:
    @pytest.mark.parametrize(
        ("scope", "dropped", "grown", "a", "b"),
        [
            # of 5 and 2 kept 2 and 1 go, of 3 and 2 pruned 1 and 1 come back
            ("layer", {"a": 2, "b": 1}, {"a": 1, "b": 1}, [[1, 1, 0, 1], [1, 0, 0, 0]], [[0, 0], [1, 1]]),
            # of 7 kept 3 go, of 5 pruned 2 come back: the first two, both in a
            ("global", {"a": 2, "b": 1}, {"a": 2, "b": 0}, [[1, 1, 0, 0], [1, 0, 0, 0]], [[1, 0], [1, 1]]),
            # of rows of 2, 3, 1, 1 kept go 1, 1, 0, 0; of 2, 1, 1, 1 pruned come back 1, 0, 0, 0
            ("neuron", {"a": 2, "b": 0}, {"a": 1, "b": 0}, [[1, 0, 0, 1], [1, 1, 0, 0]], [[1, 0], [0, 1]]),
        ],
    )
    def test_half_goes_and_half_comes_back(self, scope, dropped, grown, a, b):
        found = step(scope, 0.5, 0.5)
        assert (found.dropped, found.grown) == (dropped, grown)
        assert masks(found) == {"a": a, "b": b}
        assert (found.count, found.regrown) == (sum(dropped.values()), sum(grown.values()))

    @pytest.mark.parametrize("scope", SCOPES)
    def test_all_that_is_pruned_comes_back_and_none_of_what_this_step_drops(self, scope):
        found = step(scope, 1.0, 1.0)
        assert masks(found) == {name: (~was).int().tolist() for name, was in PRUNED.items()}
        assert (found.count, found.regrown) == (7, 5)

    @pytest.mark.parametrize("scope", SCOPES)
    def test_more_than_are_pruned_means_all_of_them(self, scope):
        found = step(scope, 0.0, 7.0)
        assert found.grown == {"a": 3, "b": 2}
        assert found.masks.is_dense

    @pytest.mark.parametrize("scope", SCOPES)
    def test_nothing_grows_where_nothing_is_pruned(self, scope):
        found = step(scope, 0.0, 1.0, pruned={"a": None, "b": None})
        assert (found.grown, found.dropped) == ({"a": 0, "b": 0}, {"a": 0, "b": 0})
        assert found.masks.is_dense

    def test_what_comes_back_is_told_by_position_not_by_what_stands_under_the_mask(self):
        weights = {"w": torch.tensor([3.0, 8.0, 2.0, 1.0, 9.0])}
        kept = {"w": torch.tensor([True, False, False, False, True])}
        found = prune_masks(weights, kept, policy=DropGrow(0.0, 0.7))
        assert found["w"].tolist() == [True, True, True, False, True]

    def test_the_masks_given_are_not_written_to(self):
        before = {name: mask.clone() for name, mask in PRUNED.items()}
        step("layer", 0.5, 0.5)
        assert all(torch.equal(PRUNED[name], mask) for name, mask in before.items())

    def test_units_along_another_axis(self):
        weight = torch.tensor([[0.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
        found = prune_masks(
            {"w": weight}, {"w": weight != 0}, policy=DropGrow(0.0, 0.5), scope="neuron", units={"w": lambda t: t.T}
        )
        assert found["w"].int().tolist() == [[1, 1], [0, 1], [1, 0]]  # one of two in each column

    def test_a_policy_of_a_few_lines_through_ten_rounds(self):
        class HalfAndATenthBack(Policy):
            regrows = True

            def __call__(self, sums, round, standing):
                return Amounts(sums.count // 2, standing.pruned // 10)

        weight, kept, counts = torch.arange(1.0, 101.0), torch.ones(100, dtype=torch.bool), []
        for round in range(1, 11):
            kept = prune_masks({"w": weight * kept}, {"w": kept}, policy=HalfAndATenthBack(), round=round)["w"]
            counts.append(int(kept.sum()))
        # 100 − 50; 50 − 25 + 5; 30 − 15 + 7; 22 − 11 + 7; 18 − 9 + 8; 17 − 8 + 8; and so on
        assert counts == [50, 30, 22, 18, 17, 17, 17, 17, 17, 17]


class TestLimits:
    def test_floors_hold_without_counting_on_what_comes_back(self):
        found = step("layer", 0.5, 0.5, Limits({"a": 4}))  # of 5 kept, 1 may go though 1 comes back
        assert (found.dropped, found.grown) == ({"a": 1, "b": 1}, {"a": 1, "b": 1})
        assert found.masks.survivors == {"a": 5, "b": 2}

    @pytest.mark.parametrize("scope", ["layer", "global"])
    @pytest.mark.parametrize("net", range(8))
    def test_least_and_most_are_of_the_net_change(self, scope, net):
        found = step(scope, 0.5, 0.5, Limits(least=net, most=net))
        assert found.count - found.regrown == net == 7 - sum(found.masks.survivors.values())
        grown = step(scope, 0.5, 0.5).regrown
        assert found.regrown == min(grown, 7 - net)  # drops make up for what comes back as long as there are weights

    def test_without_limits_more_may_come_back_than_go(self):
        assert step("layer", 0.0, 1.0).count - step("layer", 0.0, 1.0).regrown == -5

    def test_beside_most_a_least_of_nothing_holds_too(self):
        found = step("layer", 0.0, 1.0, Limits(most=3))
        assert (found.count, found.regrown) == (5, 5)

    def test_less_comes_back_where_drops_cannot_make_up_for_it(self):
        found = step("layer", 0.0, 1.0, Limits({"a": 5}, least=1))  # b alone can lose its two
        assert (found.dropped, found.grown) == ({"a": 0, "b": 2}, {"a": 1, "b": 0})

    @given(
        st.sampled_from(SCOPES),
        st.floats(0, 1),
        st.floats(0, 1),
        st.integers(0, 12),
        st.tuples(st.integers(0, 8), st.integers(0, 4)),
    )
    def test_limits_always_hold(self, scope, drop, grow, net, floors):
        limits = Limits(dict(zip("ab", floors, strict=True)), least=net, most=net)
        found = step(scope, drop, grow, limits)
        spare = max(0, 5 - floors[0]) + max(0, 2 - floors[1])
        assert found.count - found.regrown == min(net, spare)
        for name, kept in {"a": 5, "b": 2}.items():
            assert found.masks.survivors[name] >= min(kept, limits.floors[name])
            assert found.masks.survivors[name] == kept - found.dropped[name] + found.grown[name]


class TestAgainstTheOracle:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
    @given(
        scope=st.sampled_from(SCOPES),
        shapes=st.lists(st.sampled_from([(1, 1), (3, 1), (1, 40), (5, 8), (4, 3, 2), (0, 2)]), min_size=1, max_size=3),
        density=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
        amounts=st.tuples(st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        limits=st.tuples(st.floats(0, 0.5), st.integers(0, 20), st.none() | st.integers(0, 20)),
        seed=st.integers(0, 2**16),
    )
    def test_bit_for_bit(self, dtype, scope, shapes, density, amounts, limits, seed):
        rng, (drop, grow), (floor, least, more) = np.random.default_rng(seed), amounts, limits
        weights = {
            f"w{i}": torch.from_numpy(rng.integers(-4, 5, shape) / 4).to(dtype) for i, shape in enumerate(shapes)
        }
        kept = {name: torch.from_numpy(rng.random(w.shape) < density) for name, w in weights.items()}
        floors, most = (
            {name: int(floor * w.numel()) for name, w in weights.items()},
            None if more is None else least + more,
        )
        pieces = {name: PrunableTensor(w, ~kept[name]) for name, w in weights.items()}
        given = Limits(floors, least, most)
        found = decide(pieces, policy=DropGrow(drop, grow), scope=scope, round=1, limits=given)
        twin = oracle.prune_masks(
            {name: w.double().numpy() for name, w in weights.items()},
            {name: mask.numpy() for name, mask in kept.items()},
            amount=lambda w: int(drop * len(w)),
            growth=lambda pruned: int(grow * pruned),
            scope=scope,
            floors=floors,
            least=least,
            most=most,
        )
        for name, mask in found.masks.kept.items():
            np.testing.assert_array_equal(mask.numpy(), twin[name], err_msg=name)

    def test_the_first_of_very_many_come_back(self):
        """So many that they are found by a histogram, and over more than one chunk."""
        weight, kept = torch.zeros(300_000), torch.zeros(300_000, dtype=torch.bool)
        kept[::3] = True
        weight[::3] = 1.0
        found = prune_masks({"w": weight}, {"w": kept}, policy=DropGrow(0.0, 0.75))["w"]
        first = torch.arange(300_000)[~kept][:150_000]
        assert torch.equal(found, kept.index_fill(0, first, True))


def test_one_score_that_stands_for_all_is_picked_from_without_a_copy():
    equal = torch.zeros((), dtype=torch.float16).expand(5, 3)
    excluded = torch.zeros(5, 3, dtype=torch.bool)
    excluded[0] = True
    (picked,) = smallest([equal], [excluded], 4, [4])
    assert picked.nonzero().tolist() == [[1, 0], [1, 1], [1, 2], [2, 0]]
