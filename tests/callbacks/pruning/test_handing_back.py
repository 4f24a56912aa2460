"""What a search hands back is in the files too, and one callback of a Trainer searches at most."""

from pathlib import Path

import pytest
import torch
from helpers import fit, half, is_masked, loader, same, survivors
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from searching import SCORES, Scored, search, searching

from lightning_sap import RoundListener, SAPCallback, SparsityInformed, Tolerance


class Takes(RoundListener, Callback):
    may_take_back = True


class TestLastFile:
    def test_last_file_holds_the_network_handed_back(self, tmp_path):
        module, pruner, _ = search(ModelCheckpoint(tmp_path, save_last=True), enable_checkpointing=True)
        assert [r.taken_back for r in pruner.history] == [False, False, False, True]
        assert survivors(pruner) == {"net.0.weight": 18, "net.3.weight": 9}  # 48 and 24: a quarter, then twice as much
        file = torch.load(tmp_path / "last.ckpt", weights_only=True)
        assert same(file["state_dict"], module.state_dict())
        assert is_masked(module.state_dict(), pruner.masks)
        assert pruner.history.restored.metric == pytest.approx(0.9)

    def test_file_of_the_last_epoch_holds_it_where_nothing_is_monitored(self, tmp_path):
        checkpoint = ModelCheckpoint(tmp_path)
        module, _, _ = search(checkpoint, enable_checkpointing=True)
        file = torch.load(checkpoint.best_model_path, weights_only=True)
        assert same(file["state_dict"], module.state_dict())

    def test_file_that_was_chosen_by_a_metric_stays(self, tmp_path):
        chosen = ModelCheckpoint(tmp_path, monitor="val_acc", mode="max", save_last="link")
        module, _, _ = search(chosen, enable_checkpointing=True, scores=[0.9, 0.905, 0.9, 0.5])
        best = torch.load(chosen.best_model_path, weights_only=True)
        assert best["epoch"] == 1  # the best score
        assert best["callbacks"]["lightning_sap/sap"]["round"] == 1
        last = Path(chosen.last_model_path)
        assert not last.is_symlink()
        assert same(torch.load(last, weights_only=True)["state_dict"], module.state_dict())

    def test_nothing_is_written_where_the_last_round_is_sound(self, tmp_path):
        module, pruner, _ = search(
            ModelCheckpoint(tmp_path, save_last=True), enable_checkpointing=True, scores=[0.9] * 4
        )
        assert pruner.history.restored is None
        assert same(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"], module.state_dict())

    def test_last_file_goes_on_with_a_later_end(self, tmp_path):
        module, _, _ = search(ModelCheckpoint(tmp_path, save_last=True), enable_checkpointing=True)
        before = {name: int((p != 0).sum()) for name, p in module.named_parameters() if p.ndim > 1}
        longer, pruner, _ = search(scores=[*SCORES, 0.9, 0.9], ckpt_path=tmp_path / "last.ckpt")
        assert {n: int((p != 0).sum()) for n, p in longer.named_parameters() if p.ndim > 1} == before
        assert pruner.history[-1].sound
        assert pruner.history.restored is None


class TestOneSearch:
    def test_two_tolerances_are_refused(self):
        first, second = searching(include="net.0.*"), searching(include="net.3.*", name="other")
        with pytest.raises(ValueError, match="sap has a tolerance, and PruningCallback may take rounds back too"):
            fit(Scored(), first, second, val=loader())

    def test_a_listener_that_takes_back_is_refused(self):
        with pytest.raises(ValueError, match="sap has a tolerance, and Takes may take rounds back too"):
            fit(Scored(), searching(), Takes(), val=loader())

    def test_another_pruner_without_a_tolerance_is_welcome(self):
        first, second = searching(include="net.0.*"), half(include="net.3.*", name="other", rounds=1, every_n_epochs=2)
        module, _, _ = search(second, pruner=first)
        assert first.history[-1].taken_back
        assert is_masked(module.state_dict(), first.masks)
        assert is_masked(module.state_dict(), second.masks)


class TestOrders:
    def test_orders_are_the_papers_unless_there_is_a_tolerance(self):
        tolerance = Tolerance("val_acc")
        assert SAPCallback().options.policy == SparsityInformed(0.5, 1.0)
        assert SAPCallback(tolerance=tolerance).options.policy == SparsityInformed(1.0, 2.0)
        assert SAPCallback(0.5, 1.0, tolerance=tolerance).options.policy == SparsityInformed(0.5, 1.0)
        assert SAPCallback(0.7, tolerance=tolerance).options.policy == SparsityInformed(0.7, 1.0)
        assert SAPCallback(q=1.5).options.policy == SparsityInformed(0.5, 1.5)

    def test_scope_is_the_layer_unless_there_is_a_tolerance(self):
        assert SAPCallback().options.scope == "layer"
        assert SAPCallback(tolerance=Tolerance("val_acc")).options.scope == "global"
        assert SAPCallback(scope="neuron", tolerance=Tolerance("val_acc")).options.scope == "neuron"
