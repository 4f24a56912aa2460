"""Scores in the place of magnitudes: what an importance may give, and that index, amounts and picks use it."""

import re

import pytest
import torch

from lightning_sap import FixedFraction, Importance, Magnitude, SparsityInformed, pq_index, prune_masks
from lightning_sap.engine.decision import decide
from lightning_sap.engine.groups import Memory, PrunableTensor, scores_of
from lightning_sap.engine.measure import sums_of
from lightning_sap.policies import check_importance

WEIGHT = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
SCOPES = ["neuron", "layer", "global"]


class Given(Importance):
    """Scores by name."""

    def __init__(self, **scores):
        self.by_name = scores

    def scores(self, name, weight):
        return self.by_name[name]


class Reversed(Importance):
    """The largest weights go first."""

    def scores(self, name, weight):
        return 1 / weight


class TestMagnitude:
    def test_the_scores_are_the_weights_themselves(self):
        assert Magnitude().scores("w", WEIGHT) is WEIGHT
        assert scores_of({"w": PrunableTensor(WEIGHT)})["w"].data_ptr() == WEIGHT.data_ptr()

    @pytest.mark.parametrize("scope", SCOPES)
    def test_it_is_the_default(self, scope):
        default = prune_masks({"w": WEIGHT}, policy=FixedFraction(0.5), scope=scope)
        for importance in ("magnitude", Magnitude()):
            found = prune_masks({"w": WEIGHT}, policy=FixedFraction(0.5), scope=scope, importance=importance)
            assert torch.equal(found["w"], default["w"])


class TestScores:
    @pytest.mark.parametrize(
        ("scope", "kept"),
        [
            ("layer", [[1, 1, 1, 1], [0, 0, 0, 0]]),
            ("global", [[1, 1, 1, 1], [0, 0, 0, 0]]),
            ("neuron", [[1, 1, 0, 0], [1, 1, 0, 0]]),
        ],
    )
    def test_the_smallest_scores_go(self, scope, kept):
        found = prune_masks({"w": WEIGHT}, policy=FixedFraction(0.5), scope=scope, importance=Reversed())
        assert found["w"].int().tolist() == kept

    def test_their_magnitudes_count_and_ties_go_by_position(self):
        importance = Given(w=torch.tensor([[-3.0, 1.0, -1.0, 0.5], [1.0, -1.0, 2.0, 9.0]]))
        found = prune_masks({"w": WEIGHT}, policy=FixedFraction(0.5), importance=importance)
        assert found["w"].int().tolist() == [[1, 0, 0, 0], [0, 1, 1, 1]]

    @pytest.mark.parametrize("scope", SCOPES)
    def test_index_and_amounts_are_those_of_the_scores_of_kept_weights(self, scope):
        scores, pruned = torch.tensor([[9.0, 0.0, 0.0, 1.0], [4.0, 0.0, 2.0, 0.0]]), WEIGHT < 2
        piece = PrunableTensor(WEIGHT, pruned, importance=Given(w=scores))
        found = decide({"w": piece}, policy=SparsityInformed(1.0, 2.0), scope=scope, round=1)
        of_scores = decide(
            {"w": PrunableTensor(scores, pruned)}, policy=SparsityInformed(1.0, 2.0), scope=scope, round=1
        )
        assert found.before == of_scores.before
        assert found.before.overall == pytest.approx(float(pq_index(scores[~pruned], 1.0, 2.0)), rel=1e-12)
        assert torch.equal(found.masks.pruned["w"], of_scores.masks.pruned["w"])
        assert found.count == of_scores.count > 0

    def test_another_dtype_than_the_weights_is_fine(self):
        importance = Given(w=WEIGHT.flip(0).half())
        found = prune_masks({"w": WEIGHT.double()}, policy=FixedFraction(0.5), importance=importance)
        assert found["w"].int().tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]

    def test_scores_with_a_gradient_are_fine(self):
        importance = Given(w=WEIGHT.clone().requires_grad_())
        found = prune_masks({"w": WEIGHT}, policy=FixedFraction(0.5), scope="neuron", importance=importance)
        assert found["w"].int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]

    def test_they_are_asked_for_once_in_a_step(self):
        asked = []

        class Counting(Importance):
            def scores(self, name, weight):
                asked.append(name)
                return weight

        weights = {"a": WEIGHT, "b": WEIGHT}
        for scope in SCOPES:
            prune_masks(weights, policy=FixedFraction(0.5), scope=scope, importance=Counting())
        assert asked == 3 * ["a", "b"]


class TestMemory:
    def test_sums_are_remembered_by_the_scores_not_by_the_weights(self):
        scores = torch.ones(2, 4)
        pieces = {"w": PrunableTensor(WEIGHT.clone(), None, None, Memory(), Given(w=scores))}
        assert sums_of(pieces, 1.0, 2.0)["w"].sum_p.tolist() == [8.0]
        scores[0, 0] = 3.0  # while the weights stay as they were
        assert sums_of(pieces, 1.0, 2.0)["w"].sum_p.tolist() == [10.0]

    def test_sums_of_another_importance_are_not_recalled(self):
        memory = Memory()
        assert sums_of({"w": PrunableTensor(WEIGHT, memory=memory)}, 1.0, 2.0)["w"].sum_p.tolist() == [36.0]
        other = PrunableTensor(WEIGHT, memory=memory, importance=Given(w=torch.ones(2, 4)))
        assert sums_of({"w": other}, 1.0, 2.0)["w"].sum_p.tolist() == [8.0]


class TestRefusals:
    @pytest.mark.parametrize("scope", SCOPES)
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_scores_that_are_not_finite(self, value, scope):
        scores = torch.ones(2, 4)
        scores[1, 2] = value
        importance = Given(good=torch.ones(2, 4), bad=scores)
        weights = {"good": WEIGHT, "bad": WEIGHT}
        message = "Given() returned scores that are not finite in ['bad']: nothing is pruned"
        with pytest.raises(ValueError, match=re.escape(message)):
            prune_masks(weights, policy=FixedFraction(0.5), scope=scope, importance=importance)
        masks = {"bad": torch.isfinite(scores)}  # the scores of pruned weights may be anything
        found = prune_masks(weights, masks, policy=FixedFraction(0.5), scope=scope, importance=importance)
        assert not found["bad"][1, 2]

    def test_weights_that_are_not_finite_are_called_weights(self):
        with pytest.raises(ValueError, match=re.escape("Weights that are not finite in ['w']")):
            prune_masks({"w": WEIGHT / 0}, policy=FixedFraction(0.5), importance=Magnitude())

    @pytest.mark.parametrize(
        ("scores", "got"),
        [
            (torch.ones(4, 2), "torch.float32 of shape (4, 2)"),
            (torch.ones(2), "torch.float32 of shape (2,)"),
            (torch.ones(2, 4, dtype=torch.int64), "torch.int64 of shape (2, 4)"),
            (torch.ones(2, 4, dtype=torch.complex64), "torch.complex64 of shape (2, 4)"),
            (None, "None"),
            ([1.0], "[1.0]"),
        ],
    )
    def test_what_is_no_score_for_each_weight(self, scores, got):
        message = re.escape("Given() must return one score for each weight of 'w': a tensor of shape (2, 4) of one of")
        with pytest.raises(ValueError, match=f"{message}.*; got {re.escape(got)}"):
            prune_masks({"w": WEIGHT}, policy=FixedFraction(0.5), importance=Given(w=scores))

    def test_an_unknown_name(self):
        known = ["fisher", "magnitude", "taylor", "wanda"]
        message = f"importance must be one of {known} or an Importance such as Magnitude(), got 'size'."
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            check_importance("size")

    def test_a_class_is_not_an_importance_yet(self):
        with pytest.raises(TypeError, match=r"got <class '.*Magnitude'>\. Make one of it by calling it: add \(\)\."):
            check_importance(Magnitude)

    @pytest.mark.parametrize("value", [None, 3, WEIGHT.abs])
    def test_what_is_neither_an_importance_nor_a_name(self, value):
        with pytest.raises(
            TypeError, match=r"importance must be one of \['fisher', 'magnitude', 'taylor', 'wanda'\] or an Importance"
        ):
            prune_masks({"w": WEIGHT}, policy=FixedFraction(0.5), importance=value)

    def test_what_is_allowed_is_given_back(self):
        reversed_, found = Reversed(), check_importance("magnitude")
        assert check_importance(reversed_) is reversed_
        assert isinstance(found, Magnitude)
        assert repr(found) == "Magnitude()"
