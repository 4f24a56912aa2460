"""What a monitor shows of a search: rounds taken back, the judged metric and its yardstick."""

import pytest
from helpers import loader, quiet_trainer
from searching import Scored, searching

from lightning_sap import PQIMonitor, RoundRecord
from lightning_sap.callbacks.monitor.curve import with_verdicts

BACK = [0.9, 0.5, 0.9, 0.9]  # by epoch: the second round is far from sound


def run(scores=BACK, pruner=None, epochs=None, **options):
    monitor = PQIMonitor(verbose=False, **options)
    trainer = quiet_trainer(pruner or searching(), monitor, max_epochs=epochs or len(scores), num_sanity_val_steps=0)
    trainer.fit(Scored(scores), loader(), loader())
    return monitor


def judged(sound=(True, False, False, True), back=(2,), left=(1.0, 0.5, 0.5, 0.7)):
    """Records of four rounds that were judged by `score`."""
    return [
        RoundRecord(
            t, t, t, left[t], {}, 0.2, {}, metrics={"score": 0.9 - t / 100, "other": 0.5}, phase="compression",
            taken_back=t in back, sound=sound[t], metric=0.9 - t / 100, yardstick=0.9, bound=0.89,
        )
        for t in range(4)
    ]  # fmt: skip


def rows(metrics=(None, None, None, None)):
    return [
        {"round": t, "epoch": t, "phase": "compression", "metric": metric, "pqi": 0.2}
        for t, metric in enumerate(metrics)
    ]


class TestWithVerdicts:
    def test_without_a_metric_of_its_own_the_judged_one_is_shown(self):
        merged, name = with_verdicts(rows(), judged(), None)
        assert name == "score"
        assert [row["metric"] for row in merged] == [0.9, 0.89, 0.88, 0.87]
        assert {(row["yardstick"], row["bound"]) for row in merged} == {(0.9, 0.89)}

    def test_another_metric_has_no_yardstick(self):
        merged, name = with_verdicts(rows((0.5,) * 4), judged(), "other")
        assert (name, [row["metric"] for row in merged]) == ("other", [0.5] * 4)
        assert not any("yardstick" in row or "bound" in row for row in merged)

    def test_near_misses_under_the_same_masks_are_taken_back_with_the_round_after_them(self):
        merged, _ = with_verdicts(rows(), judged(), None)
        assert [row["taken_back"] for row in merged] == [False, True, True, False]
        assert [row["phase"] for row in merged] == ["compression", None, None, "compression"]

    def test_a_near_miss_that_becomes_sound_is_built_on(self):
        merged, _ = with_verdicts(rows(), judged(sound=(True, False, True, True), back=()), None)
        assert [row["taken_back"] for row in merged] == [False] * 4
        assert [row["phase"] for row in merged] == ["compression", None, "compression", "compression"]

    def test_dense_rounds_that_missed_the_reference_are_not_taken_back_with_a_later_one(self):
        records = judged(sound=(False, False, False, True), back=(1,), left=(1.0, 1.0, 0.8, 0.7))
        merged, _ = with_verdicts(rows(), records, None)
        assert [row["taken_back"] for row in merged] == [False, True, False, False]

    def test_without_records_nothing_is_added_and_nothing_changed(self):
        before = rows()
        assert with_verdicts(before, [], None) == (rows(), None)
        with_verdicts(before, judged(), None)
        assert before == rows()


class TestFits:
    def test_report_and_figure_of_a_search_without_a_metric_of_the_monitor(self):
        pytest.importorskip("matplotlib")
        monitor = run()
        lines = monitor.report().partition(" weights are prunable")[0].splitlines()[:-2]
        table = [line.split(" | ") for line in lines if line.startswith("| ")][2:]
        assert [line[-2] == "taken back" for line in table] == [False, True, False, False]
        assert [line[-1] for line in table] == ["0.9000 |", "0.5000 |", "0.9000 |", "0.9000 |"]
        end = "as good as the yardstick of 0.9 (sound down to 0.89). Rounds taken back: 1 of 4."
        assert lines[-1].endswith(end)
        panel = monitor.plot().axes[2]
        assert panel.get_ylabel() == "val_acc"
        assert [list(line.get_xdata()) for line in panel.lines[:2]] == [[0, 2, 3], [1]]
        assert [text.get_text() for text in panel.texts] == ["↓ 0.5"]

    def test_rounds_taken_back_inside_an_epoch_have_rows(self):
        class ByStep(Scored):
            def validation_step(self, batch, batch_idx):
                self.log("val_acc", 0.5 if self.trainer.global_step == 5 else 0.9)  # the end of round 1

        monitor = PQIMonitor(verbose=False, stop_on=None)
        options = {"max_epochs": 1, "val_check_interval": 1, "num_sanity_val_steps": 0}
        trainer = quiet_trainer(pruner := searching(every_n_steps=2), monitor, **options)
        trainer.fit(ByStep(), loader(96), loader())  # 12 steps: rounds of 3, 2, 2, 2 and 3
        assert [record.taken_back for record in pruner.history][:3] == [False, True, False]
        assert [row["round"] for row in monitor.rows()] == [record.round for record in pruner.history]
        assert monitor.plot().axes[0].lines[1].get_xdata().tolist() == [1]

    def test_the_phase_of_a_round_that_is_taken_back_is_not_told(self):
        monitor = run(monitor="val_acc", patience=1)
        assert [row["phase"] for row in monitor.rows()] == ["regularization"] * 4
        assert monitor.verdict is None
