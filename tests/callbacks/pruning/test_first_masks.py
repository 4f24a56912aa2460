"""The masks that a run starts under."""

import re

import pytest
import torch
from helpers import Net, fit, seeded
from torch import nn

from lightning_sap import SAPCallback


def sparse_mlp():
    """Zeros in the first layer, and a head that starts at zero."""
    network = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    with torch.no_grad():
        network[0].weight[:, ::2] = 0.0
        network[2].weight.zero_()
    return network


class TestAllZero:
    def test_a_head_that_starts_at_zero_is_dense_and_named(self):
        module, pruner = Net(sparse_mlp()), SAPCallback(rounds=0, keep_zeros=True)
        message = (
            "sap: keep_zeros=True, and these are all zero and trained: net.2.weight. They start dense, as a head or an "
            "adapter that begins at zero must. If all of such a weight was pruned, freeze it."
        )
        with pytest.warns(UserWarning, match=re.escape(message)):
            fit(module, pruner, max_epochs=2)
        assert {name: int(mask.sum()) for name, mask in pruner.masks.items()} == {
            "net.0.weight": 24,
            "net.2.weight": 24,
        }
        assert bool((module.net[0].weight[:, ::2] == 0).all())
        assert int((module.net[2].weight != 0).sum()) > 16  # but for units that are never active

    def test_an_adapter_that_starts_at_zero_is_trained(self):
        class Adapted(nn.Module):
            def __init__(self):
                super().__init__()
                self.base_layer = nn.Linear(6, 3).requires_grad_(False)
                self.lora_A, self.lora_B = nn.Linear(6, 2, bias=False), nn.Linear(2, 3, bias=False)
                nn.init.zeros_(self.lora_B.weight)

            def forward(self, x):
                return self.base_layer(x) + self.lora_B(self.lora_A(x))

        module, pruner = Net(seeded(Adapted)), SAPCallback(rounds=0, keep_zeros=True)
        with pytest.warns(UserWarning, match=re.escape("all zero and trained: net.lora_B.weight.")):
            fit(module, pruner, max_epochs=2)
        assert bool((module.net.lora_B.weight != 0).all())

    def test_a_frozen_weight_of_zeros_is_not_spoken_of(self):
        network = sparse_mlp()
        network[2].weight.requires_grad_(False)
        pruner = SAPCallback(rounds=0, keep_zeros=True)
        fit(Net(network), pruner, max_epochs=2)
        assert list(pruner.masks) == ["net.0.weight"]

    def test_with_rounds_the_head_is_pruned_once_it_has_values(self):
        module, pruner = Net(sparse_mlp()), SAPCallback(rounds=1, target_remaining=0.25, keep_zeros=True)
        with pytest.warns(UserWarning, match="all zero and trained: net.2.weight"):
            fit(module, pruner, max_epochs=2)
        assert sum(int(mask.sum()) for mask in pruner.masks.values()) == 18
        assert 0 < int(pruner.masks["net.2.weight"].sum()) < 24
