"""Whether the monitored metric is better when larger or smaller: by its name, as given, and what contradicts it."""

import copy
import math

import pytest
from helpers import Crash, Net, crash_in, fit, half, loader
from lightning.pytorch.loggers import CSVLogger
from resuming import savers
from stopping import Scripted, Verdict, holds, lines, monitor_of, run, stays

from lightning_sap import PQIMonitor
from lightning_sap.rounds.metric_names import better

SMALLER = [
    "loss",
    "val_loss",
    "train/loss",
    "loss/val",
    "val_loss_epoch",
    "val_loss/dataloader_idx_0",
    "valLoss",
    "BCELoss",
    "valloss",
    "loss_2",
    "loss/box",
    "error",
    "top5_error",
    "error_rate",
    "WordErrorRate",
    "MeanSquaredError",
    "val_wer",
    "wer_epoch",
    "cer",
    "eer",
    "perplexity",
    "val_ppl",
    "ppl",
    "nll",
    "val/mse",
    "mae_mean",
    "RMSE",
    "fid",
    "FrechetInceptionDistance",
    "fid_score",
    "brier_score",
    "latency",
    "latency_ms",
    "distance",
    "KLDivergence",
    "kl_div",
    "cross_entropy",
    "false_positive_rate",
    "bits_per_dim",
    "neg_log_likelihood",
    "val_l1",
    "l2",
]
LARGER = [
    "val_acc",
    "val/acc_epoch",
    "Accuracy",
    "acc/dataloader_idx_1",
    "top1_acc",
    "MulticlassF1Score",
    "f1_macro",
    "auroc",
    "mAP",
    "mIoU",
    "val_bleu",
    "R2Score",
    "neg_mean_squared_error",
    "neg_log_loss",
    "log_likelihood",
    "loss_acc",
]
UNKNOWN = ["objective", "val_score", "error_free", "entropy", "sap/remaining", "epoch", "", "glossary", "lossless"]


class Losing(Scripted):
    """Logs a script under a name of one's own."""

    def __init__(self, name, script, every=1):
        super().__init__(script, every=every)
        self.key = name

    def validation_step(self, batch, batch_idx):
        self.log(self.key, self.now(self.scores))


class TestNames:
    @pytest.mark.parametrize(
        ("names", "mode"), [(SMALLER, "min"), (LARGER, "max"), (UNKNOWN, None)], ids=["smaller", "larger", "unknown"]
    )
    def test_mode_follows_the_words_of_a_name(self, names, mode):
        assert {name: better(name) for name in names} == dict.fromkeys(names, mode)

    @pytest.mark.parametrize(
        ("monitor", "given", "mode"),
        [
            ("val_loss", None, "min"),
            ("val_acc", None, "max"),
            ("objective", None, "max"),
            (None, None, "max"),
            ("val_loss", "max", "max"),
            ("val_acc", "min", "min"),
        ],
    )
    def test_mode_of_a_monitor_is_the_one_given_or_that_of_the_name(self, monitor, given, mode):
        assert PQIMonitor(monitor=monitor, mode=given).mode == mode

    def test_mode_of_a_copy_goes_by_the_name_too(self):
        assert copy.deepcopy(PQIMonitor(monitor="val_loss")).mode == "min"


class TestVerdicts:
    def test_a_loss_that_falls_from_a_bad_start_is_not_stopped_by_default(self, tmp_path):
        losses = (0.402, 0.359, 0.197, 0.21, 0.2, 0.195, 0.2, 0.21)
        found = run(tmp_path, module=Losing("val_loss", losses), monitor=monitor_of(monitor="val_loss"))
        assert stays(found)
        assert [record.phase for record in found.pruner.history] == ["regularization"] * 8

    def test_a_loss_that_explodes_puts_its_best_round_back_by_default(self, tmp_path):
        losses = (0.402, 0.359, 0.197, 2.5, 3.5, 4.0, 4.0, 4.0)
        found = run(tmp_path, module=Losing("val_loss", losses), monitor=monitor_of(monitor="val_loss"))
        reason = "Since round 3 the metric is far from its best: 3.5 after 0.197."
        assert found.monitor.verdict == Verdict("collapse", 4, reason, 2)
        assert holds(found, 2)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_a_metric_that_is_not_finite_in_one_round_ends_nothing(self, tmp_path, value):
        scores = (0.8, 0.9, value, 0.9, 0.9, value, 0.9, 0.9)
        found = run(tmp_path, module=Scripted(scores))
        assert stays(found)
        assert found.monitor.phase == "regularization"

    @pytest.mark.parametrize(("patience", "round"), [(1, 4), (2, 5), (3, 6)])
    def test_a_metric_that_stays_nan_for_patience_rounds_is_a_collapse(self, tmp_path, patience, round):
        scores = (0.8, 0.9, 0.9, 0.9) + (math.nan,) * 4
        found = run(tmp_path, module=Scripted(scores), monitor=monitor_of(patience=patience))
        assert found.monitor.verdict == Verdict("collapse", round, "Since round 4 the metric is nan.", 3)
        assert holds(found, 3)


class TestWhatIsSaid:
    def said(self, caplog, monitor, **options):
        caplog.clear()
        with caplog.at_level("INFO"):
            fit(Net(), monitor, half(), val=loader(), max_epochs=2, **options)
        return lines(caplog, "counts as better")

    def test_mode_by_the_name_is_said_once(self, caplog):
        assert self.said(caplog, monitor_of(monitor="val_loss")) == [
            "pqi: 'val_loss' counts as better when smaller (mode='min', by its name). Give mode='max' if it is better "
            "when larger."
        ]

    def test_mode_by_default_is_said_to_be_the_default(self, caplog):
        assert self.said(caplog, monitor_of(monitor="sap/remaining")) == [
            "pqi: 'sap/remaining' counts as better when larger (mode='max', the default, since its name does not say). "
            "Give mode='min' if it is better when smaller."
        ]

    @pytest.mark.parametrize("options", [{"monitor": None}, {"monitor": "val_loss", "mode": "min"}])
    def test_mode_is_not_said_where_it_is_given_or_there_is_no_metric(self, caplog, options):
        assert self.said(caplog, monitor_of(**options)) == []

    def test_mode_is_not_said_where_nothing_is_judged(self, caplog):
        with caplog.at_level("INFO"):
            fit(Net(), PQIMonitor(monitor="val_loss", stop_on=None), val=loader(), max_epochs=1)
        assert lines(caplog, "counts as better") == []


class TestContradictions:
    @pytest.mark.parametrize(
        ("key", "mode", "words"),
        [("val_loss", "max", ("larger", "smaller")), ("val_acc", "min", ("smaller", "larger"))],
    )
    def test_a_mode_that_the_name_contradicts_is_warned_of_once(self, key, mode, words):
        monitor = monitor_of(monitor=key, mode=mode, stop_on=None)
        with pytest.warns(UserWarning, match="its name says") as caught:
            fit(Scripted(), monitor, half(), val=loader())
        assert [str(w.message) for w in caught if "pqi:" in str(w.message)] == [
            f"pqi: mode={mode!r} says that {key!r} is better when {words[0]}, and its name says that it is better when "
            f"{words[1]}. With the wrong mode a sound run is stopped and its worst round put back: leave mode out, or "
            "give the metric another name."
        ]

    def dense(self, script, key="objective", mode=None, **options):
        monitor = monitor_of(monitor=key, mode=mode, stop_on=None)
        fit(Losing(key, script), monitor, half(every_n_epochs=4), val=loader(), max_epochs=8, **options)

    MESSAGE = (
        "pqi: in the dense round 'objective' only fell, from 0.9 to 0.6 in 4 validations, and mode='max' says that it "
        "is better when larger. Give mode='min' if it is better when smaller."
    )

    def test_a_metric_that_only_moves_against_its_mode_in_the_dense_round_is_warned_of_once(self):
        with pytest.warns(UserWarning, match="in the dense round") as caught:
            self.dense((0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2))
        assert [str(w.message) for w in caught if "pqi:" in str(w.message)] == [self.MESSAGE]

    def test_a_metric_that_rises_against_mode_min_is_warned_of(self):
        with pytest.warns(
            UserWarning, match=r"'objective' only rose, from 0\.5 to 0\.8 in 4 validations, and mode='min'"
        ):
            self.dense((0.5, 0.6, 0.7, 0.8), mode="min")

    def test_epochs_without_validation_hide_no_contradiction(self):
        monitor, module = monitor_of(monitor="objective", stop_on=None), Losing("objective", (0.9, 0.8, 0.7), every=2)
        with pytest.warns(UserWarning, match=r"only fell, from 0\.9 to 0\.7 in 3 validations"):
            fit(module, monitor, half(rounds=1, every_n_epochs=6), val=loader(), max_epochs=12,
                check_val_every_n_epoch=2)  # fmt: skip

    @pytest.mark.parametrize(
        ("script", "first", "last"), [((0.9, 0.5, 0.3), 0.9, 0.3), ((0.402, 0.359, 0.197), 0.402, 0.197)]
    )
    def test_rounds_of_one_epoch_are_judged_by_the_first_three(self, script, first, last):
        """Their dense round has one validation, and the run is stopped before long."""
        monitor = monitor_of(monitor="objective", stop_on=None)
        with pytest.warns(UserWarning, match="in the first rounds") as caught:
            fit(Losing("objective", (*script, 0.25, 0.2)), monitor, half(every_n_epochs=1), val=loader(), max_epochs=4)
        assert [str(w.message) for w in caught if "pqi:" in str(w.message)] == [
            f"pqi: in the first rounds 'objective' only fell, from {first} to {last} in 3 validations, and mode='max' "
            "says that it is better when larger. Give mode='min' if it is better when smaller."
        ]

    @pytest.mark.parametrize("script", [(0.3, 0.5, 0.9), (0.9, 0.95, 0.3), (0.9, 0.9, 0.9)])
    def test_rounds_of_one_epoch_that_contradict_nothing_are_not_warned_of(self, script):
        monitor = monitor_of(monitor="objective", stop_on=None)
        fit(Losing("objective", script), monitor, half(every_n_epochs=1), val=loader(), max_epochs=3)

    @pytest.mark.parametrize(
        ("script", "options"),
        [
            ((0.9, 0.8, 0.85, 0.6), {}),  # not only down
            ((0.9, 0.89, 0.88, 0.87), {}),  # less than a tenth
            ((0.9, 0.8, 0.7, 0.6), {"mode": "min"}),  # with the mode
            ((0.9, 0.8, 0.7, 0.6), {"key": "val_acc"}),  # the name is sure: it is the training that goes wrong
            ((0.9,) * 4 + (0.8, 0.7, 0.6, 0.5), {}),  # pruning does that
            ((0.9, 0.8, 0.7, 0.6), {"check_val_every_n_epoch": 2}),  # too few to tell
        ],
    )
    def test_a_metric_that_does_not_clearly_contradict_its_mode_is_not_warned_of(self, script, options):
        self.dense(script, **options)

    def test_a_contradiction_is_warned_of_across_a_resume(self, tmp_path):
        def start(*callbacks, **options):
            logger = CSVLogger(tmp_path)
            monitor = monitor_of(monitor="objective", stop_on=None)
            module = Losing("objective", (0.9, 0.8, 0.7, 0.6, 0.5))
            return fit(module, monitor, half(every_n_epochs=4), *callbacks, val=loader(), max_epochs=8, logger=logger,
                       enable_checkpointing=True, **options)  # fmt: skip

        with pytest.raises(Crash):
            start(crash_in("on_train_epoch_start", 3), *savers(tmp_path, alike=False))
        with pytest.warns(UserWarning, match="in the dense round") as caught:
            start(ckpt_path=tmp_path / "train-epoch-end" / "epoch=2.ckpt")
        assert [str(w.message) for w in caught if "pqi:" in str(w.message)] == [self.MESSAGE]
