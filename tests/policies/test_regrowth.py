"""GrowAndPrune as a policy: parts, shares and turns, by hand."""

import copy
import pickle

import pytest
import torch

from lightning_sap import FixedFraction, GrowAndPrune, Policy, RoundRecord, SparsityInformed, prune_masks
from lightning_sap.policies import Closing, Turn

SIZES = {"a": 40, "b": 10, "c": 10, "d": 20}


def turns(policy, rounds, kept=None, history=()):
    """What each turn does, its closings carried out at their most."""
    kept = dict(kept or SIZES)
    for round in range(rounds + 1):
        turn = policy.turn(SIZES, kept, round=round, rounds=rounds, history=history)
        for part in turn.close:
            of_part = sum(SIZES[name] for name in part.names)
            kept |= {name: part.most * SIZES[name] // of_part for name in part.names}
        kept |= {name: SIZES[name] for name in turn.open}
        yield turn, dict(kept)


class TestParts:
    @pytest.mark.parametrize(
        ("count", "parts"),
        [
            (1, [("a", "b", "c", "d")]),
            (2, [("a",), ("b", "c", "d")]),
            (3, [("a",), ("b", "c"), ("d",)]),
            (4, [("a",), ("b",), ("c",), ("d",)]),
            (5, [("a",), ("b",), ("c",), ("d",), ()]),
        ],
    )
    def test_parts_are_consecutive_and_the_largest_is_as_small_as_can_be(self, count, parts):
        assert GrowAndPrune(partitions=count).split(SIZES) == parts

    def test_parts_of_equal_layers_are_equal(self):
        sizes = {str(i): 7 for i in range(12)}
        assert [len(part) for part in GrowAndPrune(partitions=4).split(sizes)] == [3, 3, 3, 3]

    def test_a_parameter_is_in_the_first_part_that_a_glob_puts_it_in(self):
        assert GrowAndPrune(partitions=[["[bd]"], ["*"]]).split(SIZES) == [("b", "d"), ("a", "c")]


class TestTurns:
    def test_one_part_is_open_after_the_other_and_none_in_the_end(self):
        found = list(turns(GrowAndPrune(0.1, partitions=2), rounds=4))
        assert [turn.open for turn, _ in found] == [("a",), ("b", "c", "d"), ("a",), ("b", "c", "d"), ()]
        closed = [("a",), ("b", "c", "d"), ("a",), ("b", "c", "d")]
        assert [turn.close for turn, _ in found[1:]] == [(Closing(part, 4, 4),) for part in closed]
        each = {"b": 1, "c": 1, "d": 2}  # by layer: first weights of two layers cannot be compared
        assert found[0][0].close == tuple(Closing((name,), n, n) for name, n in each.items())
        assert sum(found[-1][1].values()) == 8  # a tenth of 80

    @pytest.mark.parametrize("remaining", [0.01, 0.1, 0.26, 0.5, 0.99])
    @pytest.mark.parametrize("count", [1, 2, 3, 4])
    def test_shares_add_up_to_the_whole(self, remaining, count):
        policy = GrowAndPrune(remaining, partitions=count)
        turn = policy.turn(SIZES, SIZES, round=count, rounds=count)
        assert turn.open == ()
        pruned = sum(sum(SIZES[name] for name in part.names) - part.most for part in turn.close)
        assert 80 - pruned == round(remaining * 80)
        assert all(part.least == part.most for part in turn.close)

    def test_a_share_below_what_always_stays_is_made_up_for_by_the_others(self):
        policy, floors = GrowAndPrune(0.1, partitions=2), {"b": 3, "d": 1}
        turn = policy.turn(SIZES, SIZES, round=2, rounds=2, floors=floors)
        assert [(part.names, part.least, part.most) for part in turn.close] == [
            (("a",), 3, 3),  # 5 · 40 / 70 = 2.86
            (("b", "c", "d"), 5, 5),  # 3 of b; of the 5 left 1 and 1
        ]
        by_layer = policy.turn(SIZES, SIZES, round=0, rounds=2, floors=floors).close
        assert by_layer == (Closing(("b",), 3, 3), Closing(("c",), 1, 1), Closing(("d",), 1, 1))

    def test_where_more_stays_than_is_asked_for_each_share_is_what_stays(self):
        floors = {"a": 5, "b": 2, "c": 1, "d": 1}
        turn = GrowAndPrune(0.1, partitions=4).turn(SIZES, SIZES, round=4, rounds=4, floors=floors)
        assert [part.most for part in turn.close] == [5, 2, 1, 1]

    def test_what_is_closed_already_is_left_alone(self):
        kept = {"a": 40, "b": 1, "c": 1, "d": 2}
        assert GrowAndPrune(0.1, partitions=2).turn(SIZES, kept, round=1) == Turn(
            (Closing(("a",), 4, 4),), ("b", "c", "d")
        )

    def test_what_no_glob_matches_is_closed_and_never_opened(self):
        found = list(turns(GrowAndPrune(0.5, partitions=[["a"], ["b"]]), rounds=2))
        assert [turn.open for turn, _ in found] == [("a",), ("b",), ()]
        assert found[0][1] == {"a": 40, "b": 5, "c": 5, "d": 10}

    def test_another_policy_says_how_many_stay_and_then_what_share_a_part_has(self):
        policy = GrowAndPrune(0.1, partitions=2, close=SparsityInformed())
        left = {"a": 0.5, "b": 0.1, "c": 0.2, "d": 0.15}  # 20 of a, and 1, 2 and 3 of the others
        history = [RoundRecord(t, t, t, 0.5, dict(left), 0.2, {}) for t in range(4)]
        first = policy.turn(SIZES, SIZES | {"b": 1, "c": 1, "d": 2}, round=1, rounds=4)
        assert first == Turn((Closing(("a",), 4, 40),), ("b", "c", "d"))  # at least its share, at most all
        kept = {"a": 40, "b": 1, "c": 2, "d": 3}
        third = policy.turn(SIZES, kept, round=3, rounds=4, history=history)
        assert third == Turn((Closing(("a",), 6, 6),), ("b", "c", "d"))  # 8 · 20 / 26 = 6.15
        kept = {"a": 6, "b": 10, "c": 10, "d": 20}
        last = policy.turn(SIZES, kept, round=4, rounds=4, history=history)
        assert last == Turn((Closing(("b", "c", "d"), 2, 2),))


class TestMasks:
    weights = {name: torch.arange(1.0, size + 1) for name, size in SIZES.items()}

    @pytest.mark.parametrize("scope", ["neuron", "layer", "global"])
    def test_each_part_keeps_its_share_of_the_largest(self, scope):
        policy, masks = GrowAndPrune(0.25, partitions=2), None
        weights = {name: w.view(10, -1) for name, w in self.weights.items()}
        for round, open in enumerate((("a",), ("b", "c", "d"), ("a",))):
            masks = prune_masks(weights, masks, policy=policy, scope=scope, round=round)
            counts = {name: int(mask.sum()) for name, mask in masks.items()}
            assert all(counts[name] == SIZES[name] for name in open)
            closed = [name for name in SIZES if name not in open]
            assert sum(counts[name] for name in closed) == 10
            if round == 0 or scope == "layer":
                assert all(abs(counts[name] - 0.25 * SIZES[name]) <= 1 for name in closed)
        if scope == "global":  # one threshold for b, c and d, which end at 10, 10 and 20
            assert counts == {"a": 40, "b": 0, "c": 0, "d": 10}

    def test_another_policy_closes_by_its_own_number(self):
        policy = GrowAndPrune(0.25, partitions=2, close=FixedFraction(0.5))
        masks = prune_masks(self.weights, policy=policy, round=0)
        masks = prune_masks(self.weights, masks, policy=policy, round=1)
        assert int(masks["a"].sum()) == 20

    def test_another_policy_keeps_no_fewer_than_the_share(self):
        policy = GrowAndPrune(0.25, partitions=2, close=FixedFraction(0.9))
        masks = prune_masks(self.weights, prune_masks(self.weights, policy=policy, round=0), policy=policy, round=1)
        assert int(masks["a"].sum()) == 10


class Every(Policy):
    regrows = True

    def __call__(self, sums, round):
        return sums.count


class TestMistakes:
    @pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, "a", None, True])
    def test_remaining_out_of_range_is_refused(self, value):
        with pytest.raises(ValueError, match=r"remaining must be a fraction in \(0, 1\), got"):
            GrowAndPrune(value)

    @pytest.mark.parametrize("value", [0, -1, 1.5, "fc.*", ["fc.*"], [], [[]], [[1]], None])
    def test_partitions_of_another_kind_are_refused(self, value):
        with pytest.raises(ValueError, match="partitions must be a whole number of at least 1, or one list of"):
            GrowAndPrune(partitions=value)

    def test_cycles_of_a_single_part_are_refused(self):
        with pytest.raises(ValueError, match="cycles=2 with a single part would open what was pruned at once"):
            GrowAndPrune(partitions=1, cycles=2)
        with pytest.raises(ValueError, match="cycles must be None or a whole number of at least 1, got 0"):
            GrowAndPrune(cycles=0)

    def test_close_must_be_a_policy_that_only_prunes(self):
        with pytest.raises(TypeError, match="policy must be a Policy"):
            GrowAndPrune(close="magnitude")
        with pytest.raises(ValueError, match="lets weights come back itself"):
            GrowAndPrune(close=Every())

    def test_a_listener_cannot_scale_it(self):
        with pytest.raises(ValueError, match=r"cannot be scaled by 0.5: what it keeps is fixed"):
            GrowAndPrune().scaled(0.5)
        assert GrowAndPrune().scaled(1.0) == GrowAndPrune()


def test_copies_are_equal_and_measure_in_the_orders_of_close():
    policy = GrowAndPrune(0.2, [["a*", "b"], ["c"]], 3, SparsityInformed(1.0, 2.0))
    assert (policy.p, policy.q) == (1.0, 2.0)
    for other in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert other == policy
        assert (other.p, other.q, hash(other)) == (1.0, 2.0, hash(policy))
    assert (GrowAndPrune().p, GrowAndPrune().q) == (0.5, 1.0)
