"""Stopping beside EarlyStopping, ModelCheckpoint, averaging, a second pruner and a second monitor."""

import pytest
import torch
from helpers import Watch, copied, fit, is_masked, loader, same
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from stopping import COLLAPSE, Scripted, holds, monitor_of, pruner_of, run

from lightning_sap import PQIMonitor

pytestmark = pytest.mark.slow  # whole fits, many of them


class TestNeighbours:
    @pytest.mark.parametrize("at_validation_end", [True, False])
    def test_early_stopping_sees_the_phase_of_the_same_epoch(self, tmp_path, at_validation_end):
        """It stops as soon as the phase, 0 until then, is 2."""
        early = EarlyStopping(
            "pqi/phase",
            patience=100,
            divergence_threshold=1.5,
            mode="min",
            check_on_train_epoch_end=not at_validation_end,
        )
        with pytest.warns(UserWarning, match="not all prunings came"):
            found = run(tmp_path, early, monitor=monitor_of(stop_on=None))
        assert early.stopped_epoch == 5
        assert found.trainer.current_epoch == 6
        assert [r.phase for r in found.pruner.history] == ["regularization"] * 5 + ["collapse"]

    def test_the_phase_is_that_of_the_latest_round_end(self, tmp_path):
        seen, ended = [], []
        look = Watch(
            on_validation_end=lambda t, m: seen.append(int(t.callback_metrics["pqi/phase"])),
            on_train_epoch_end=lambda t, m: ended.append(int(t.callback_metrics["pqi/phase"])),
        )
        options = {"module": Scripted(every=2), "pruner": pruner_of(every_n_epochs=2), "max_epochs": 16}
        run(tmp_path, look, monitor=monitor_of(stop_on=None), **options)
        assert seen == ended == [0] * 11 + [2] * 5

    def test_an_early_stopping_of_ones_own_may_come_first(self, tmp_path):
        with pytest.warns(UserWarning, match="not all prunings came"):
            found = run(tmp_path, EarlyStopping("val_acc", mode="max", patience=1))
        assert found.trainer.current_epoch == 4  # the best was in epoch 2
        assert found.monitor.verdict is None
        assert holds(found, 3)

    def test_a_checkpoint_of_the_best_is_kept_beside(self, tmp_path):
        saver = ModelCheckpoint(tmp_path / "best", monitor="val_acc", mode="max")
        found = run(tmp_path, saver, enable_checkpointing=True)
        assert holds(found, 3)
        file = torch.load(saver.best_model_path, weights_only=True)
        assert file["epoch"] == 2
        assert same(file["state_dict"], found.rounds.states[2])

    @pytest.mark.parametrize("order", [1, -1])
    @pytest.mark.parametrize("first", [True, False])
    def test_beside_averaging_the_averaged_weights_come_back(self, tmp_path, order, first):
        losses, average = {}, EMAWeightAveraging(decay=0.5)
        look = Watch(
            on_validation_end=lambda t, m: losses.update({t.current_epoch: float(t.callback_metrics["val_loss"])})
        )
        pruner, monitor, module = pruner_of(), monitor_of(), Scripted()
        ours = [pruner, monitor][::order]
        trainer = fit(
            module, *([average, *ours] if first else [*ours, average]), look, val=loader(seed=3), max_epochs=8,
            default_root_dir=tmp_path, num_sanity_val_steps=0,
        )  # fmt: skip
        assert monitor.verdict == COLLAPSE
        before = copied(module.state_dict())
        found = trainer.validate(module, loader(seed=3), verbose=False)[0]["val_loss"]
        assert found == pytest.approx(losses[3], rel=1e-6)
        assert same(module.state_dict(), before)
        assert is_masked(module.state_dict(), pruner.masks)
        # the index is that of the weights in training, wherever the averages were; after it, they are in the module
        assert [row["pqi"] for row in monitor.rows()][:-1] == [record.pqi for record in pruner.history][:-1]

    @pytest.mark.parametrize("order", [1, -1])
    def test_of_two_pruners_the_first_ones_rounds_count_and_both_come_back(self, tmp_path, order):
        a = pruner_of(name="a", include="net.0.*")
        b = pruner_of(name="b", include="net.3.*", every_n_epochs=2)
        found = run(tmp_path, b, pruner=a, order=order)
        assert found.monitor.verdict == COLLAPSE
        assert holds(found, 3)
        assert [(p.current_round(), p.remaining == p.history[t].remaining) for p, t in ((a, 3), (b, 1))] == [
            (3, True), (1, True),
        ]  # fmt: skip

    def test_two_monitors_may_judge_by_different_metrics(self, tmp_path):
        other = PQIMonitor(name="other", monitor="val_loss", mode="min", verbose=False)
        found = run(tmp_path, other)
        assert (found.monitor.verdict, other.verdict) == (COLLAPSE, None)
        assert holds(found, 3)
