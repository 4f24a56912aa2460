"""Stopping before the network is lost, and going back to the last sound round."""

import math
import re

import pytest
import torch
from helpers import BAREBONES, Net, Watch, copied, fit, loader, quiet_trainer, same
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint, ModelPruning
from lightning.pytorch.loggers import TensorBoardLogger
from stopping import COLLAPSING, STEADY, TURNING, Scripted, pruner_of, run

from lightning_sap import PQIMonitor, SAPCallback
from lightning_sap.callbacks.monitor.stopping import Verdict

COLLAPSE = Verdict("collapse", 5, "Since round 4 the metric is far from its best: 0.5 after 0.95.", 3)
LINE = "pqi: Stopped after round 5: collapse. Since round 4 the metric is far from its best: 0.5 after 0.95."

pytestmark = pytest.mark.slow  # whole fits, many of them


def monitor_of(**options):
    return PQIMonitor(**{"monitor": "val_acc", "verbose": False, **options})


def holds(found, round):
    """Whether module and pruner are as they were at the end of a round."""
    return same(found.module.state_dict(), found.rounds.states[round]) and same(
        found.pruner.masks, found.rounds.masks[round][0]
    )


def stays(found, epochs=8):
    """Whether a run came to its end, with its last round in the module."""
    return found.trainer.current_epoch == epochs and found.monitor.verdict is None and holds(found, epochs - 1)


def lines(caplog, text):
    return [record.getMessage() for record in caplog.records if text in record.getMessage()]


class TestCollapse:
    @pytest.mark.parametrize("order", [1, -1])
    def test_training_stops_and_the_last_sound_round_is_back(self, tmp_path, caplog, order):
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

    def test_what_it_reports_and_draws(self, tmp_path):
        found = run(tmp_path)
        assert found.monitor.phase == "collapse"
        assert found.monitor.reason == COLLAPSE.reason
        assert [row["phase"] for row in found.monitor.rows()] == ["regularization"] * 5 + ["collapse"]
        assert [row["metric"] for row in found.monitor.rows()] == pytest.approx(COLLAPSING[:6])
        report = found.monitor.report()
        assert f"Stopped after round 5: collapse. {COLLAPSE.reason}" in report
        assert "The module holds round 3 again: 54.17 % of the prunable weights." in report
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

    def test_a_file_that_is_saved_afterwards_holds_it(self, tmp_path):
        found = run(tmp_path)
        found.trainer.save_checkpoint(tmp_path / "end.ckpt")
        file = torch.load(tmp_path / "end.ckpt", weights_only=True)
        assert same(file["state_dict"], found.rounds.states[3])
        twin = pruner_of()
        twin.load_state_dict(file["callbacks"]["lightning_sap/sap"])
        assert same(twin.masks, found.rounds.masks[3][0])

    def test_a_loss_is_better_when_smaller(self, tmp_path):
        class Losing(Scripted):
            def validation_step(self, batch, batch_idx):
                self.log("loss", self.now((2.0, 1.0, 0.50, 0.52, 0.6, 6.0, 7.0, 8.0)))

        found = run(tmp_path, module=Losing(), monitor=monitor_of(monitor="loss", mode="min"))
        assert found.monitor.verdict == Verdict(
            "collapse", 6, "Since round 5 the metric is far from its best: 7 after 0.5.", 3
        )
        assert holds(found, 3)

    def test_patience_is_an_option(self, tmp_path):
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

    def test_where_no_round_was_sound_it_says_so(self, tmp_path):
        with pytest.warns(UserWarning, match="the module stays") as caught:
            found = run(tmp_path, module=Scripted([math.nan]))
        assert [str(w.message) for w in caught if "sound" in str(w.message)] == [
            "pqi: the module stays as it is after round 0. No round was sound."
        ]
        assert found.monitor.verdict == Verdict("collapse", 0, "In round 0 the metric is nan.", None)
        assert found.trainer.current_epoch == 1
        assert holds(found, 0)

    def test_where_the_round_is_not_kept_any_more_it_says_so(self, tmp_path):
        with pytest.warns(UserWarning, match="the module stays") as caught:
            found = run(tmp_path, pruner=pruner_of(save_rounds=2))
        assert [str(w.message) for w in caught if "module stays" in str(w.message)] == [
            "pqi: the module stays as it is after round 5. Round 3 was not saved: give save_rounds=True (here 2)."
        ]
        assert found.monitor.verdict == COLLAPSE
        assert holds(found, 5)

    def test_as_many_rounds_as_that_takes_are_enough(self, tmp_path):
        assert holds(run(tmp_path, pruner=pruner_of(save_rounds=3)), 3)

    def test_weights_are_rewound_in_training_and_not_in_what_comes_back(self, tmp_path):
        assert holds(run(tmp_path, pruner=pruner_of(rewind_weights="init")), 3)

    def test_rounds_without_validation_are_judged_by_the_index_alone(self, tmp_path):
        """The metric is known of rounds 1, 3, 5 and 7: bad in the last two, one after the other."""
        found = run(tmp_path, check_val_every_n_epoch=2)
        assert found.monitor.verdict == Verdict(
            "collapse", 7, "Since round 5 the metric is far from its best: 0.3 after 0.94.", 3
        )
        assert [row["metric"] is None for row in found.monitor.rows()] == [True, False] * 4
        assert holds(found, 3)

    def test_a_metric_of_training_alone(self, tmp_path):
        class Scored(Scripted):
            def training_step(self, batch, batch_idx):
                self.log("acc", self.now(self.scores), on_epoch=True, on_step=False)
                return super().training_step(batch, batch_idx)

        for val in (False, True):
            found = run(tmp_path, module=Scored(), monitor=monitor_of(monitor="acc"), val=val)
            assert found.monitor.verdict == COLLAPSE
            assert holds(found, 3)

    def test_several_validations_an_epoch(self, tmp_path):
        found = run(tmp_path, val_check_interval=1)
        assert found.monitor.verdict == COLLAPSE
        assert holds(found, 3)

    @pytest.mark.filterwarnings("ignore:.*barebones")
    def test_without_logging_it_goes_by_the_index(self, tmp_path):
        """In barebones mode the metric is not known; a collapse that the index shows is seen all the same."""
        module = Scripted(STEADY, (2.0, 1.5, 1.2, 1.0, 0.0, 0.0))
        found = run(tmp_path, module=module, pruner=pruner_of(0.1), **BAREBONES)
        assert (found.monitor.verdict.phase, found.monitor.verdict.round) == ("collapse", 4)
        assert "the index fell to nothing" in found.monitor.reason
        assert holds(found, 3)


def stays_in(found):
    """Metrics of the rounds of a run that came to its end."""
    assert found.monitor.verdict is None
    assert found.trainer.current_epoch == 8
    return [pytest.approx(record.metrics["val_acc"]) for record in found.pruner.history]


class TestCompression:
    def turning(self, folder, scores=STEADY, **options):
        options = {"stop_on": "compression", **options}
        module = Scripted(scores, TURNING)
        return run(folder, module=module, pruner=pruner_of(0.1), monitor=monitor_of(**options), max_epochs=11)

    @pytest.mark.parametrize("monitor", ["val_acc", None])
    def test_it_goes_back_to_the_round_that_the_turn_dates_from(self, tmp_path, monitor):
        found = self.turning(tmp_path, monitor=monitor)
        verdict = found.monitor.verdict
        assert (verdict.phase, verdict.round, verdict.restore) == ("compression", 8, 5)
        assert verdict.reason == "Since round 5 the index rises: 0.0408 after 0.0245 at its lowest."
        assert found.trainer.current_epoch == 9
        assert holds(found, 5)
        assert found.pruner.history.restored.round == 5

    def test_it_is_no_reason_where_only_a_collapse_stops(self, tmp_path):
        found = self.turning(tmp_path, stop_on="collapse")
        assert stays(found, epochs=11)
        assert [r.phase for r in found.pruner.history] == ["regularization"] * 8 + ["compression"] * 3

    def test_a_collapse_that_comes_first_stops_too(self, tmp_path):
        found = self.turning(tmp_path, scores=COLLAPSING)
        assert found.monitor.verdict == COLLAPSE
        assert holds(found, 3)


class TestVerbose:
    def test_a_change_of_phase_and_the_report_are_said(self, tmp_path, caplog, capsys):
        pytest.importorskip("rich")
        options = {"module": Scripted(STEADY, TURNING), "pruner": pruner_of(0.1), "max_epochs": 11}
        with caplog.at_level("INFO"):
            found = run(tmp_path, monitor=monitor_of(verbose=True), **options)
        assert lines(caplog, "pqi:") == [
            "pqi: compression after round 8. Since round 5 the index rises: 0.0408 after 0.0245 at its lowest."
        ]
        printed = capsys.readouterr().out
        assert "Rounds" in printed
        assert f"11 rounds are saved, that of the module as {found.pruner.history[10].path}." in printed

    def test_otherwise_only_the_verdict_is(self, tmp_path, caplog, capsys):
        with caplog.at_level("INFO"):
            run(tmp_path)
        assert lines(caplog, "pqi:")[0] == LINE
        assert len(lines(caplog, "pqi:")) == 2
        assert capsys.readouterr().out == ""

    def test_without_rich_the_report_is_logged_as_markdown(self, tmp_path, caplog, capsys, monkeypatch):
        import lightning_sap.callbacks.monitor.callback as room

        monkeypatch.setattr(room.importlib.util, "find_spec", lambda name: None)
        with caplog.at_level("INFO"):
            found = run(tmp_path, monitor=monitor_of(verbose=True))
        assert lines(caplog, "| round |") == [found.monitor.report()]
        assert "│" not in capsys.readouterr().out

    def test_the_report_is_among_the_texts_of_tensorboard_and_the_figures_among_its_images(self, tmp_path):
        events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        found = run(tmp_path, logger=TensorBoardLogger(tmp_path, name="", version=""))
        file = events.EventAccumulator(str(tmp_path), size_guidance={"images": 0, "tensors": 0})
        file.Reload()
        (text,) = file.Tensors("pqi/report/text_summary")
        assert text.tensor_proto.string_val[0].decode() == found.monitor.report()
        assert text.step == found.trainer.global_step
        assert [len(file.Images(f"pqi/{kind}")) for kind in ("rounds", "layers")] == [1, 1]

    def test_before_any_fit_there_is_no_report(self):
        with pytest.raises(ValueError, match=re.escape("There is nothing to report yet: no round has ended.")):
            PQIMonitor().report()


class TestWithoutAPruner:
    WARNING = (
        "pqi: no callback of lightning-sap prunes in this Trainer, so PQIMonitor only logs and never stops. Add "
        "SAPCallback or PruningCallback, or say stop_on=None (now 'collapse')."
    )

    @pytest.mark.filterwarnings("ignore:.*named tensors")
    @pytest.mark.parametrize("other", ["dense", "ModelPruning", "held masks"])
    def test_it_logs_and_warns_and_never_stops(self, tmp_path, other):
        others = {
            "dense": [],
            "ModelPruning": [ModelPruning("l1_unstructured", amount=0.9)],
            "held masks": [SAPCallback(rounds=0)],
        }
        monitor, seen = monitor_of(), []
        look = Watch(on_train_epoch_end=lambda t, m: seen.append(set(t.callback_metrics)))
        with pytest.warns(UserWarning, match="never stops") as caught:
            trainer = fit(Scripted(), monitor, *others[other], look, val=loader(), max_epochs=8)
        assert [str(w.message) for w in caught if "never stops" in str(w.message)] == [self.WARNING]
        assert trainer.current_epoch == 8
        assert monitor.verdict is None
        assert all({"pqi/global", "pqi/layer_mean"} <= keys and "pqi/phase" not in keys for keys in seen)
        assert [row["phase"] for row in monitor.rows()] == [None] * 8

    def test_what_only_logs_does_not_warn(self, recwarn):
        fit(Net(), PQIMonitor(stop_on=None))
        assert not [w for w in recwarn if "never stops" in str(w.message)]

    def test_evaluation_is_left_alone(self, recwarn):
        quiet_trainer(PQIMonitor()).validate(Net(), loader(), verbose=False)
        assert not [w for w in recwarn if "never stops" in str(w.message)]


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
        assert all(not module.state_dict()[name][~mask].any() for name, mask in pruner.masks.items())
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


class TestFits:
    def test_a_second_fit_starts_anew(self, tmp_path):
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

    def test_at_validation_end_too_it_has_caught_up(self, tmp_path):
        self.without_the_monitor(tmp_path)
        early = EarlyStopping(
            "pqi/phase", patience=100, divergence_threshold=1.5, mode="min", check_on_train_epoch_end=False
        )
        run(tmp_path, early, monitor=monitor_of(stop_on=None), ckpt_path=tmp_path / "files" / "epoch=4.ckpt")
        assert early.stopped_epoch == 5

    def test_a_fast_dev_run_is_left_alone(self, tmp_path):
        monitor, pruner = PQIMonitor(verbose=False), SAPCallback()
        fit(Net(), pruner, monitor, val=loader(), fast_dev_run=True, max_epochs=None, default_root_dir=tmp_path)
        assert monitor.verdict is None
        assert [record.phase for record in pruner.history] == ["regularization"]
        assert not (tmp_path / "rounds").exists()

    def test_training_without_end_stops_by_it(self, tmp_path):
        found = run(tmp_path, max_epochs=-1)
        assert found.monitor.verdict == COLLAPSE
        assert found.trainer.current_epoch == 6
        assert holds(found, 3)


@pytest.mark.parametrize("value", ["Collapse", "regularization", True])
def test_an_unknown_phase_to_stop_on_is_refused(value):
    with pytest.raises(
        ValueError, match=re.escape(f"stop_on must be 'collapse', 'compression' or None, got {value!r}.")
    ):
        PQIMonitor(stop_on=value)


def test_a_verdict_in_the_last_round_outlives_the_process(tmp_path):
    """Resumed from the file of the last epoch, Lightning trains nothing and calls no hook of training."""
    scores = COLLAPSING[:6]
    whole = run(tmp_path / "whole", module=Scripted(scores), max_epochs=6)
    assert whole.monitor.verdict == COLLAPSE
    saver = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    first = run(
        tmp_path / "first", saver, module=Scripted(scores), max_epochs=6, monitor=monitor_of(restore=False),
        pruner=pruner_of(save_rounds=True), enable_checkpointing=True,
    )  # fmt: skip
    assert first.pruner.current_round() == 5
    second = run(tmp_path / "second", module=Scripted(scores), max_epochs=6, ckpt_path=tmp_path / "last.ckpt")
    assert second.monitor.verdict == COLLAPSE
    assert second.pruner.history.restored.round == COLLAPSE.restore
    assert second.pruner.remaining == whole.pruner.remaining
    assert same(second.module.state_dict(), whole.module.state_dict())
