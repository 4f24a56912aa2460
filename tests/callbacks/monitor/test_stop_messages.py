"""What PQIMonitor says when it stops, reports, or finds nothing to judge."""

import re

import pytest
from helpers import Net, Watch, fit, loader, quiet_trainer
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.loggers import TensorBoardLogger
from stopping import LINE, STEADY, TURNING, Scripted, lines, monitor_of, pruner_of, run

from lightning_sap import PQIMonitor, SAPCallback

pytestmark = pytest.mark.slow  # whole fits, many of them


class TestVerbose:
    def test_a_change_of_phase_and_the_report_are_said(self, tmp_path, caplog, capsys):
        pytest.importorskip("rich")
        options = {"module": Scripted(STEADY, TURNING), "pruner": pruner_of(0.1), "max_epochs": 11}
        with caplog.at_level("INFO"):
            found = run(tmp_path, monitor=monitor_of(verbose=True), **options)
        assert lines(caplog, "pqi:")[1:] == [  # the first is about the mode
            "pqi: compression after round 8. Since round 5 the index rises: 0.0408 after 0.0245 at its lowest."
        ]
        printed = capsys.readouterr().out
        assert "Rounds" in printed
        assert f"11 rounds are saved, that of the module as {found.pruner.history[10].path}." in printed

    def test_only_the_verdict_is_said_unless_verbose(self, tmp_path, caplog, capsys):
        with caplog.at_level("INFO"):
            run(tmp_path)
        assert lines(caplog, "pqi:")[1] == LINE  # the first is about the mode
        assert len(lines(caplog, "pqi:")) == 3
        assert capsys.readouterr().out == ""

    def test_without_rich_the_report_is_logged_as_markdown(self, tmp_path, caplog, capsys, monkeypatch):
        import lightning_sap.callbacks.monitor.messages as room

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
        *_, text = texts = file.Tensors("pqi/report/text_summary")
        rounds, _ = found.monitor.report().split("\n\n" + found.pruner.plan().head)
        assert text.tensor_proto.string_val[0].decode() == rounds
        assert text.step == found.trainer.global_step
        assert [len(file.Images(f"pqi/{kind}")) for kind in ("rounds", "layers")] == [len(texts)] * 2

    def test_report_before_any_fit_is_refused(self):
        with pytest.raises(ValueError, match=re.escape("There is nothing to report yet: no round has ended.")):
            PQIMonitor().report()


class TestWithoutAPruner:
    WARNING = (
        "pqi: no callback of lightning-sap prunes in this Trainer, so PQIMonitor only logs and never stops. Add "
        "SAPCallback or PruningCallback, or say stop_on=None (now 'collapse')."
    )

    @pytest.mark.filterwarnings("ignore:.*named tensors")
    @pytest.mark.parametrize("other", ["dense", "ModelPruning", "held masks"])
    def test_monitor_without_a_pruner_warns_and_never_stops(self, tmp_path, other):
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

    def test_monitor_that_only_logs_does_not_warn(self, recwarn):
        fit(Net(), PQIMonitor(stop_on=None))
        assert not [w for w in recwarn if "never stops" in str(w.message)]

    def test_monitor_does_not_warn_in_evaluation(self, recwarn):
        quiet_trainer(PQIMonitor()).validate(Net(), loader(), verbose=False)
        assert not [w for w in recwarn if "never stops" in str(w.message)]
