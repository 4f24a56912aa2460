"""The report: the same rounds as Markdown and in the terminal."""

import re

import pytest

from lightning_sap import RoundRecord
from lightning_sap.report import markdown, show


def records(restored=None, saved=()):
    """Three rounds of 2000 weights, in one of which the metric is not known."""
    rounds = [(0, 1.0, 0.31234, 1500, "regularization"), (1, 0.25, 0.2, 1200, "compression"), (2, 0.1, 0.1, None, None)]
    return [
        RoundRecord(
            round, 4 * round, 4 * round + 3, left, {"w": left}, index, {"w": index}, pruned=pruned, phase=phase,
            weights=int(2000 * left), metrics={} if round == 1 else {"val_acc": 0.98766 - round / 10},
            path=f"rounds/sap-round-0{round}.ckpt" if round in saved else None, restored=round == restored,
        )
        for round, left, index, pruned, phase in rounds
    ]  # fmt: skip


TABLE = """\
| round | epochs | weights | remaining | PQ Index | pruned | phase | val_acc |
| --- | --- | --- | --- | --- | --- | --- | --- |
| 0 | 0–3 | 2,000 | 100.00 % | 0.3123 | 1,500 | regularization | 0.9877 |
| 1 | 4–7 | 500 | 25.00 % | 0.2000 | 1,200 | compression | – |
| 2 | 8–11 | 200 | 10.00 % | 0.1000 | – | – | 0.7877 |
"""


class TestMarkdown:
    def test_markdown_of_a_run_that_came_to_its_end(self):
        assert markdown(records(), metric="val_acc") == (
            TABLE + "\nThe module holds round 2: 10.00 % of the prunable weights."
        )

    def test_markdown_of_a_run_that_was_stopped_and_restored(self):
        found = markdown(records(restored=1, saved=(0, 1, 2)), metric="val_acc", verdict="Stopped after round 2: why.")
        assert found == TABLE + (
            "\nStopped after round 2: why."
            "\n\nThe module holds round 1 again: 25.00 % of the prunable weights."
            "\n\n3 rounds are saved, that of the module as rounds/sap-round-01.ckpt."
        )

    def test_markdown_with_a_metric_that_no_round_knows(self):
        lines = markdown(records(), metric="unknown").splitlines()
        assert [line.split(" | ")[-1] for line in lines[:5]] == ["unknown |", "--- |", "– |", "– |", "– |"]

    def test_markdown_without_a_metric_has_no_column_for_it(self):
        assert markdown(records()).splitlines()[0] == (
            "| round | epochs | weights | remaining | PQ Index | pruned | phase |"
        )

    def test_markdown_of_no_rounds_is_refused(self):
        with pytest.raises(ValueError, match=re.escape("There is nothing to report yet: no round has ended.")):
            markdown([])


class TestShow:
    def test_show_prints_the_table_and_the_same_lines(self, capsys, monkeypatch):
        pytest.importorskip("rich")
        monkeypatch.setenv("COLUMNS", "120")
        show(records(restored=1, saved=(1,)), metric="val_acc", verdict="Stopped after round 2: [why].")
        printed = capsys.readouterr().out
        cells = [re.findall(r"[^\s│┃┏┓┡┩└┘─━┳╇┴]+", line) for line in printed.splitlines()]
        assert ["1", "4–7", "500", "25.00", "%", "0.2000", "1,200", "compression", "–"] in cells
        assert ["2", "8–11", "200", "10.00", "%", "0.1000", "–", "–", "0.7877"] in cells
        assert printed.splitlines()[-3:] == [
            "Stopped after round 2: [why].",
            "The module holds round 1 again: 25.00 % of the prunable weights.",
            "1 round is saved, that of the module as rounds/sap-round-01.ckpt.",
        ]
