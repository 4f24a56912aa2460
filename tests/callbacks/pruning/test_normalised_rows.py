"""Rows that a layer divides by their norm keep a weight, and so does every unit where that is asked for."""

import re

import pytest
import torch
from helpers import Net, fit, seeded
from torch import nn
from torch.nn.utils import parametrizations

from lightning_sap import FixedFraction, GrowAndPrune, PQIMonitor, PruningCallback, SAPCallback, Tolerance


def old_weight_norm(layer):
    with pytest.warns(FutureWarning, match="deprecated"):
        return nn.utils.weight_norm(layer)


NORMS = {"new": parametrizations.weight_norm, "old": old_weight_norm}


def is_finite(module):
    return all(bool(tensor.isfinite().all()) for tensor in module.state_dict().values())


def empty_rows(pruner):
    return {name: int((~mask.flatten(1).any(1)).sum()) for name, mask in pruner.masks.items()}


class Tcn(nn.Module):
    """A temporal convolutional network: dilated causal convolutions under weight norm, some rows of small weights."""

    def __init__(self, norm):
        super().__init__()
        layers = []
        for i in range(2):
            conv = nn.Conv1d(6 if i == 0 else 8, 8, 2, dilation=2**i, padding=2**i)
            with torch.no_grad():
                conv.weight[:3] *= 1e-3
            layers += [norm(conv), nn.ReLU()]
        self.net, self.head = nn.Sequential(*layers), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.net(x[..., None].expand(-1, -1, 5))[..., 4])


SETTINGS = {
    "defaults": lambda: SAPCallback(rounds=3),
    "half of each layer": lambda: PruningCallback(FixedFraction(0.5), rounds=3),
    "global": lambda: PruningCallback(FixedFraction(0.4), scope="global", rounds=3),
    "neuron": lambda: PruningCallback(FixedFraction(0.8), scope="neuron", rounds=3),
    "target": lambda: SAPCallback(scope="global", rounds=3, target_remaining=0.2),
    "pattern": lambda: PruningCallback(FixedFraction(0.5), structure="1:2"),
    "search": lambda: SAPCallback(
        tolerance=Tolerance("train_loss", drop=9.0, mode="min"), every_n_epochs=1, min_remaining=0.1
    ),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_temporal_convolutional_network_keeps_a_weight_in_every_normalised_row(setting, norm):
    pruner = SETTINGS[setting]()
    module = Net(seeded(lambda: Tcn(NORMS[norm])))
    fit(module, pruner, max_epochs=6)
    empty = {name: n for name, n in empty_rows(pruner).items() if "head" not in name}
    assert empty == dict.fromkeys(empty, 0)
    assert len(empty) == 2
    assert is_finite(module)
    assert pruner.remaining < 0.6
    if setting == "target":
        assert sum(int(mask.sum()) for mask in pruner.masks.values()) == round(0.2 * (96 + 128 + 24))


@pytest.mark.parametrize("close", [None, FixedFraction(0.5)], ids=["shares", "close"])
@pytest.mark.parametrize("scope", ["neuron", "layer", "global"])
def test_grow_and_prune_ends_exact_where_rows_keep_more_than_the_share_of_their_layer(scope, close):
    network = seeded(
        lambda: nn.Sequential(
            nn.Linear(6, 8), nn.ReLU(), parametrizations.weight_norm(nn.Linear(8, 9)), nn.ReLU(), nn.Linear(9, 3)
        )
    )
    pruner = PruningCallback(GrowAndPrune(0.1, 3, 2, close), scope=scope)
    module = Net(network)
    fit(module, pruner, max_epochs=8)
    kept = {name: int(mask.sum()) for name, mask in pruner.masks.items()}
    assert sum(kept.values()) == round(0.1 * (48 + 72 + 27))
    assert kept["net.2.parametrizations.weight.original1"] == 9  # one in each row, where its share is 7
    assert is_finite(module)


def test_grow_and_prune_below_what_always_stays_is_refused_with_its_own_cure():
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), parametrizations.weight_norm(nn.Linear(8, 9)))
    message = "that is 6 of 120 weights, and 9 stay at least: one in each row that is divided by its norm"
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        fit(Net(network), PruningCallback(GrowAndPrune(0.05, 2, 1)), max_epochs=4)
    assert str(error.value).endswith("Give the policy a larger `remaining`.")


@pytest.mark.parametrize("norm", NORMS)
def test_rows_of_one_weight_stay_and_the_shortfall_is_told(norm):
    network = nn.Sequential(NORMS[norm](nn.Linear(1, 8)), nn.ReLU(), nn.Linear(8, 3))

    class Narrow(Net):
        def loss(self, batch):
            return (self.net(batch[0][:, :1]) - batch[1]).square().mean()

    module, pruner = Narrow(network), PruningCallback(FixedFraction(0.5), rounds=1)
    message = (
        "sap: 12 weights are pruned where 16 were asked: each row that its layer divides by its norm keeps a weight, "
        "and each output unit 0 (min_per_unit). Ask for less, exclude narrow layers, or lower min_per_unit."
    )
    with pytest.warns(UserWarning, match=re.escape(message)):
        fit(module, pruner, PQIMonitor(stop_on=None), max_epochs=2)
    assert is_finite(module)
    assert [int(mask.sum()) for mask in pruner.masks.values()] == [8, 12]


def test_a_spectrally_normalised_tensor_keeps_one_weight():
    network = nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        network[2].weight.mul_(1e4)
    module, pruner = (
        Net(network, lambda p: torch.optim.SGD(p, lr=1e-9)),
        SAPCallback(scope="global", rounds=1, gamma=50.0),
    )
    with pytest.warns(UserWarning, match="no weights|output units|were asked"):
        fit(module, pruner, max_epochs=2)
    assert int(pruner.masks["net.0.parametrizations.weight.original"].sum()) >= 1
    assert is_finite(module)


@pytest.mark.parametrize("scope", ["neuron", "layer", "global"])
@pytest.mark.parametrize("least", [1, 2])
def test_min_per_unit_keeps_so_many_in_every_output_unit(scope, least):
    network = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    with torch.no_grad():
        network[0].weight[:5] *= 1e-3
    pruner = PruningCallback(FixedFraction(0.6), rounds=1, scope=scope, min_per_unit=least)
    fit(Net(network, lambda p: torch.optim.SGD(p, lr=1e-9)), pruner, max_epochs=2)
    masks = pruner.masks
    assert all(int(mask.sum(1).min()) >= least for mask in masks.values())
    if scope != "neuron":
        assert sum(int(mask.sum()) for mask in masks.values()) == 72 - (28 + 14 if scope == "layer" else 43)
        assert int(masks["net.0.weight"][:5].sum()) == 5 * least  # others went instead


def test_a_target_below_what_always_stays_is_refused_with_the_numbers():
    pruner = SAPCallback(rounds=1, target_remaining=0.1, min_per_unit=1)
    message = (
        "target_remaining=0.1 cannot be met: that is 7 of 72 weights, and 11 stay at least: one in each row that is "
        "divided by its norm, and min_per_unit=1 in each output unit. Give another target_remaining or None."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(Net(), pruner, max_epochs=2)


def test_min_per_unit_is_a_whole_number_and_not_of_whole_units():
    with pytest.raises(ValueError, match=r"min_per_unit must be a whole number of at least 0, got 0\.5"):
        SAPCallback(min_per_unit=0.5)
    with pytest.raises(ValueError, match="structure='unit' contradicts min_per_unit=1: whole units go"):
        SAPCallback(structure="unit", min_per_unit=1)
    with pytest.raises(ValueError, match=r"structure='2:4' contradicts min_per_unit=3: one pruning leaves exactly 2"):
        SAPCallback(structure="2:4", min_per_unit=3)
    assert SAPCallback(structure="2:4", min_per_unit=2).options.min_per_unit == 2


def test_a_pattern_that_would_empty_a_normalised_input_does_not_fit():
    network = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(6, 1), dim=1), nn.ReLU(), nn.Linear(1, 8), nn.Linear(8, 3)
    )
    pruner = PruningCallback(FixedFraction(0.5), structure="1:2")
    reason = "no multiple of 2, or an input that is divided by its norm would be left without a weight"
    with pytest.warns(UserWarning, match=reason):
        fit(Net(network), pruner, max_epochs=2)
    assert list(pruner.masks) == ["net.3.weight"]
