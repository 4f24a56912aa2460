"""Scores of what training shows, from sums given by hand; the fits that gather them are in tests/callbacks/pruning."""

import pickle
import re

import numpy as np
import pytest
import torch

from lightning_sap import FisherRatio, FixedFraction, SAPCallback, Taylor, Wanda, prune_masks
from lightning_sap.engine.groups import PrunableTensor
from lightning_sap.engine.unit_decision import scores_of_units
from lightning_sap.engine.unit_groups import Place, UnitGroup
from lightning_sap.policies import Importance, check_importance


def sums_of(x, classes, number):
    """What is kept of activations `(samples, units)`."""
    sums = torch.stack([x[classes == c].sum(0) for c in range(number)])
    return {"count": classes.bincount(minlength=number), "sum": sums, "square": x.square().sum(0)}


def fisher(x, classes):
    """The definition, in NumPy."""
    x, classes = x.numpy(), classes.numpy()
    means = {c: x[classes == c].mean(0) for c in np.unique(classes)}
    between = sum((classes == c).sum() * (mean - x.mean(0)) ** 2 for c, mean in means.items())
    within = sum(((x[classes == c] - mean) ** 2).sum(0) for c, mean in means.items())
    return between / within


class TestNames:
    @pytest.mark.parametrize(("name", "kind"), [("taylor", Taylor), ("wanda", Wanda), ("fisher", FisherRatio)])
    def test_a_name_is_an_object_with_defaults(self, name, kind):
        assert check_importance(name) == kind()
        assert pickle.loads(pickle.dumps(kind())) == kind()
        assert repr(kind(labels="y") if kind is FisherRatio else kind()) in (
            f"{kind.__name__}()",
            "FisherRatio(labels='y')",
        )

    @pytest.mark.parametrize("name", ["taylor", "wanda", "fisher"])
    def test_nothing_can_be_said_of_a_weight_alone(self, name):
        message = (
            "scores 'w' by what is gathered while it is trained, and nothing was gathered here. Give it to Pruning"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            prune_masks({"w": torch.ones(2, 2)}, policy=FixedFraction(0.5), importance=name)


class TestTaylor:
    def test_score_is_the_mean_of_the_terms_of_the_steps(self):
        terms = [
            Taylor().term(torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5])),
            Taylor().term(torch.tensor([2.0, -2.0]), torch.tensor([-1.0, 0.0])),
        ]
        assert [term.tolist() for term in terms] == [[3.0, 1.0], [2.0, 0.0]]
        score = Taylor().score({"sum": sum(terms), "count": torch.tensor(2)})
        assert score.tolist() == [2.5, 0.5]


class TestWanda:
    def test_score_is_the_magnitude_times_the_norm_of_the_input(self):
        scores = Wanda().score_of(torch.tensor([[1.0, -2.0], [3.0, 0.0]]), torch.tensor([[10.0, 0.1]]))
        assert torch.allclose(scores, torch.tensor([[10.0, 0.2], [30.0, 0.0]]))


class TestFisherRatio:
    @pytest.mark.parametrize("seed", range(3))
    def test_ratio_is_that_of_the_definition(self, seed):
        torch.manual_seed(seed)
        classes = torch.randint(0, 4, (50,))
        x = torch.randn(50, 6, dtype=torch.float64) + classes.unsqueeze(1) * torch.linspace(0, 2, 6)
        found = FisherRatio().ratio(sums_of(x, classes, 7))  # classes without a sample count nothing
        np.testing.assert_allclose(found.numpy(), fisher(x, classes), rtol=1e-10)

    def test_a_unit_that_never_changes_has_no_ratio(self):
        classes = torch.tensor([0, 0, 1])
        x = torch.full((3, 2), 0.3, dtype=torch.float64)  # whose squares do not add up exactly
        x[:, 1] = 0
        assert FisherRatio().ratio(sums_of(x, classes, 2)).tolist() == [0.0, 0.0]

    def test_a_unit_without_variance_within_the_classes_has_a_finite_one(self):
        classes = torch.tensor([0, 0, 1, 1])
        found = FisherRatio().ratio(sums_of(classes.double().unsqueeze(1), classes, 2))
        assert found.tolist() == pytest.approx([1e6])

    def test_score_of_a_unit_is_that_of_its_weights_however_many_are_left(self):
        scores = torch.tensor([[3.0, 3.0, 3.0], [4.0, 4.0, 4.0]])
        pruned = torch.tensor([[False, False, True], [False, True, True]])
        units = torch.arange(2)
        group = UnitGroup(2, (Place("w", 0, units, units),), (), ())
        tensor = PrunableTensor(torch.ones(2, 3), pruned, importance=FisherRatio())
        assert scores_of_units(group, {"w": tensor}, {"w": scores}).tolist() == [3.0, 4.0]

    def test_it_is_refused_for_single_weights(self):
        message = "importance='fisher' scores whole units, and structure='2:4' prunes none: give structure='unit'."
        with pytest.raises(ValueError, match=re.escape(message)):
            SAPCallback(importance="fisher", structure="2:4")

    @pytest.mark.parametrize("labels", [None, True, 1.5, [1]])
    def test_labels_of_another_kind_are_refused(self, labels):
        with pytest.raises(TypeError, match="labels must say where the classes are in a batch"):
            FisherRatio(labels=labels)

    @pytest.mark.parametrize(
        ("labels", "batch"),
        [
            (1, (torch.zeros(3), torch.tensor([2, 0, 1]))),
            ("y", {"y": torch.tensor([2, 0, 1])}),
            (lambda batch: batch[0].argmax(1), [torch.eye(3)[[2, 0, 1]]]),
        ],
    )
    def test_labels_are_found_by_index_key_or_function(self, labels, batch):
        assert FisherRatio(labels).labels_of(batch).tolist() == [2, 0, 1]

    @pytest.mark.parametrize(
        ("batch", "said"),
        [
            (torch.zeros(1, 3), "found no classes in a batch of type Tensor (IndexError"),
            ({"y": torch.zeros(3)}, "found no classes in a batch of type dict (KeyError"),
            ((0, torch.zeros(3)), "got torch.float32 of shape (3,)"),
            ((0, torch.zeros(3, 2, dtype=torch.int64)), "got torch.int64 of shape (3, 2)"),
            ((0, [1, 2]), "got [1, 2]. Give a function of the batch"),
            ((0, torch.tensor([1 << 20])), "whole numbers below 65536"),
        ],
    )
    def test_what_is_no_class_for_each_sample_is_refused(self, batch, said):
        with pytest.raises(ValueError, match=re.escape("FisherRatio(labels=1)") + ".*" + re.escape(said)):
            FisherRatio().labels_of(batch)


def test_units_have_the_norm_of_their_scores_by_default():
    class Own(Importance):
        def scores(self, name, weight):
            return weight

    assert Own().of_units(torch.tensor([[3.0, 4.0], [0.0, 2.0]])).tolist() == [5.0, 2.0]
