"""One step: measure, decide, pick, mask; and the limits that a step keeps to."""

import re

import pytest
import torch
from helpers import Net, mlp
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_sap import (
    FixedFraction,
    Policy,
    PQIMonitor,
    PruningCallback,
    SAPCallback,
    SparsityInformed,
    pq_index,
    prune_masks,
)
from lightning_sap.engine.decision import Limits, decide
from lightning_sap.engine.groups import PrunableTensor, dense_tensors, empty_units
from lightning_sap.engine.measure import Measure, summary, sums_of
from lightning_sap.engine.weights import prunable_weights
from lightning_sap.rounds.protocol import PrunerView, RoundListener

SMALL = torch.tensor([[1.0, -2.0], [3.0, -4.0]])
LARGE = torch.tensor([[10.0, 20.0, -30.0], [-40.0, 50.0, 60.0]])

HALF = FixedFraction(0.5)


def pieces(**pruned):
    return {"small": PrunableTensor(SMALL, pruned.get("small")), "large": PrunableTensor(LARGE, pruned.get("large"))}


def step(scope="layer", policy=HALF, limits=None, **pruned):
    return decide(pieces(**pruned), policy=policy, scope=scope, round=1, limits=limits)


def gone(found, name):
    """Magnitudes that are pruned after the step."""
    weight = {"small": SMALL, "large": LARGE}[name]
    return sorted(weight.abs()[found.masks.pruned[name]].int().tolist())


class TestDecision:
    def test_it_counts_by_name(self):
        found = step("layer", small=torch.tensor([[False, False], [False, True]]))
        assert (found.dropped, found.grown) == ({"small": 1, "large": 3}, {"small": 0, "large": 0})
        assert (found.count, found.regrown) == (4, 0)

    def test_of_nothing(self):
        found = decide({}, policy=HALF, scope="layer", round=1)
        assert (found.dropped, found.grown, found.count, found.regrown, found.masks.total) == ({}, {}, 0, 0, 0)


class TestScopes:
    def test_layer_scope_prunes_by_layer(self):
        found = step("layer")
        assert (gone(found, "small"), gone(found, "large"), found.count) == ([1, 2], [10, 20, 30], 5)

    def test_neuron_scope_prunes_by_unit(self):
        found = step("neuron")
        assert (gone(found, "small"), gone(found, "large"), found.count) == ([1, 3], [10, 40], 4)

    def test_global_scope_prunes_over_all_layers(self):
        found = step("global")
        assert (gone(found, "small"), gone(found, "large"), found.count) == ([1, 2, 3, 4], [10], 5)

    def test_pruned_weights_stay_pruned_and_do_not_count_again(self):
        before = torch.tensor([[False, False], [False, True]])  # the 4 is gone already
        found = step("layer", small=before)
        assert (gone(found, "small"), found.count) == ([1, 4], 4)
        assert before.tolist() == [[False, False], [False, True]]

    @pytest.mark.parametrize("scope", ["neuron", "layer", "global"])
    @pytest.mark.parametrize("shape", [(), (3,), (0, 4), (2, 2, 1)])
    def test_every_scope_prunes_weights_of_any_shape(self, scope, shape):
        weight = torch.ones(shape)
        masks = prune_masks({"w": weight, "large": LARGE}, policy=FixedFraction(0.5), scope=scope)
        assert masks["w"].shape == weight.shape
        whole = {
            "neuron": {(): 1, (3,): 3, (0, 4): 0, (2, 2, 1): 2},
            "layer": {(): 1, (3,): 2, (0, 4): 0, (2, 2, 1): 2},
            "global": dict.fromkeys([(), (3,), (0, 4), (2, 2, 1)], 0),  # they are smaller than those of the other
        }
        assert int(masks["w"].sum()) == whole[scope][shape]

    def test_unknown_scope_is_refused(self):
        with pytest.raises(ValueError, match=re.escape("Unknown scope 'channel'")):
            prune_masks({"w": SMALL}, policy=FixedFraction(0.5), scope="channel")


class TestMeasure:
    @pytest.mark.parametrize("scope", ["neuron", "layer", "global"])
    def test_decision_measures_the_kept_weights_before_in_every_scope(self, scope):
        before = torch.tensor([[False, False], [False, True]])
        measure = step(scope, SparsityInformed(1.0, 2.0), small=before).before
        alive = SMALL[~before]
        assert measure.survivors == {"small": 3, "large": 6}
        assert measure.layers["small"] == pytest.approx(float(pq_index(alive, 1.0, 2.0)), rel=1e-12)
        whole = torch.cat([alive, LARGE.flatten()])
        assert measure.overall == pytest.approx(float(pq_index(whole, 1.0, 2.0)), rel=1e-12)
        assert measure.layer_mean == pytest.approx(sum(measure.layers.values()) / 2)

    def test_measure_of_nothing_is_zero(self):
        assert summary({}, 0.5, 1.0) == Measure(0.0, {}, {})
        assert Measure(0.0, {}, {}).layer_mean == 0.0
        assert prune_masks({}, policy=FixedFraction(0.5)) == {}

    def test_measure_by_unit_gives_its_sums(self):
        sums = sums_of(pieces(), 0.5, 1.0, scope="neuron")
        assert [part.count.tolist() for part in sums.values()] == [[2, 2], [3, 3]]

    def test_measure_of_a_module_without_a_pruner(self):
        module = mlp()
        found = dense_tensors(module)
        assert list(found) == ["0.weight", "3.weight"]
        assert found["0.weight"].weight.data_ptr() == module[0].weight.data_ptr()
        assert found["0.weight"].pruned is None
        assert not found["0.weight"].weight.requires_grad


class TestLimits:
    @pytest.mark.parametrize("scope", ["neuron", "layer", "global"])
    @pytest.mark.parametrize("exactly", range(10 + 1))
    def test_limits_fix_the_count_whatever_the_policy_wants(self, scope, exactly):
        for fraction in (0.0, 0.5, 0.99):
            found = step(scope, FixedFraction(fraction), Limits(least=exactly, most=exactly))
            assert found.count == exactly == 10 - sum(found.masks.survivors.values())

    def test_limits_most_is_cut_in_proportion_largest_remainders_first(self):
        found = step(policy=FixedFraction(0.99), limits=Limits(most=4))  # 3 and 5 are wanted: 1.5 and 2.5 of 4
        assert (gone(found, "small"), gone(found, "large")) == ([1, 2], [10, 20])

    def test_limits_least_is_added_in_proportion(self):
        found = step(policy=FixedFraction(0.34), limits=Limits(least=6))  # 1 and 2 are wanted: 1 and 2 more
        assert (gone(found, "small"), gone(found, "large")) == ([1, 2], [10, 20, 30, 40])

    def test_limits_least_of_an_idle_policy_goes_by_size(self):
        found = step(policy=FixedFraction(0.0), limits=Limits(least=5))
        assert (gone(found, "small"), gone(found, "large")) == ([1, 2], [10, 20, 30])

    @pytest.mark.parametrize("scope", ["neuron", "layer", "global"])
    def test_limits_floors_are_kept(self, scope):
        found = step(scope, FixedFraction(0.99), Limits({"small": 3, "large": 2}))
        assert found.masks.survivors["small"] >= 3
        assert found.masks.survivors["large"] >= 2
        assert found.masks.survivors == {"small": 3, "large": 2} or scope == "neuron"

    def test_limits_floors_in_global_scope_prune_the_next_smallest_elsewhere(self):
        found = step("global", limits=Limits({"small": 3}))
        assert (gone(found, "small"), gone(found, "large")) == ([1], [10, 20, 30, 40])

    def test_limits_floors_above_the_kept_prune_nothing_more(self):
        found = step(policy=FixedFraction(0.5), limits=Limits({"small": 99, "large": 99}))
        assert found.count == 0

    def test_limits_floors_come_before_least(self):
        found = step(limits=Limits({"small": 4, "large": 5}, least=9))
        assert found.masks.survivors == {"small": 4, "large": 5}

    @given(
        st.sampled_from(["neuron", "layer", "global"]),
        st.floats(0, 0.99),
        st.integers(0, 10),
        st.integers(0, 4),
        st.integers(0, 6),
        st.integers(0, 2**10 - 1),
    )
    def test_limits_always_hold(self, scope, fraction, exactly, floor_a, floor_b, dead):
        bits = torch.tensor([bool(dead >> i & 1) for i in range(10)])
        pruned = {"small": bits[:4].reshape(2, 2), "large": bits[4:].reshape(2, 3)}
        limits = Limits({"small": floor_a, "large": floor_b}, least=exactly, most=exactly)
        found = step(scope, FixedFraction(fraction), limits, **pruned)
        alive = {name: int((~p).sum()) for name, p in pruned.items()}
        spare = {n: max(0, alive[n] - f) for n, f in limits.floors.items()}
        assert found.count == min(exactly, sum(spare.values()))
        for name, was in pruned.items():
            assert found.masks.survivors[name] >= min(alive[name], limits.floors[name])
            assert bool((found.masks.pruned[name] | ~was).all())  # no weight comes back


class TestRefusals:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_decision_names_weights_that_are_not_finite(self, value):
        bad = SMALL.clone()
        bad[0, 0] = value
        weights = {"good": LARGE, "bad": bad}
        with pytest.raises(ValueError, match=re.escape("Weights that are not finite in ['bad']: nothing is pruned")):
            prune_masks(weights, policy=FixedFraction(0.5))
        masks = {"bad": torch.tensor([[False, True], [True, True]])}
        assert prune_masks(weights, masks, policy=FixedFraction(0.4))["bad"].sum() == 2

    @pytest.mark.parametrize(("what", "given"), [("masks", SMALL > 0), ("units", lambda weight: weight.T)])
    def test_decision_refuses_masks_and_units_of_unknown_weights(self, what, given):
        message = f"There are {what} for ['v'], but no such weights; the weights are ['w']."
        with pytest.raises(ValueError, match=re.escape(message)):
            prune_masks({"w": SMALL}, policy=FixedFraction(0.5), **{what: {"v": given}})

    def test_decision_refuses_what_is_no_policy(self):
        with pytest.raises(TypeError, match=r"policy must be a Policy such as SparsityInformed\(\) .*, got 0.5\."):
            prune_masks({"w": SMALL}, policy=0.5)

    @pytest.mark.parametrize("mask", [torch.ones(2, 2), torch.ones(3, 2, dtype=torch.bool)])
    def test_decision_refuses_a_mask_that_does_not_fit(self, mask):
        with pytest.raises(ValueError, match=re.escape("The mask of w must be a bool tensor of its shape (2, 2)")):
            prune_masks({"w": SMALL}, {"w": mask}, policy=FixedFraction(0.5))

    @pytest.mark.parametrize("scope", ["neuron", "layer", "global"])
    @pytest.mark.parametrize(
        "wrong",
        [
            lambda n: 0.3 * n,
            lambda n: n.int(),
            lambda n: -n,
            lambda n: n[:0],
            lambda n: 3,
            lambda n: n.tolist(),
            lambda n: n.sum().repeat(5),
        ],
    )
    def test_decision_refuses_a_policy_that_returns_no_counts(self, wrong, scope):
        class Wrong(Policy):
            def __call__(self, sums, round):
                return wrong(sums.count)

        with pytest.raises(ValueError, match=r"Wrong\(\) must return how many weights each group loses: int64 of at"):
            prune_masks({"w": SMALL}, policy=Wrong(), scope=scope)

    def test_decision_refuses_a_dtype_that_is_not_floating(self):
        with pytest.raises(TypeError, match="w must be of one of the dtypes"):
            prune_masks({"w": SMALL.long()}, policy=FixedFraction(0.5))

    def test_complex_weights_are_called_complex(self):
        with pytest.raises(TypeError, match=r"^w is complex \(torch\.complex64\), but must be of one of the dtypes"):
            prune_masks({"w": SMALL.to(torch.complex64)}, policy=FixedFraction(0.5))

    @pytest.mark.parametrize("weights", [[SMALL], SMALL, SMALL.numpy(), None, (("w", SMALL),)])
    def test_weights_that_are_no_mapping(self, weights):
        message = (
            "weights must be a mapping from the names of weights, such as {'fc.weight': ...}, got "
            f"{type(weights).__name__}; dict(module.named_parameters()) is one of tensors."
        )
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            prune_masks(weights, policy=FixedFraction(0.5))

    @pytest.mark.parametrize("what", ["masks", "units"])
    @pytest.mark.parametrize("given", [[SMALL > 0], SMALL > 0])
    def test_masks_and_units_that_are_no_mapping(self, what, given):
        with pytest.raises(
            TypeError, match=f"^{what} must be a mapping from the names of weights, .* got {type(given).__name__};"
        ):
            prune_masks({"w": SMALL}, policy=FixedFraction(0.5), **{what: given})

    @pytest.mark.parametrize("weight", [[[1.0, -2.0]], SMALL.numpy(), 1.0, None])
    def test_a_weight_that_is_no_tensor(self, weight):
        with pytest.raises(
            TypeError, match=rf"^w must be a torch\.Tensor of one of .* got {type(weight).__name__}; convert"
        ):
            prune_masks({"w": weight}, policy=FixedFraction(0.5))

    def test_a_mask_that_is_no_tensor(self):
        with pytest.raises(TypeError, match=r"^The mask of w must be a bool torch\.Tensor or None, got list\.$"):
            prune_masks({"w": SMALL}, {"w": [[True, True], [True, False]]}, policy=FixedFraction(0.5))


class TestPiece:
    def test_piece_to_rows_and_back(self):
        piece = PrunableTensor(LARGE)
        assert torch.equal(piece.from_rows(piece.rows(LARGE > 25)), LARGE > 25)

    @pytest.mark.parametrize("groups", [1, 2])
    def test_piece_of_a_transposed_convolution_to_rows_and_back(self, groups):
        weight = prunable_weights(nn.ConvTranspose2d(4, 6, (2, 3), groups=groups))["weight"]
        piece = PrunableTensor(weight.parameter.detach(), None, weight.units)
        mask = torch.rand(weight.parameter.shape) < 0.5
        assert torch.equal(piece.from_rows(piece.rows(mask)), mask)

    def test_piece_of_one_dimension_to_rows_and_back(self):
        vector = torch.tensor([3.0, 1.0, 2.0])
        assert PrunableTensor(vector).rows(vector).shape == (3, 1)
        assert prune_masks({"v": vector}, policy=FixedFraction(0.4))["v"].tolist() == [True, False, True]


class TestDeadUnits:
    def test_empty_units_are_rows_without_a_kept_weight(self):
        pruned = torch.tensor([[True, True], [True, False], [True, True], [False, False]])
        found = empty_units({"a": PrunableTensor(torch.ones(4, 2), pruned), "b": PrunableTensor(torch.ones(3, 2))})
        assert found == {"a": (2, 4), "b": (0, 0)}

    def test_empty_units_are_none_without_pruning(self):
        assert empty_units({"a": PrunableTensor(torch.ones(4, 2)), "b": PrunableTensor(torch.ones(4))}) == {
            "a": (0, 0),
            "b": (0, 0),
        }
        assert empty_units({}) == {}

    def test_empty_units_of_a_convolution_are_filters(self):
        pruned = torch.zeros(3, 2, 2, 2, dtype=torch.bool)
        pruned[1] = True
        pruned[2, 0] = True
        assert empty_units({"conv": PrunableTensor(torch.ones(3, 2, 2, 2), pruned)}) == {"conv": (1, 3)}

    @pytest.mark.parametrize(("groups", "dead"), [(1, 1), (2, 2)])
    def test_empty_units_of_a_transposed_convolution(self, groups, dead):
        """Of `(in, out / groups, …)`: pruned is output 1 of every group, and of group 0 alone output 0."""
        weight = prunable_weights(nn.ConvTranspose2d(4, 6, 2, groups=groups))["weight"]
        pruned = torch.zeros(weight.parameter.shape, dtype=torch.bool)
        pruned[:, 1] = True
        assert empty_units({"w": PrunableTensor(weight.parameter.detach(), pruned, weight.units)}) == {"w": (dead, 6)}
        pruned[: 4 // groups, 0] = True
        assert empty_units({"w": PrunableTensor(weight.parameter.detach(), pruned, weight.units)}) == {
            "w": (dead + 1, 6)
        }
        pruned[0, 2] = True  # one input of several
        assert empty_units({"w": PrunableTensor(weight.parameter.detach(), pruned, weight.units)}) == {
            "w": (dead + 1, 6)
        }

    def test_empty_units_of_a_vector_are_its_entries(self):
        assert empty_units({"v": PrunableTensor(torch.ones(3), torch.tensor([True, False, True]))}) == {"v": (2, 3)}


class TestProtocol:
    def test_pruners_answer_a_monitors_questions(self):
        for pruner in (PruningCallback(FixedFraction(0.5)), SAPCallback(p=0.3, q=2.0)):
            assert isinstance(pruner, PrunerView)
        assert not isinstance(PQIMonitor(), PrunerView)
        assert isinstance(PQIMonitor(), RoundListener)
        assert not isinstance(SAPCallback(), RoundListener)
        assert SAPCallback(p=0.3, q=2.0).orders() == (0.3, 2.0)
        assert PruningCallback(FixedFraction(0.5)).orders() == (0.5, 1.0)

    def test_pruners_answer_before_the_first_fit(self):
        pruner, module = SAPCallback(), Net()
        assert list(pruner.tensors(module)) == ["net.0.weight", "net.3.weight"]
        assert pruner.current_round() == 0
        assert pruner.pqi_after_pruning() is None
        assert (pruner.masks, pruner.remaining, len(pruner.history)) == ({}, 1.0, 0)

    def test_anything_that_answers_as_a_pruner_is_one(self):
        answers = (
            "orders", "tensors", "prunes", "current_round", "ends_round", "opened", "pqi_after_pruning", "history",
            "settings",
        )  # fmt: skip
        assert isinstance(type("Other", (), {name: len for name in answers})(), PrunerView)
        assert not isinstance(type("Less", (), {name: len for name in answers[1:]})(), PrunerView)
