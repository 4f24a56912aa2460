"""What is gathered outlives an interrupt: resumed in the midst of it, searched and taken back, changed and replaced."""

import copy
import re

import pytest
import torch
from helpers import Net, Scheduled, Watch, data, fit, half, loader, same
from lightning.pytorch.callbacks import ModelCheckpoint
from resuming import STATE
from scoring import Scores, state_of
from searching import Scored, search, searching
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sap import FixedFraction, PruningCallback, SAPCallback
from lightning_sap.callbacks.pruning import decisions
from lightning_sap.engine.groups import scores_of

ALIKE = DataLoader([data(1)[0]] * 24, 8)  # a DataLoader does not know where it stopped


def assert_same_scores(found, wanted):
    assert found.keys() == wanted.keys()
    assert all(same(found[epoch], wanted[epoch]) for epoch in found)


class TestResume:
    def run(self, folder, importance, **options):
        """Two rounds of two epochs, three steps each: steps 4 to 6 count."""
        module, pruner = Scheduled(), SAPCallback(importance=importance, every_n_epochs=2, eta_r=0.3)
        saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
        fit(module, pruner, scores := Scores(pruner), saver, train=ALIKE, enable_checkpointing=True, **options)
        return module, pruner, scores

    @pytest.mark.parametrize("importance", ["taylor", "wanda"])
    def test_resume_from_any_step_equals_unbroken_run(self, tmp_path, importance):
        module, whole, scores = self.run(tmp_path, importance)
        assert 0 < whole.remaining < 1
        for step in (3, 4, 5, 6):
            other, resumed, again = self.run(tmp_path / "again", importance, ckpt_path=tmp_path / f"step={step}.ckpt")
            assert same(other.state_dict(), module.state_dict())
            assert same(resumed.masks, whole.masks)
            assert_same_scores(again.found, scores.found if step < 6 else {})

    def test_files_hold_it_while_it_is_needed_and_are_read_without_pickle(self, tmp_path):
        self.run(tmp_path, "taylor")
        held = {}
        for step in (3, 4, 6, 7):
            state = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["callbacks"][STATE]
            held[step] = {name: int(sums["count"]) for name, sums in state["gathered"].items()}
        names = ("net.0.weight", "net.3.weight")
        assert held == {3: {}, 4: dict.fromkeys(names, 1), 6: dict.fromkeys(names, 3), 7: {}}

    def test_a_file_stays_as_it_is_while_the_run_goes_on(self):
        pruner, states = half(importance="wanda", rounds=1), []
        look = Watch(on_train_batch_end=lambda *_: states.append((pruner.state_dict()["gathered"], state_of(pruner))))
        fit(Net(), pruner, look, max_epochs=2)
        for state, then in states:
            assert state.keys() == then.keys()
            assert all(same(state[name], then[name]) for name in then)

    def test_a_state_that_is_taken_up_in_training_is_not_written_to(self):
        pruner, states = half(importance="taylor", rounds=1), []

        def take_up(trainer, module):
            if trainer.global_step == 1:
                states.append(pruner.state_dict())
                states.append(copy.deepcopy(states[0]["gathered"]))
                pruner.load_state_dict(states[0])

        fit(Net(), pruner, Watch(on_train_batch_end=take_up), max_epochs=2)
        state, then = states
        assert all(same(state["gathered"][name], then[name]) for name in then)
        assert pruner.remaining == 0.5

    def test_units_by_fisher_ratio(self, tmp_path):
        pytest.importorskip("torch_pruning")
        torch.manual_seed(5)
        alike = DataLoader(TensorDataset(torch.randn(8, 6).repeat(3, 1), torch.arange(8).repeat(3) % 3), 8)

        class Classes(Net):
            def loss(self, batch):
                return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def run(folder, **options):
            module = Classes()
            pruner = PruningCallback(FixedFraction(0.5), importance="fisher", structure="unit", every_n_epochs=2)
            saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
            fit(module, pruner, scores := Scores(pruner), saver, train=alike, enable_checkpointing=True, **options)
            return module, pruner, scores

        module, whole, scores = run(tmp_path)
        other, resumed, again = run(tmp_path / "again", ckpt_path=tmp_path / "step=5.ckpt")
        assert whole.masks["net.0.weight"].any(1).sum() == 4
        assert same(other.state_dict(), module.state_dict())
        assert same(resumed.masks, whole.masks)
        assert_same_scores(again.found, scores.found)

    def test_sums_of_another_shape_are_refused(self, tmp_path):
        self.run(tmp_path, "taylor")
        file = torch.load(tmp_path / "step=5.ckpt", weights_only=True)
        file["callbacks"][STATE]["gathered"]["net.0.weight"]["sum"] = torch.zeros(6, 8)
        torch.save(file, tmp_path / "changed.ckpt")
        message = "gathered['net.0.weight'] must be tensors of the shapes {'sum': (8, 6), 'count': ()}, got"
        with pytest.raises(ValueError, match=re.escape(message)):
            self.run(tmp_path / "again", "taylor", ckpt_path=tmp_path / "changed.ckpt")

    def test_another_importance_gathers_what_is_left_of_the_round(self, tmp_path):
        self.run(tmp_path, "taylor")
        counts = []
        pruner = SAPCallback(importance="wanda", every_n_epochs=2, eta_r=0.3)
        look = Watch(on_train_epoch_end=lambda *_: counts.append(state_of(pruner)))
        fit(Scheduled(), pruner, look, train=ALIKE, ckpt_path=tmp_path / "step=4.ckpt")
        sums = counts[0]["net.0.weight"]
        assert int(sums["count"]) == 2 * 8  # the fifth and the sixth step
        assert sums["square"].shape == (1, 6)


class TestSearch:
    """A round is taken back: the scores are those of the round that is gone back to."""

    SCORES = (0.9, 0.9, 0.5, 0.9, 0.9)

    def run(self, monkeypatch, importance="taylor", **options):
        used, decide = [], decisions.decide

        def recorded(tensors, **how):
            used.append({name: score.clone() for name, score in scores_of(tensors).items()})
            return decide(tensors, **how)

        pruner = searching(importance=importance)
        with monkeypatch.context() as patch:
            patch.setattr(decisions, "decide", recorded)
            scores = Scores(pruner)
            module, *_ = search(scores, scores=self.SCORES, pruner=pruner, **options)
        return module, pruner, scores, used

    @pytest.mark.parametrize("importance", ["taylor", "wanda"])
    def test_a_round_that_is_taken_back_is_pruned_by_the_scores_of_the_kept_one(self, monkeypatch, importance):
        _, pruner, scores, used = self.run(monkeypatch, importance)
        assert [record.taken_back for record in pruner.history][:4] == [False, False, True, False]
        assert same(used[1], scores.found[1])
        assert same(used[2], scores.found[1])  # not those of the round that is gone
        assert same(used[3], scores.found[3])

    def test_resumed_before_it_is_taken_back(self, monkeypatch, tmp_path):
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        how = {"enable_checkpointing": True, "default_root_dir": tmp_path}
        used = {}

        def run(*callbacks, **options):
            pruner, seen = searching(importance="taylor"), []
            decide = decisions.decide
            with monkeypatch.context() as patch:
                patch.setattr(decisions, "decide", lambda t, **k: seen.append(scores_of(t)) or decide(t, **k))
                module, *_ = search(*callbacks, scores=self.SCORES, pruner=pruner, **options)
            used[len(used)] = seen
            return module, pruner

        module, whole = run(saver, **how)
        other, resumed = run(module=Scored(list(self.SCORES)), ckpt_path=tmp_path / "epoch=2.ckpt", **how)
        assert same(other.state_dict(), module.state_dict())
        assert same(resumed.masks, whole.masks)
        assert same(used[1][0], used[0][2])


class TestReplaced:
    @pytest.mark.filterwarnings("ignore:sap. these were replaced")
    @pytest.mark.parametrize("importance", ["taylor", "wanda"])
    def test_a_layer_that_is_replaced_while_it_is_gathered(self, importance):
        """What was gathered of another shape makes way; the new weight is pruned from the round after."""

        def widen(trainer, module):
            if trainer.global_step == 1 and module.net[0].out_features == 8:
                module.net = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3))
                trainer.optimizers[0].param_groups[0]["params"][:] = list(module.parameters())

        pruner = half(importance=importance)
        fit(Net(), pruner, Watch(on_train_batch_start=widen), max_epochs=3, train=loader())
        assert pruner.masks["net.0.weight"].shape == (9, 6)
        assert [int(mask.sum()) for mask in pruner.masks.values()] == [27, 14]
