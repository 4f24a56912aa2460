"""structure="n:m": one pruning to the exact pattern, which then holds; what contradicts it is refused."""

import re

import pytest
import torch
from helpers import Checked, Net, Scheduled, fit, same, seeded, survivors
from lightning.pytorch.callbacks import ModelCheckpoint
from resuming import records_of, run_saving_epochs
from torch import nn

from lightning_sap import FixedFraction, GoOn, PruningCallback, RoundListener, SAPCallback, Tolerance
from lightning_sap.policies.base import Policy


def network():
    return seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)))


def holds(mask, n, m):
    return bool((mask.view(-1, m).sum(1) == n).all())


class TestRounds:
    def test_one_pruning_at_half_of_the_training_and_the_pattern_holds_at_every_step(self):
        module, pruner = Checked(network()), SAPCallback(structure="1:2")
        fit(module, pruner, max_epochs=6)
        assert [(r.round, r.first_epoch, r.last_epoch, r.remaining) for r in pruner.history] == [
            (0, 0, 2, 1.0), (1, 3, 5, 0.5),
        ]  # fmt: skip
        assert all(holds(mask, 1, 2) for mask in pruner.masks.values())
        assert [zeros for _, zeros in module.steps] == [0] * 9 + [36] * 9

    def test_the_dense_round_takes_as_long_as_is_asked_for(self):
        pruner = SAPCallback(structure="1:2", every_n_epochs=1)
        fit(Net(network()), pruner, max_epochs=5)
        assert [record.first_epoch for record in pruner.history] == [0, 1]

    def test_a_policy_that_takes_nothing_changes_nothing(self):
        one, other = SAPCallback(structure="1:2"), PruningCallback(FixedFraction(0.0), structure="1:2")
        fit(Net(network()), one), fit(Net(network()), other)
        assert same(one.masks, other.masks)

    def test_a_listener_that_wants_no_pruning_gets_none(self):
        class Idle(RoundListener, ModelCheckpoint):
            def on_round_end(self, trainer, pl_module, event):
                return GoOn(0.0)

        pruner = SAPCallback(structure="1:2")
        fit(Net(network()), pruner, Idle(), enable_checkpointing=True)
        assert pruner.remaining == 1.0

    def test_zeros_that_were_there_are_in_the_pattern(self):
        module = Net(network())
        with torch.no_grad():
            module.net[0].weight[:, 0] = 0
        pruner = SAPCallback(structure="1:2", keep_zeros=True)
        fit(module, pruner)
        assert holds(pruner.masks["net.0.weight"], 1, 2)
        assert pruner.masks["net.0.weight"][:, 1].all()

    def test_rewinding_goes_with_it(self):
        module = Net(network())
        first = module.net[0].weight.detach().clone()
        pruner, seen = SAPCallback(structure="1:2", rewind_weights="init"), []
        module.on_train_epoch_start = lambda: seen.append(module.net[0].weight.detach().clone())
        fit(module, pruner)
        assert torch.equal(seen[2], first * pruner.masks["net.0.weight"])

    def test_a_resumed_run_equals_the_unbroken_one(self, tmp_path):
        def pruner():
            return SAPCallback(structure="1:2")

        module, whole, _, _ = run_saving_epochs(Scheduled, pruner, tmp_path / "whole")
        for epoch in (1, 2, 4):
            path = tmp_path / "whole" / f"epoch={epoch}.ckpt"
            again, resumed, _, _ = run_saving_epochs(Scheduled, pruner, tmp_path / str(epoch), ckpt_path=path)
            assert same(again.state_dict(), module.state_dict())
            assert same(resumed.masks, whole.masks)
            assert len(records_of(resumed)) == len(records_of(whole)) == 2

    def test_the_log_says_that_the_pattern_decides(self, caplog):
        caplog.set_level("INFO")
        fit(Net(network()), SAPCallback(structure="1:2"))
        assert "1 pruning in rounds of 2 epochs" in caplog.text
        assert "structure 1:2 (each 2 weights keep 1, whatever the policy says)" in caplog.text


class TestWhatDoesNotFit:
    def test_weights_whose_inputs_are_no_multiple_stay_dense_and_are_named(self):
        pruner = SAPCallback(structure="2:4")
        message = (
            "structure='2:4' does not fit these weights, which stay dense, since the number of inputs is no multiple "
            "of 4: {'net.0.weight': (8, 6)}. Leave them out with exclude=['net.0.weight']."
        )
        with pytest.warns(UserWarning, match=re.escape(message)):
            fit(Net(network()), pruner)
        assert survivors(pruner) == {"net.3.weight": 12}
        assert holds(pruner.masks["net.3.weight"], 2, 4)
        fit(Net(network()), SAPCallback(structure="2:4", exclude=["net.0.weight"]))  # warns of nothing

    def test_a_pattern_that_fits_nothing_is_refused(self):
        with pytest.raises(ValueError, match="structure='2:5' fits no prunable weight: the number of inputs"):
            fit(Net(network()), SAPCallback(structure="2:5"))

    def test_a_training_too_short_for_it_is_refused(self):
        with pytest.raises(ValueError, match="1 prunings need at least 2 epochs"):
            fit(Net(network()), SAPCallback(structure="1:2"), max_epochs=1)


class Regrows(Policy):
    regrows = True

    def __call__(self, sums, round):
        return sums.count // 2


class TestContradictions:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("scope", "global"),
            ("tolerance", Tolerance("val_acc")),
            ("rounds", 2),
            ("target_remaining", 0.3),
            ("min_remaining", 0.6),
        ],
    )
    def test_options_that_contradict_a_pattern_are_refused(self, name, value):
        message = f"structure='2:4' contradicts {name}={value!r}: one pruning leaves exactly 2 of every 4 weights, 0.5"
        with pytest.raises(ValueError, match=re.escape(message)):
            SAPCallback(structure="2:4", **{name: value})

    def test_a_policy_whose_weights_come_back_is_refused(self):
        with pytest.raises(ValueError, match=re.escape("structure='2:4' contradicts policy=Regrows()")):
            PruningCallback(Regrows(), structure="2:4")

    def test_a_target_and_a_floor_that_the_pattern_keeps_are_allowed(self):
        pruner = SAPCallback(structure="1:2", target_remaining=0.5, min_remaining=0.5)
        fit(Net(network()), pruner)
        assert pruner.remaining == 0.5

    @pytest.mark.parametrize("value", ["4:2", "2:2", "0:4", "filter", 2, None])
    def test_what_is_no_structure_is_refused(self, value):
        message = (
            f"structure must be 'weight', 'unit', or 'n:m' of whole numbers 0 < n < m such as '2:4', got {value!r}."
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            SAPCallback(structure=value)
