"""target_remaining is met exactly, and min_remaining is kept in every parameter."""

import math

import pytest
import torch
from helpers import PRUNABLE, N, Net, Watch, fit, survivors
from torch import nn
from torch.optim import SGD

from lightning_sap import FixedFraction, PruningCallback, SAPCallback

POLICIES = [
    FixedFraction(0.0),
    FixedFraction(0.2),
    FixedFraction(0.999),
    SAPCallback().options.policy,
    SAPCallback(eta_r=5.0).options.policy,
    SAPCallback(gamma=0.0).options.policy,
]


class TestTargetRemaining:
    @pytest.mark.parametrize("scope", ["neuron", "layer", "global"])
    @pytest.mark.parametrize("policy", POLICIES, ids=str)
    def test_target_is_met_exactly_after_three_prunings(self, policy, scope):
        pruner, left = PruningCallback(policy, scope=scope, rounds=3, target_remaining=0.25), []
        fit(Net(), pruner, Watch(on_train_epoch_end=lambda t, m: left.append(sum(survivors(pruner).values()))))
        assert sum(survivors(pruner).values()) == round(0.25 * N) == 18
        # no step does less than its geometric share of what is left to do, and none goes beyond the target
        for prunings_left, before, after in zip((3, 2, 1), left[:-1], left[1:], strict=True):
            assert 18 <= after <= max(18, math.floor(before * (18 / before) ** (1 / prunings_left) + 1e-6))

    @pytest.mark.filterwarnings("ignore:sap. after pruning .* no weights")
    @pytest.mark.parametrize("target", [0.01, 0.1, 1 / 3, 0.5, 0.9, 1.0])
    def test_target_that_is_no_whole_number_is_rounded(self, target):
        pruner = PruningCallback(FixedFraction(0.5), rounds=3, target_remaining=target)
        fit(Net(), pruner)
        assert sum(survivors(pruner).values()) == round(target * N)

    def test_target_with_an_idle_policy_takes_the_geometric_share_in_each_layer(self):
        pruner, left = PruningCallback(FixedFraction(0.0), rounds=3, target_remaining=0.125), []
        fit(Net(), pruner, Watch(on_train_epoch_end=lambda t, m: left.append(survivors(pruner))))
        a, b = PRUNABLE
        assert left == [{a: 48, b: 24}, {a: 24, b: 12}, {a: 12, b: 6}, {a: 6, b: 3}]

    def test_target_cuts_layers_in_proportion(self):
        pruner = PruningCallback(FixedFraction(0.9), rounds=1, target_remaining=0.5)
        fit(Net(), pruner)
        assert survivors(pruner) == {"net.0.weight": 24, "net.3.weight": 12}  # 43 and 21 were wanted, 36 may go


class TestMinRemaining:
    @pytest.mark.parametrize("scope", ["neuron", "layer", "global"])
    def test_min_remaining_is_kept_in_every_parameter(self, scope):
        pruner = PruningCallback(FixedFraction(0.99), rounds=3, scope=scope, min_remaining=0.3)
        fit(Net(), pruner)
        assert survivors(pruner) == {"net.0.weight": math.ceil(0.3 * 48), "net.3.weight": math.ceil(0.3 * 24)}

    @pytest.mark.parametrize("scope", ["neuron", "layer", "global"])
    def test_min_remaining_together_with_a_target_meets_both(self, scope):
        pruner = PruningCallback(FixedFraction(0.99), rounds=3, scope=scope, min_remaining=0.25, target_remaining=0.25)
        fit(Net(), pruner)
        assert survivors(pruner) == {"net.0.weight": 12, "net.3.weight": 6}

    def test_min_remaining_in_global_scope_prunes_the_next_smallest_elsewhere(self):
        module = Net(nn.Sequential(nn.Linear(6, 2, bias=False), nn.Linear(2, 3, bias=False)), lambda p: SGD(p, lr=0.0))
        small, large = torch.arange(1.0, 13.0).reshape(2, 6), torch.arange(101.0, 107.0).reshape(3, 2)
        with torch.no_grad():
            module.net[0].weight.copy_(small)
            module.net[1].weight.copy_(large)
        pruner = PruningCallback(FixedFraction(0.5), rounds=1, scope="global", min_remaining=0.5)
        fit(module, pruner, max_epochs=2)
        # nine of eighteen go; the first layer may lose six of its twelve, so three go from the second
        assert torch.equal(pruner.masks["net.0.weight"], small > 6)
        assert torch.equal(pruner.masks["net.1.weight"], large > 103)
