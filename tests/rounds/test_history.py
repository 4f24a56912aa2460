"""History: the rounds so far, as rows, as a file, and the best of them."""

import csv
import errno
import os
import re
from dataclasses import replace

import pytest
from helpers import BATCHES, Net, Watch, fit, loader

from lightning_sap import FixedFraction, History, PQIMonitor, PruningCallback, RoundRecord, pq_index


def record(round, remaining, **metrics):
    return RoundRecord(round, 2 * round, 2 * round + 1, remaining, {"w": remaining}, 0.2, {"w": 0.3}, metrics=metrics)


@pytest.fixture
def history():
    scores = [(1.0, 0.95), (0.5, 0.97), (0.3, 0.965), (0.1, 0.5)]
    return History(record(t, left, acc=acc, loss=1 - acc) for t, (left, acc) in enumerate(scores))


class TestBest:
    @pytest.mark.parametrize(
        ("tolerance", "round"), [(0.0, 1), (0.004, 1), (0.0051, 2), (0.02, 2), (0.46, 2), (0.471, 3), (9.0, 3)]
    )
    def test_best_is_the_sparsest_within_the_tolerance(self, history, tolerance, round):
        assert history.best(monitor="acc", tolerance=tolerance).round == round
        assert history.best(monitor="loss", mode="min", tolerance=tolerance).round == round

    def test_best_in_mode_min_takes_the_lowest(self, history):
        assert history.best(monitor="acc", mode="min").round == 3

    def test_best_passes_over_rounds_without_the_metric(self, history):
        history.append(record(4, 0.01))
        assert history.best(monitor="acc", tolerance=9.0).round == 3

    def test_best_of_equals_is_the_first(self):
        assert History([record(0, 0.5, acc=1.0), record(1, 0.5, acc=1.0)]).best("acc").round == 0

    def test_best_by_an_unknown_metric_lists_those_logged(self, history):
        message = "No round knows the metric 'val_acc'; those logged are ['acc', 'loss']."
        with pytest.raises(ValueError, match=re.escape(message)):
            history.best("val_acc")
        with pytest.raises(ValueError, match=re.escape("those logged are [].")):
            History().best("val_acc")

    def test_best_in_an_unknown_mode_is_refused(self, history):
        with pytest.raises(ValueError, match=re.escape("mode must be 'max' or 'min', got 'maximum'.")):
            history.best("acc", mode="maximum")


class TestSequence:
    def test_history_is_a_sequence_of_records(self, history):
        assert len(history) == 4
        assert [r.round for r in history] == [0, 1, 2, 3]
        assert history[-1].remaining == 0.1
        assert [r.round for r in history[1:3]] == [1, 2]
        assert "4 rounds" in repr(history)
        assert repr(History()) == "History(0 rounds, last None)"


class TestNotes:
    def test_note_is_added_to_the_record_of_that_round(self, history):
        before = list(history)
        noted = history.note(2, phase="collapse", reason="It is empty.")
        assert (noted.phase, noted.reason, noted.remaining) == ("collapse", "It is empty.", 0.3)
        assert history[2] is noted
        assert [history[i] for i in (0, 1, 3)] == [before[i] for i in (0, 1, 3)]
        assert before[2].phase is None

    def test_the_record_of_a_round_is_found_by_its_number(self, history):
        assert History(history[2:]).of_round(3) is history[3]

    @pytest.mark.parametrize("call", [lambda h: h.of_round(4), lambda h: h.note(4, phase="collapse")])
    def test_an_unknown_round_lists_those_that_ended(self, history, call):
        message = "There is no record of round 4; those that ended are [0, 1, 2, 3]."
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            call(history)

    def test_one_round_at_most_is_the_restored_one(self, history):
        assert history.restored is None
        history.mark_restored(1)
        assert history.restored is history[1]
        history.mark_restored(2)
        assert history.restored is history[2]
        assert [r.restored for r in history] == [False, False, True, False]


class TestRows:
    def test_rows_hold_the_index_right_after_a_pruning_by_parameter(self):
        row = RoundRecord(0, 0, 1, 1.0, {}, 0.2, {}, layers_pqi_pruned={"w": 0.1}).row()
        assert (row["pqi_pruned/w"], "layers_pqi_pruned" in row) == (0.1, False)

    def test_rows_are_one_flat_mapping_per_round(self, history):
        assert history.rows()[1] == {
            "acc": 0.97, "loss": 1 - 0.97, "round": 1, "first_epoch": 2, "last_epoch": 3, "remaining": 0.5, "pqi": 0.2,
            "pruned": None, "pqi_pruned": None, "lr": None, "seconds": None, "remaining/w": 0.5, "pqi/w": 0.3,
            "weights": None, "phase": None, "reason": None, "path": None, "restored": False,
            "first_step": None, "last_step": None, "unit": "epoch", "regrown": None, "taken_back": False,
            "sound": None, "metric": None, "yardstick": None, "bound": None, "opened": "",
        }  # fmt: skip

    def test_rows_keep_fields_beside_metrics_of_the_same_name(self):
        assert RoundRecord(3, 6, 7, 0.5, {}, 0.2, {}, metrics={"round": 99.0}).row()["round"] == 3

    def test_csv_file_of_a_history_holds_its_rows(self, history, tmp_path):
        history.append(replace(record(4, 0.05, late=1.0), path=str(tmp_path / "rounds" / "sap-round-004.ckpt")))
        history.to_csv(tmp_path / "history.csv")
        with open(tmp_path / "history.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert next(iter(rows[0])) == "round"
        assert [row["path"] for row in rows] == ["", "", "", "", os.path.join("rounds", "sap-round-004.ckpt")]
        assert [row["round"] for row in rows] == ["0", "1", "2", "3", "4"]
        assert [float(row["remaining"]) for row in rows] == [1.0, 0.5, 0.3, 0.1, 0.05]
        assert [row["acc"] for row in rows] == ["0.95", "0.97", "0.965", "0.5", ""]
        assert [row["late"] for row in rows] == ["", "", "", "", "1.0"]
        assert {row["pruned"] for row in rows} == {""}

    def test_csv_file_that_cannot_be_finished_leaves_the_one_before(self, history, tmp_path, monkeypatch):
        history.to_csv(tmp_path / "history.csv")
        before = (tmp_path / "history.csv").read_bytes()

        def full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        history.append(record(4, 0.05))
        with pytest.raises(OSError, match="No space left"):
            history.to_csv(tmp_path / "history.csv")
        assert os.listdir(tmp_path) == ["history.csv"]
        assert (tmp_path / "history.csv").read_bytes() == before

    def test_csv_file_may_be_a_pipe(self, history, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
        history.to_csv(tmp_path / "pipe")
        assert os.read(reader, 9) == b"round,acc"
        os.close(reader)
        assert os.listdir(tmp_path) == ["pipe"]

    def test_csv_file_of_no_rounds_has_a_header_alone(self, tmp_path):
        History().to_csv(tmp_path / "history.csv")
        assert (tmp_path / "history.csv").read_text().strip() == "round"


class TestOfAFit:
    def test_history_of_a_fit_has_every_field(self):
        pruner = PruningCallback(FixedFraction(0.5), rounds=2, every_n_epochs=2)
        losses, index, rates = [], [], []

        def look(trainer, module):
            losses.append(float(trainer.callback_metrics["val_loss"]))
            index.append(float(pq_index(module.net[0].weight[pruner.masks["net.0.weight"]])))
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

        fit(Net(), pruner, PQIMonitor(stop_on=None), Watch(on_train_epoch_end=look), val=loader(), max_epochs=6)
        history = pruner.history
        assert [r.round for r in history] == [0, 1, 2]
        assert [(r.first_epoch, r.last_epoch) for r in history] == [(0, 1), (2, 3), (4, 5)]
        assert [r.remaining for r in history] == [1.0, 0.5, 0.25]
        assert [r.layers_remaining["net.3.weight"] for r in history] == [1.0, 0.5, 0.25]
        assert [r.pruned for r in history] == [36, 18, None]
        assert [r.layers_pqi["net.0.weight"] for r in history] == pytest.approx(index[1::2])
        assert [r.metrics["val_loss"] for r in history] == losses[1::2]
        assert [r.metrics["sap/remaining"] for r in history] == [1.0, 0.5, 0.25]
        assert [r.metrics["pqi/global"] for r in history] == pytest.approx([r.pqi for r in history])
        assert [r.lr for r in history] == [0.1] * 3
        assert [r.seconds is not None and 0 <= r.seconds < 5 for r in history] == [True, True, False]
        assert history[0].pqi_pruned < history[0].pqi  # the smallest went: what is left is more even
        assert history[-1].pqi_pruned is None
        assert history.best("val_loss", "min", tolerance=1e9).round == 2

    def test_history_of_a_stopped_fit_closes_its_round(self):
        pruner = PruningCallback(FixedFraction(0.5), rounds=2, every_n_epochs=2)
        stop = Watch(on_train_epoch_end=lambda t, m: setattr(t, "should_stop", t.current_epoch == 2))
        with pytest.warns(UserWarning, match="not all prunings came"):
            trainer = fit(Net(), pruner, stop, max_epochs=6)
        assert trainer.global_step == 3 * BATCHES
        assert [(r.first_epoch, r.last_epoch, r.pruned) for r in pruner.history] == [(0, 1, 36), (2, 2, None)]
