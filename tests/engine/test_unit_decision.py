"""How many units go, and which: by numbers that one can check by hand."""

import pytest
import torch
from torch import nn

from lightning_sap import FixedFraction, SparsityInformed, pq_index, prune_count
from lightning_sap.engine.decision import Limits
from lightning_sap.engine.groups import PrunableTensor
from lightning_sap.engine.masks import MaskSet
from lightning_sap.engine.unit_decision import decide_units, pruned_units, scores_of_units
from lightning_sap.engine.unit_groups import unit_groups


class Chain:
    """Linear layers 2 to 4 to 3 to 2; each unit's row has the norm given, so that it is known which go."""

    def __init__(self, first=(4.0, 1.0, 3.0, 2.0), second=(30.0, 10.0, 20.0)):
        self.net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        self.weights = {name: p.detach() for name, p in self.net.named_parameters() if p.dim() > 1}
        for name, norms in (("0.weight", first), ("2.weight", second)):
            weight = self.weights[name]
            weight.copy_(torch.tensor(norms)[:, None] / weight.shape[1] ** 0.5)
        self.groups = unit_groups(self.net, self.weights, None)
        self.masks = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in self.weights.items()}
        biases = {name: p.detach() for name, p in self.net.named_parameters() if p.dim() == 1 and name != "4.bias"}
        self.companions = MaskSet.dense(biases)

    def tensors(self):
        return {name: PrunableTensor(weight, self.masks[name]) for name, weight in self.weights.items()}

    def decide(self, policy=None, scope="layer", **limits):
        decision = decide_units(
            self.tensors(), self.groups, self.companions, policy=policy or FixedFraction(0.5), scope=scope, round=1,
            limits=Limits(**limits),
        )  # fmt: skip
        self.masks, self.companions = dict(decision.masks.pruned), decision.companions
        return decision

    def gone(self):
        known = {**self.masks, **self.companions.pruned}
        return [pruned_units(group, known).nonzero().flatten().tolist() for group in self.groups]


class TestScores:
    def test_scores_are_norms_of_the_weights_that_are_left(self):
        chain = Chain()
        chain.masks["0.weight"][0, 1] = True
        scores = {name: weight for name, weight in chain.weights.items()}
        found = scores_of_units(chain.groups[0], chain.tensors(), scores)
        torch.testing.assert_close(found, torch.tensor([4 / 2**0.5, 1.0, 3.0, 2.0], dtype=torch.float64))

    def test_scores_of_units_that_go_together_are_summed(self):
        net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1, groups=2), nn.Conv2d(2, 1, 1))
        weights = {name: p.detach() for name, p in net.named_parameters() if p.dim() > 1}
        weights["0.weight"].copy_(torch.tensor([3.0, 1.0]).view(2, 1, 1, 1))
        weights["1.weight"].copy_(torch.tensor([-1.0, 5.0]).view(2, 1, 1, 1))
        (group,) = unit_groups(net, weights, None)
        tensors = {name: PrunableTensor(weight) for name, weight in weights.items()}
        assert scores_of_units(group, tensors, weights).tolist() == [4.0, 6.0]


class TestAmounts:
    def test_half_of_the_units_of_each_layer_go_with_biases_and_readers(self):
        chain = Chain()
        decision = chain.decide()
        assert chain.gone() == [[1, 3], [1]]
        kept = decision.masks.kept
        assert kept["0.weight"].int().tolist() == [[1, 1], [0, 0], [1, 1], [0, 0]]
        assert kept["2.weight"].int().tolist() == [[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0]]
        assert kept["4.weight"].int().tolist() == [[1, 0, 1], [1, 0, 1]]
        assert decision.companions.pruned["0.bias"].tolist() == [False, True, False, True]
        assert decision.companions.pruned["2.bias"].tolist() == [False, True, False]
        assert decision.dropped == {"0.weight": 4, "2.weight": 8, "4.weight": 2}

    def test_the_index_of_the_scores_says_how_many(self):
        norms = (100.0, 0.01, 0.01, 0.01)
        chain = Chain(first=norms)
        assert int(prune_count(pq_index(torch.tensor(norms)), 4, 0.5, 1.0)) == 2  # of the weights alone it were 5 of 8
        chain.decide(SparsityInformed())
        assert chain.gone()[0] == [1, 2]

    def test_in_global_scope_the_smallest_of_all_layers_go(self):
        chain = Chain()
        chain.decide(FixedFraction(0.45), scope="global")  # 3 of 7
        assert chain.gone() == [[1, 2, 3], []]

    def test_one_unit_of_each_layer_stays_and_others_go_instead(self):
        chain = Chain()
        for _ in range(6):
            chain.decide(FixedFraction(0.9), scope="global")
        assert chain.gone() == [[1, 2, 3], [1, 2]]
        assert chain.decide().count == 0

    def test_pruned_units_count_no_more(self):
        chain = Chain()
        chain.decide()
        chain.decide()  # half of two, half of two
        assert chain.gone() == [[1, 2, 3], [1, 2]]

    def test_ties_go_to_the_lower_position(self):
        chain = Chain(first=(1.0, 1.0, 1.0, 1.0))
        chain.decide()
        assert chain.gone()[0] == [0, 1]

    def test_a_group_with_a_layer_that_is_not_trained_stays(self):
        chain = Chain()
        del chain.weights["2.weight"]
        decision = chain.decide()
        assert chain.gone() == [[1, 3], []]
        assert decision.masks.kept["4.weight"].all()

    def test_weights_that_are_not_finite_are_refused(self):
        chain = Chain()
        chain.weights["4.weight"][0, 0] = float("inf")
        with pytest.raises(ValueError, match=r"not finite in \['4.weight'\]"):
            chain.decide()


class TestLimits:
    """Of 26 weights a unit of the first layer has 2 + 3, one of the second 4 + 2, less what both share."""

    def test_a_target_is_met_by_the_nearest_number_of_units(self):
        chain = Chain()
        decision = chain.decide(FixedFraction(0.0), scope="global", least=9, most=9)
        assert (chain.gone(), decision.count) == ([[1, 3], []], 10)
        assert decision.finest == 5
        chain = Chain()
        chain.decide(FixedFraction(0.9), scope="global", least=7, most=7)
        assert chain.gone() == [[1], []]  # 5 is nearer than 10

    @pytest.mark.parametrize(("most", "gone"), [(4, []), (5, [1]), (9, [1]), (10, [1, 3])])
    def test_most_alone_is_never_exceeded(self, most, gone):
        chain = Chain()
        decision = chain.decide(FixedFraction(0.45), scope="global", most=most)
        assert chain.gone() == [gone, []]
        assert decision.finest == 5

    def test_at_least_so_many_weights_go(self):
        chain = Chain()
        assert chain.decide(FixedFraction(0.0), least=12).count >= 12

    def test_floors_hold_for_rows_and_columns(self):
        chain = Chain()
        floors = {"0.weight": 4, "2.weight": 6, "4.weight": 4}
        decision = chain.decide(FixedFraction(0.9), floors=floors)
        assert all(decision.masks.survivors[name] >= count for name, count in floors.items())
        assert decision.count > 0

    def test_floors_in_global_scope_let_others_go_instead(self):
        chain = Chain()
        chain.decide(FixedFraction(0.45), scope="global", floors={"0.weight": 6})
        assert chain.gone() == [[1], [1, 2]]
