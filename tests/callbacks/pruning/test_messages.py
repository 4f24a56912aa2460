"""A layer never vanishes unnoticed."""

import warnings

import pytest
import torch
from helpers import Net, Watch, fit
from torch import nn
from torch.optim import SGD

from lightning_sap import FixedFraction, PruningCallback, SAPCallback
from lightning_sap.policies.base import Policy

FIX = (
    "Give min_remaining (now 0.0) to keep a fraction of every parameter, min_per_unit=1 to keep a weight in every "
    "output unit, or exclude these."
)


class Counts(Policy):
    """A policy that takes so many weights of the only group, round by round."""

    def __init__(self, counts):
        self.counts = counts

    def __call__(self, groups, round):
        counts = torch.zeros_like(groups.count)
        counts[0] = self.counts[round - 1] if round <= len(self.counts) else 0
        return counts


def rows(*sizes):
    """A module whose layers keep their weights: each row of a layer has its own magnitude, given from the first on."""
    layers = []
    for magnitudes in sizes:
        layer = nn.Linear(6, len(magnitudes), bias=False)
        layer.weight = nn.Parameter(torch.tensor(magnitudes)[:, None].expand(-1, 6).clone())
        layers.append(layer)
    module = Net(nn.ModuleList(layers), lambda p: SGD(p, lr=0.0))
    module.loss = lambda batch: sum(layer.weight.sum() for layer in module.net)
    return module


def said(module, pruner, max_epochs=4):
    """What is warned of at each pruning, by round."""
    found = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def look(trainer, module):
            texts = [
                str(w.message)
                for w in caught
                if "have no weights left" in str(w.message) or "are left" in str(w.message)
            ]
            for text in texts[sum(map(len, found.values())) :]:
                found.setdefault(pruner.current_round(), []).append(text)

        fit(module, pruner, Watch(on_train_batch_start=look), max_epochs=max_epochs)
    return found


def test_losing_more_than_half_of_the_units_is_warned_of_once():
    """Of five rows one goes each time."""
    module = rows([1.0, 2.0, 3.0, 4.0, 5.0], [5.0] * 5)
    pruner = PruningCallback(Counts([6, 6, 6, 6]), every_n_epochs=1, include="net.0.*")
    assert said(module, pruner, max_epochs=5) == {
        3: [f"sap: after pruning 40.00% remain, and 3 of 5 output units of 'net.0.weight' have no weights left. {FIX}"]
    }


def test_parameter_without_a_kept_weight_is_warned_of_again():
    module = rows([1.0, 2.0, 3.0, 4.0], [1.0] * 4)
    pruner = PruningCallback(Counts([18, 6]), every_n_epochs=1, include="net.0.*")
    assert said(module, pruner, max_epochs=3) == {
        1: [f"sap: after pruning 25.00% remain, and 3 of 4 output units of 'net.0.weight' have no weights left. {FIX}"],
        2: [f"sap: after pruning 0.00% remain, and no weights are left in 'net.0.weight'. {FIX}"],
    }


def test_several_parameters_with_lost_units_are_named_in_one_warning():
    module = rows([1.0, 2.0], [1.0, 2.0, 3.0], [9.0] * 5)
    pruner = PruningCallback(Counts([12 + 12]), scope="global", every_n_epochs=2)
    assert said(module, pruner) == {
        1: [
            "sap: after pruning 60.00% remain, and no weights are left in 'net.0.weight'; 2 of 3 output units of "
            f"'net.1.weight' have no weights left. {FIX}"
        ]
    }


def test_min_remaining_that_the_warning_advises_ends_it():
    module = rows([1.0, 2.0], [9.0] * 5)
    pruner = PruningCallback(Counts([12]), scope="global", every_n_epochs=2, min_remaining=0.5)
    assert said(module, pruner) == {}
    assert int(pruner.masks["net.0.weight"].sum()) == 6


def test_losing_half_of_the_units_is_not_warned_of():
    assert said(rows([1.0, 2.0, 3.0, 4.0]), PruningCallback(FixedFraction(0.5), rounds=1, every_n_epochs=2)) == {}


def test_lost_filters_are_counted_as_units():
    """Of four filters, three of which are small."""
    conv = nn.Conv2d(1, 4, 2, bias=False)
    conv.weight = nn.Parameter(torch.tensor([1.0, 1.0, 9.0, 1.0])[:, None, None, None].expand(-1, 1, 2, 2).clone())
    module = Net(conv, lambda p: SGD(p, lr=0.0))
    module.loss = lambda batch: module.net.weight.sum()
    pruner = PruningCallback(FixedFraction(0.75), rounds=1, every_n_epochs=2)
    assert said(module, pruner) == {
        1: [f"sap: after pruning 25.00% remain, and 3 of 4 output units of 'net.weight' have no weights left. {FIX}"]
    }


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layer_that_never_had_a_weight_is_not_warned_of(shape):
    module = rows([1.0, 2.0, 3.0, 4.0])
    module.net.append(nn.Linear(*shape, bias=False))
    pruner = PruningCallback(FixedFraction(0.5), rounds=1, every_n_epochs=2)
    assert said(module, pruner) == {}
    assert pruner.remaining == 0.5


def test_sap_with_its_defaults_on_a_small_network_warns_of_nothing():
    assert said(Net(), SAPCallback(rounds=3)) == {}
