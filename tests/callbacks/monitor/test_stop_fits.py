"""Stopping in second fits, resumed runs and runs without an end."""

import pytest
from helpers import Net, fit, loader, same
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from stopping import COLLAPSE, COLLAPSING, STEADY, Scripted, holds, monitor_of, pruner_of, run, stays

from lightning_sap import PQIMonitor, SAPCallback
from lightning_sap.callbacks.monitor.stopping import Verdict

pytestmark = pytest.mark.slow  # whole fits, many of them


class TestFits:
    def test_second_fit_is_judged_anew(self, tmp_path):
        found = run(tmp_path / "a")
        left = found.pruner.remaining
        again = run(tmp_path / "b", module=found.module, pruner=found.pruner, monitor=found.monitor)
        assert again.monitor.verdict == COLLAPSE
        assert [r.round for r in again.pruner.history] == [0, 1, 2, 3, 4, 5]
        assert again.pruner.history[0].remaining == left
        assert holds(again, 3)
        assert not same(again.rounds.states[3], found.rounds.states[3])

    def test_a_second_fit_that_is_sound_is_not_stopped_by_the_verdict_on_the_first(self, tmp_path):
        found = run(tmp_path / "a")
        found.module.scores = STEADY
        again = run(tmp_path / "b", module=found.module, pruner=found.pruner, monitor=found.monitor)
        assert stays(again)
        assert again.monitor.report().count("collapse") == 0

    def without_the_monitor(self, folder):
        """Copies of the rounds of a run that goes on to its end, and a file of each of its epochs."""
        saver = ModelCheckpoint(folder / "files", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        other = PQIMonitor(stop_on=None, name="other", verbose=False)
        return run(folder, saver, monitor=other, pruner=pruner_of(save_rounds=True), enable_checkpointing=True).rounds

    @pytest.mark.parametrize("epoch", range(6))
    def test_a_monitor_that_joins_a_resumed_run_catches_up(self, tmp_path, epoch):
        """What it judges is the round that ends next: a run that was lost already is stopped one round later."""
        rounds = self.without_the_monitor(tmp_path)
        found = run(tmp_path, ckpt_path=tmp_path / "files" / f"epoch={epoch}.ckpt")
        late = epoch == 5
        assert found.monitor.verdict == (COLLAPSE if not late else Verdict("collapse", 6, COLLAPSE.reason, 3))
        assert found.trainer.current_epoch == (7 if late else 6)
        assert same(found.module.state_dict(), rounds.states[3])
        assert same(found.pruner.masks, rounds.masks[3][0])

    def test_a_monitor_that_joins_has_caught_up_at_validation_end(self, tmp_path):
        self.without_the_monitor(tmp_path)
        early = EarlyStopping(
            "pqi/phase", patience=100, divergence_threshold=1.5, mode="min", check_on_train_epoch_end=False
        )
        with pytest.warns(UserWarning, match="not all prunings came"):
            run(tmp_path, early, monitor=monitor_of(stop_on=None), ckpt_path=tmp_path / "files" / "epoch=4.ckpt")
        assert early.stopped_epoch == 5

    def test_fast_dev_run_is_never_stopped(self, tmp_path):
        monitor, pruner = PQIMonitor(verbose=False), SAPCallback()
        fit(Net(), pruner, monitor, val=loader(), fast_dev_run=True, max_epochs=None, default_root_dir=tmp_path)
        assert monitor.verdict is None
        assert [record.phase for record in pruner.history] == ["regularization"]
        assert not (tmp_path / "rounds").exists()

    def test_collapse_stops_training_without_an_end(self, tmp_path):
        found = run(tmp_path, max_epochs=-1)
        assert found.monitor.verdict == COLLAPSE
        assert found.trainer.current_epoch == 6
        assert holds(found, 3)


def test_a_verdict_in_the_last_round_outlives_the_process(tmp_path):
    """Resumed from the file of the last epoch, Lightning trains nothing and calls no hook of training."""
    scores = COLLAPSING[:6]
    whole = run(tmp_path / "whole", module=Scripted(scores), max_epochs=6)
    assert whole.monitor.verdict == COLLAPSE
    saver = ModelCheckpoint(tmp_path / "first", save_last=True, save_on_train_epoch_end=True)
    run(tmp_path / "first", saver, module=Scripted(scores), max_epochs=6, enable_checkpointing=True)
    second = run(tmp_path / "second", module=Scripted(scores), max_epochs=6, ckpt_path=tmp_path / "first" / "last.ckpt")
    assert second.monitor.verdict == COLLAPSE
    assert second.pruner.history.restored.round == COLLAPSE.restore
    assert second.pruner.remaining == whole.pruner.remaining
    assert same(second.module.state_dict(), whole.module.state_dict())
