"""Stopping before the network is lost, and going back to the last sound round."""

import math
import re

import pytest
import torch
from helpers import BAREBONES, Watch, loader, same
from stopping import (
    COLLAPSE,
    COLLAPSING,
    LINE,
    STEADY,
    TURNING,
    Scripted,
    holds,
    lines,
    monitor_of,
    pruner_of,
    run,
    stays,
    stays_in,
)

from lightning_sap import PQIMonitor
from lightning_sap.callbacks.monitor.stopping import Verdict

pytestmark = pytest.mark.slow  # whole fits, many of them


class TestCollapse:
    @pytest.mark.parametrize("order", [1, -1])
    def test_collapse_stops_training_and_restores_the_last_sound_round(self, tmp_path, caplog, order):
        with caplog.at_level("INFO"):
            found = run(tmp_path, order=order)
        sap, record = found.pruner, found.pruner.history[3]
        assert found.monitor.verdict == COLLAPSE
        assert found.trainer.current_epoch == 6
        assert holds(found, 3)
        assert not same(found.rounds.states[3], found.rounds.states[5])
        assert (sap.current_round(), sap.remaining) == (3, record.remaining)
        assert sap.history.restored is record
        assert [r.round for r in sap.history] == [0, 1, 2, 3, 4, 5]
        assert [r.phase for r in sap.history] == ["regularization"] * 5 + ["collapse"]
        assert sap.history[5].reason == COLLAPSE.reason
        assert sap.history[5].pruned is None
        assert lines(caplog, "Stopped after") == [LINE]
        assert lines(caplog, "again") == [
            f"pqi: the module holds round 3 again, {record.remaining:.2%} of the weights: {record.path}"
        ]

    def test_report_and_plots_of_a_collapse_show_stop_and_restored_round(self, tmp_path):
        found = run(tmp_path)
        assert found.monitor.phase == "collapse"
        assert found.monitor.reason == COLLAPSE.reason
        assert [row["phase"] for row in found.monitor.rows()] == ["regularization"] * 5 + ["collapse"]
        assert [row["metric"] for row in found.monitor.rows()] == pytest.approx(COLLAPSING[:6])
        report = found.monitor.report()
        assert f"Stopped after round 5: collapse. {COLLAPSE.reason}" in report
        assert "The module holds round 3 again: 54.17% of the prunable weights." in report
        assert found.pruner.remaining == pytest.approx(0.5417, abs=1e-4)
        assert f"6 rounds are saved, that of the module as {found.pruner.history[3].path}." in report
        styles = {line.get_linestyle(): line.get_xdata()[0] for line in found.monitor.plot().axes[1].lines[1:]}
        assert styles == {"--": 5, ":": 3}
        assert len(found.monitor.plot("layers").axes) == 4
        with pytest.raises(ValueError, match=re.escape("kind must be 'rounds' or 'layers', got 'layer'.")):
            found.monitor.plot("layer")

    def test_validation_afterwards_sees_the_restored_round(self, tmp_path):
        losses = {}
        look = Watch(
            on_train_epoch_end=lambda t, m: losses.update({t.current_epoch: float(t.callback_metrics["val_loss"])})
        )
        found = run(tmp_path, look)
        again = found.trainer.validate(found.module, loader(seed=3), verbose=False)[0]["val_loss"]
        assert again == pytest.approx(losses[3], rel=1e-6)
        assert abs(again - losses[5]) > 1e-4

    def test_checkpoint_saved_after_a_stop_holds_the_restored_round(self, tmp_path):
        found = run(tmp_path)
        found.trainer.save_checkpoint(tmp_path / "end.ckpt")
        file = torch.load(tmp_path / "end.ckpt", weights_only=True)
        assert same(file["state_dict"], found.rounds.states[3])
        twin = pruner_of()
        twin.load_state_dict(file["callbacks"]["lightning_sap/sap"])
        assert same(twin.masks, found.rounds.masks[3][0])

    def test_collapse_of_a_loss_is_seen_in_mode_min(self, tmp_path):
        class Losing(Scripted):
            def validation_step(self, batch, batch_idx):
                self.log("loss", self.now((2.0, 1.0, 0.50, 0.52, 0.6, 6.0, 7.0, 8.0)))

        found = run(tmp_path, module=Losing(), monitor=monitor_of(monitor="loss", mode="min"))
        assert found.monitor.verdict == Verdict(
            "collapse", 6, "Since round 5 the metric is far from its best: 7 after 0.5.", 3
        )
        assert holds(found, 3)

    def test_patience_decides_when_a_collapse_stops(self, tmp_path):
        found = run(tmp_path, monitor=monitor_of(patience=1))
        assert (found.monitor.verdict.round, found.monitor.verdict.restore) == (4, 3)
        assert found.trainer.current_epoch == 5
        found = run(tmp_path, monitor=monitor_of(patience=3))
        assert (found.monitor.verdict.round, found.monitor.verdict.restore) == (6, 3)
        assert holds(found, 3)

    def test_restore_false_leaves_the_last_round_in_the_module(self, tmp_path):
        found = run(tmp_path, monitor=monitor_of(restore=False))
        assert found.monitor.verdict == COLLAPSE
        assert found.trainer.current_epoch == 6
        assert holds(found, 5)
        assert found.pruner.history.restored is None
        assert not (tmp_path / "rounds").exists()

    def test_stop_on_none_only_tells_the_phases(self, tmp_path):
        found = run(tmp_path, monitor=monitor_of(stop_on=None))
        assert stays(found)
        assert [r.phase for r in found.pruner.history] == ["regularization"] * 5 + ["collapse"] * 3
        assert not (tmp_path / "rounds").exists()

    @pytest.mark.parametrize("order", [1, -1])
    def test_a_verdict_on_the_last_round_counts(self, tmp_path, caplog, order):
        with caplog.at_level("INFO"):
            found = run(tmp_path, order=order, max_epochs=6)
        assert found.monitor.verdict == COLLAPSE
        assert [r.round for r in found.pruner.history] == [0, 1, 2, 3, 4, 5]
        assert holds(found, 3)
        assert lines(caplog, "Stopped after") == [LINE]

    @pytest.mark.parametrize("min_epochs", [6, 7, 8])
    def test_min_epochs_are_trained_and_the_verdict_is_said_once(self, tmp_path, caplog, min_epochs):
        with caplog.at_level("INFO"):
            found = run(tmp_path, min_epochs=min_epochs)
        assert found.trainer.current_epoch == min_epochs
        assert len(found.pruner.history) == min_epochs
        assert found.monitor.verdict == COLLAPSE
        assert holds(found, 3)
        more = "" if min_epochs == 6 else f" Training goes on to min_epochs={min_epochs}."
        assert lines(caplog, "Stopped after") == [LINE + more]

    @pytest.mark.parametrize("order", [1, -1])
    @pytest.mark.parametrize("end", ["stop", "max_steps"])
    def test_a_last_round_that_is_cut_short_is_judged_once(self, tmp_path, order, end):
        """Rounds of two epochs; the sixth ends after one, or after four of its six steps."""
        stop = Watch(on_train_epoch_end=lambda t, m: setattr(t, "should_stop", end == "stop" and t.current_epoch == 10))
        options = {"max_steps": 5 * 6 + 4} if end == "max_steps" else {}
        found = run(
            tmp_path, stop, module=Scripted(every=2), pruner=pruner_of(every_n_epochs=2), order=order, max_epochs=16,
            **options,
        )  # fmt: skip
        assert found.trainer.global_step == (33 if end == "stop" else 34)
        assert found.monitor.verdict == COLLAPSE
        assert [r.phase for r in found.pruner.history] == ["regularization"] * 5 + ["collapse"]
        assert holds(found, 3)

    def test_epochs_within_a_round_are_not_judged(self, tmp_path):
        found = run(tmp_path, module=Scripted(COLLAPSING, every=1), pruner=pruner_of(every_n_epochs=4))
        assert stays_in(found) == [COLLAPSING[3], COLLAPSING[7]]

    def test_stop_without_a_sound_round_warns_and_leaves_the_module(self, tmp_path):
        with pytest.warns(UserWarning, match="the module stays") as caught:
            found = run(tmp_path, module=Scripted([math.nan]))
        assert [str(w.message) for w in caught if "sound" in str(w.message)] == [
            "pqi: the module stays as it is after round 1. No round was sound."
        ]
        assert found.monitor.verdict == Verdict("collapse", 1, "Since round 0 the metric is nan.", None)
        assert found.trainer.current_epoch == 2
        assert holds(found, 1)

    def test_stop_without_the_saved_round_warns_and_leaves_the_module(self, tmp_path):
        with pytest.warns(UserWarning, match="the module stays") as caught:
            found = run(tmp_path, pruner=pruner_of(save_rounds=2))
        assert [str(w.message) for w in caught if "module stays" in str(w.message)] == [
            "sap: the module stays as it is after round 5. Round 3 was not saved: give save_rounds=True (here 2)."
        ]
        assert found.monitor.verdict == COLLAPSE
        assert holds(found, 5)

    def test_three_saved_rounds_are_enough_to_restore(self, tmp_path):
        assert holds(run(tmp_path, pruner=pruner_of(save_rounds=3)), 3)

    def test_restored_round_holds_trained_weights_under_rewinding(self, tmp_path):
        assert holds(run(tmp_path, pruner=pruner_of(rewind_weights="init")), 3)

    def test_rounds_without_validation_are_judged_by_the_index_alone(self, tmp_path):
        """The metric is known of rounds 1, 3, 5 and 7: bad in the last two, one after the other."""
        found = run(tmp_path, check_val_every_n_epoch=2)
        assert found.monitor.verdict == Verdict(
            "collapse", 7, "Since round 5 the metric is far from its best: 0.3 after 0.94.", 3
        )
        assert [row["metric"] is None for row in found.monitor.rows()] == [True, False] * 4
        assert holds(found, 3)

    def test_collapse_is_seen_in_a_training_metric(self, tmp_path):
        class Scored(Scripted):
            def training_step(self, batch, batch_idx):
                self.log("acc", self.now(self.scores), on_epoch=True, on_step=False)
                return super().training_step(batch, batch_idx)

        for val in (False, True):
            found = run(tmp_path, module=Scored(), monitor=monitor_of(monitor="acc"), val=val)
            assert found.monitor.verdict == COLLAPSE
            assert holds(found, 3)

    def test_collapse_is_seen_with_several_validations_an_epoch(self, tmp_path):
        found = run(tmp_path, val_check_interval=1)
        assert found.monitor.verdict == COLLAPSE
        assert holds(found, 3)

    @pytest.mark.filterwarnings("ignore:.*barebones")
    def test_collapse_is_seen_by_the_index_without_logging(self, tmp_path):
        """In barebones mode the metric is not known; a collapse that the index shows is seen all the same."""
        module = Scripted(STEADY, (2.0, 1.5, 1.2, 1.0, 0.0, 0.0))
        found = run(tmp_path, module=module, pruner=pruner_of(0.1), **BAREBONES)
        assert (found.monitor.verdict.phase, found.monitor.verdict.round) == ("collapse", 4)
        assert "the index fell to nothing" in found.monitor.reason
        assert holds(found, 3)


class TestCompression:
    def turning(self, folder, scores=STEADY, **options):
        options = {"stop_on": "compression", **options}
        module = Scripted(scores, TURNING)
        return run(folder, module=module, pruner=pruner_of(0.1), monitor=monitor_of(**options), max_epochs=11)

    @pytest.mark.parametrize("monitor", ["val_acc", None])
    def test_compression_restores_the_round_that_the_turn_dates_from(self, tmp_path, monitor):
        found = self.turning(tmp_path, monitor=monitor)
        verdict = found.monitor.verdict
        assert (verdict.phase, verdict.round, verdict.restore) == ("compression", 8, 5)
        assert verdict.reason == "Since round 5 the index rises: 0.0408 after 0.0245 at its lowest."
        assert found.trainer.current_epoch == 9
        assert holds(found, 5)
        assert found.pruner.history.restored.round == 5

    def test_compression_does_not_stop_where_only_a_collapse_does(self, tmp_path):
        found = self.turning(tmp_path, stop_on="collapse")
        assert stays(found, epochs=11)
        assert [r.phase for r in found.pruner.history] == ["regularization"] * 8 + ["compression"] * 3

    def test_collapse_before_compression_stops_too(self, tmp_path):
        found = self.turning(tmp_path, scores=COLLAPSING)
        assert found.monitor.verdict == COLLAPSE
        assert holds(found, 3)


@pytest.mark.parametrize("value", ["Collapse", "regularization", True])
def test_an_unknown_phase_to_stop_on_is_refused(value):
    with pytest.raises(
        ValueError, match=re.escape(f"stop_on must be 'collapse', 'compression' or None, got {value!r}.")
    ):
        PQIMonitor(stop_on=value)
