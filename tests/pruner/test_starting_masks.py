"""A Pruner starts under masks, keeps weights in units and rows, and counts all trained weights, as a callback does."""

import dataclasses
import re

import pytest
import torch
from helpers import mlp, seeded
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim import SGD

from lightning_sap import FixedFraction, Pruner
from lightning_sap.callbacks.pruning.options import Options
from lightning_sap.pruner.inputs import OF_A_TRAINER


def attached(net, fraction=0.5, **options):
    return Pruner(FixedFraction(fraction), **options).attach(net, SGD(net.parameters(), lr=0.1))


def test_given_masks_hold_from_attach_on():
    before = attached(seeded(mlp))
    before.prune()
    net = seeded(mlp, 5)
    pruner = attached(net, masks=before.masks)
    assert all(torch.equal(mask, before.masks[name]) for name, mask in pruner.masks.items())
    assert not net[0].weight[~before.masks["0.weight"]].any()


def test_an_all_zero_weight_is_dense_and_named():
    net = seeded(mlp)
    nn.init.zeros_(net[3].weight)
    with pytest.warns(UserWarning, match=re.escape("all zero and trained: 3.weight. They start dense")):
        assert attached(net, keep_zeros=True).remaining == 1.0


def test_normalised_rows_and_units_keep_a_weight_and_a_shortfall_is_told():
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(1, 8)), nn.Linear(8, 3))
    pruner = attached(net, 0.9, scope="layer", min_per_unit=2)
    with pytest.warns(UserWarning, match="18 weights are pruned where 28 were asked"):
        pruner.prune()
    assert [mask.sum(1).tolist() for mask in pruner.masks.values()] == [[1] * 8, [2] * 3]


def test_a_target_of_the_model_counts_all_trained_weights():
    pruner = attached(seeded(mlp), rounds=1, target_remaining=0.8, target_of="model")
    pruner.prune()
    assert sum(int(mask.sum()) for mask in pruner.masks.values()) == round(0.8 * 99) - 27


def test_a_target_that_cannot_be_met_attaches_nothing():
    net = seeded(mlp)
    pruner = Pruner(FixedFraction(0.5), rounds=1, target_remaining=0.1, target_of="model")
    with pytest.raises(ValueError, match=r"^target_remaining=0\.1 cannot be met"):
        pruner.attach(net, SGD(net.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match=r"^sap: the pruner is attached to no module"):
        pruner.prune()


def test_a_state_of_another_module_is_refused_and_nothing_changes():
    other = attached(nn.Sequential(nn.Linear(4, 4)), rewind_weights="init")
    other.prune()
    pruner = attached(seeded(mlp), rewind_weights="init")
    pruner.prune()
    masks = pruner.masks
    with pytest.raises(ValueError, match="first_weights"):
        pruner.load_state_dict(other.state_dict())
    assert all(torch.equal(mask, masks[name]) for name, mask in pruner.masks.items())
    assert pruner.prune().pruned == 18


def test_the_options_that_it_takes_are_those_that_its_docstring_names():
    entry = re.search(r"\*\*options: (.*?)\n\n", Pruner.__doc__, re.DOTALL)[1]
    told = set(re.findall(r"``(\w+)``", entry))
    assert told == {field.name for field in dataclasses.fields(Options)} - OF_A_TRAINER - {"policy"}
    with pytest.raises(TypeError, match=r"^Pruner has no option 'prog_bar', which needs a Trainer"):
        Pruner(FixedFraction(0.5), prog_bar=False)
