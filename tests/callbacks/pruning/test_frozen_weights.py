"""Weights that are frozen or unfrozen between rounds or fits."""

import pytest
import torch
from helpers import PRUNABLE, N, Net, Watch, fit, half, survivors

from lightning_sap import FixedFraction, PruningCallback


def test_a_weight_unfrozen_later_joins_at_the_next_round():
    module, pruner, seen = Net(), half(every_n_epochs=1), []
    module.net[0].requires_grad_(False)

    def unfreeze(trainer, module):
        seen.append(survivors(pruner))
        if trainer.current_epoch == 1:
            module.net[0].requires_grad_(True)

    fit(module, pruner, Watch(on_train_epoch_end=unfreeze))
    a, b = PRUNABLE
    assert seen == [{b: 24}, {b: 12}, {a: 48, b: 6}, {a: 24, b: 3}]  # trained in round 2, pruned after it
    assert list(pruner.masks) == [a, b]


def test_a_weight_frozen_later_stays_under_its_mask():
    module, pruner, seen = Net(), half(), []

    def freeze(trainer, module):
        seen.append(survivors(pruner))
        module.net[0].requires_grad_(False)

    fit(module, pruner, Watch(on_train_epoch_end=freeze))
    a, b = PRUNABLE
    assert seen == [{a: 48, b: 24}, {a: 24, b: 12}, {a: 24, b: 6}, {a: 24, b: 3}]
    assert [record.layers_remaining for record in pruner.history][2] == {a: 0.5, b: 0.25}
    assert set(pruner.history[1].layers_pqi) == set(pruner.history[1].layers_pqi_pruned) == {a, b}


@pytest.mark.parametrize("scope", ["neuron", "layer", "global"])
def test_weights_frozen_between_two_fits_are_pruned_no_further(scope):
    module, pruner = Net(), half(scope=scope)
    fit(module, pruner, max_epochs=2)
    first, weight = pruner.masks, module.net[0].weight.detach().clone()
    module.net[0].requires_grad_(False)
    fit(module, pruner)
    a, b = PRUNABLE
    assert torch.equal(module.net[0].weight, weight)
    assert torch.equal(pruner.masks[a], first[a])
    assert survivors(pruner)[b] < int(first[b].sum())


def test_a_target_beside_frozen_weights_is_met_by_the_others():
    module, pruner = Net(), half(target_remaining=0.25, rounds=3)
    freeze = Watch(on_train_epoch_end=lambda t, m: m.net[0].requires_grad_(t.current_epoch < 0))
    with pytest.warns(UserWarning, match="sap: ") as caught:
        fit(module, pruner, freeze)
    frozen, missed = [str(warning.message) for warning in caught if "sap: " in str(warning.message)]
    assert "pruned no further: net.0.weight. These hold more than target_remaining=0.25" in frozen
    assert "target_remaining=0.25 is missed: 41.67% of 72 weights remain after 3 prunings, since the last" in missed
    assert "took nothing of net.0.weight: a weight is pruned after a round in which it had a gradient" in missed
    a, b = PRUNABLE
    assert survivors(pruner)[a] > 12
    assert survivors(pruner)[b] == 6


def test_a_target_is_met_exactly_where_weights_frozen_on_the_way_leave_room_for_it():
    module, pruner = Net(), half(target_remaining=0.4)
    freeze = Watch(on_train_epoch_end=lambda t, m: m.net[3].requires_grad_(t.current_epoch < 0))
    fit(module, pruner, freeze)
    assert survivors(pruner)["net.3.weight"] == pruner.history[1].layers_remaining["net.3.weight"] * 24
    assert sum(survivors(pruner).values()) == 29  # of 72


def test_a_target_is_met_exactly_where_weights_frozen_before_leave_room_for_it():
    module, first, pruner = Net(), half(), half(target_remaining=0.4)
    fit(module, first, max_epochs=2)
    module.net[3].requires_grad_(False)
    pruner.load_state_dict(first.state_dict())
    fit(module, pruner)
    assert survivors(pruner)["net.3.weight"] == survivors(first)["net.3.weight"] == 12
    assert sum(survivors(pruner).values()) == 29  # of 72


def test_floors_of_the_others_limit_what_frozen_weights_may_hold_of_a_target():
    module, pruner = Net(), half(target_remaining=0.4, min_remaining=0.4)
    freeze = Watch(on_train_epoch_end=lambda t, m: m.net[3].requires_grad_(t.current_epoch < 0))
    with (
        pytest.warns(UserWarning, match=r"pruned no further: net\.3\.weight\. These hold more than target_rem"),
        pytest.warns(UserWarning, match=r"0\.4 is missed: 44\.44% .* the last pruning took nothing of net\.3\.weight:"),
    ):
        fit(module, pruner, freeze)
    assert survivors(pruner) == {"net.0.weight": 20, "net.3.weight": 12}  # two fifths of the first


def test_nothing_is_pruned_where_all_is_frozen():
    module, pruner = Net(), half()
    freeze = Watch(on_train_epoch_end=lambda t, m: [m.net[i].requires_grad_(t.current_epoch < 0) for i in (0, 3)])
    fit(module, pruner, freeze)
    assert [record.pruned for record in pruner.history] == [36, 0, 0, None]
    assert pruner.remaining == 0.5


def test_target_counts_weights_that_are_unfrozen_later():
    module = Net()
    module.net[0].requires_grad_(False)
    pruner = PruningCallback(FixedFraction(0.1), rounds=3, target_remaining=0.25)
    join = Watch(on_train_epoch_end=lambda t, m: m.net[0].requires_grad_(t.current_epoch >= 1))
    fit(module, pruner, join)
    assert sum(survivors(pruner).values()) == round(0.25 * N)
