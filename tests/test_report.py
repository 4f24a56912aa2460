"""The report: the same rounds as Markdown and in the terminal."""

import math
import re
from dataclasses import replace

import pytest

from lightning_sap import RoundRecord
from lightning_sap.report import judged_by, markdown, show


def records(restored=None, saved=()):
    """Three rounds of 2000 weights, in one of which the metric is not known."""
    rounds = [(0, 1.0, 0.31234, 1500, "regularization"), (1, 0.25, 0.2, 1200, "compression"), (2, 0.1, 0.1, None, None)]
    return [
        RoundRecord(
            round, 4 * round, 4 * round + 3, left, {"w": left}, index, {"w": index}, pruned=pruned, phase=phase,
            weights=int(2000 * left), metrics={} if round == 1 else {"val_acc": 0.98766 - round / 10},
            path=f"rounds/sap-round-00{round}.ckpt" if round in saved else None, restored=round == restored,
        )
        for round, left, index, pruned, phase in rounds
    ]  # fmt: skip


TABLE = """\
| round | epochs | weights | remaining | PQ Index | pruned | phase | val_acc |
| ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |
| 0 | 0–3 | 2,000 | 100.00% | 0.3123 | 1,500 | regularization | 0.9877 |
| 1 | 4–7 | 500 | 25.00% | 0.2000 | 1,200 | compression | – |
| 2 | 8–11 | 200 | 10.00% | 0.1000 | – | – | 0.7877 |
"""


class TestMarkdown:
    def test_markdown_of_a_run_that_came_to_its_end(self):
        assert markdown(records(), metric="val_acc") == (
            TABLE + "\nThe module holds round 2: 10.00% of the prunable weights."
        )

    def test_markdown_of_a_run_that_was_stopped_and_restored(self):
        found = markdown(records(restored=1, saved=(0, 1, 2)), metric="val_acc", verdict="Stopped after round 2: why.")
        assert found == TABLE + (
            "\nStopped after round 2: why."
            "\n\nThe module holds round 1 again: 25.00% of the prunable weights."
            "\n\n3 rounds are saved, that of the module as rounds/sap-round-001.ckpt."
        )

    def test_markdown_with_a_metric_that_no_round_knows(self):
        lines = markdown(records(), metric="unknown").splitlines()
        assert [line.split(" | ")[-1] for line in lines[:5]] == ["unknown |", "---: |", "– |", "– |", "– |"]

    def test_markdown_without_a_metric_has_no_column_for_it(self):
        assert markdown(records()).splitlines()[0] == (
            "| round | epochs | weights | remaining | PQ Index | pruned | phase |"
        )

    @pytest.mark.parametrize("name", ["a|b", "a\nb", "val_acc[top5]"])
    def test_markdown_keeps_its_columns_whatever_the_metric_is_called(self, name):
        known = [replace(record, metrics={name: 0.5}, phase="off|on") for record in records()]
        lines = markdown(known, metric=name).splitlines()
        assert len(re.findall(r"(?<!\\)\|", lines[0])) == 9
        assert lines[0].endswith({"a|b": r"| a\|b |", "a\nb": "| a b |"}.get(name, "| val_acc[top5] |"))
        assert lines[2].endswith(r"| off\|on | 0.5000 |")

    @pytest.mark.parametrize(
        ("metric", "written"),
        [(0.8, "0.8000"), (97.25, "97.25"), (1234.0, "1234"), (2e-7, "2.000e-07"), (math.nan, "nan")],
    )
    def test_a_metric_has_four_digits(self, metric, written):
        known = [replace(record, metrics={"score": metric}) for record in records()]
        assert {line.split(" | ")[-1] for line in markdown(known, metric="score").splitlines()[2:5]} == {f"{written} |"}

    @pytest.mark.parametrize(
        ("opened", "written"),
        [([], "–"), (["net.0.weight"], "net.0"), (["a.in_proj_weight", "b.weight"], "a.in_proj_weight + 1")],
    )
    def test_what_was_open_is_named_by_the_first_of_its_modules(self, opened, written):
        known = [replace(record, opened=opened, regrown=3) for record in records()]
        assert markdown(known).splitlines()[4].endswith(f"| 3 | {written} | – |")

    def test_markdown_of_no_rounds_is_refused(self):
        with pytest.raises(ValueError, match=re.escape("There is nothing to report yet: no round has ended.")):
            markdown([])


def judged(restored=2, mode="max", last=0.5):
    """Five rounds of 1000 weights: dense, two sound ones, one that is taken back, and a last one that is not sound."""
    rounds = [(1.0, 0.9, 0.9), (0.5, 0.95, 0.95), (0.2, 0.9425, 0.95), (0.01, 0.5, 0.95), (0.1, last, 0.95)]
    sign = 1 if mode == "max" else -1
    return [
        RoundRecord(
            round, 2 * round, 2 * round + 1, left, {}, 0.25, {}, weights=int(1000 * left), phase="compression",
            metrics={"score": sign * metric, "test_score": 0.25}, taken_back=round == 3, restored=round == restored,
            sound=round < 3, metric=sign * metric, yardstick=sign * yardstick, bound=sign * (yardstick - 0.01),
        )
        for round, (left, metric, yardstick) in enumerate(rounds)
    ]  # fmt: skip


JUDGED = """\
| round | epochs | weights | remaining | PQ Index | pruned | phase | score |
| ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |
| 0 | 0–1 | 1,000 | 100.00% | 0.2500 | – | compression | 0.9000 |
| 1 | 2–3 | 500 | 50.00% | 0.2500 | – | compression | 0.9500 |
| 2 | 4–5 | 200 | 20.00% | 0.2500 | – | compression | 0.9425 |
| 3 | 6–7 | 10 | 1.00% | 0.2500 | – | taken back | 0.5000 |
| 4 | 8–9 | 100 | 10.00% | 0.2500 | – | unsound | 0.5000 |

The module holds round 2 again: 20.00% of the prunable weights.

"""


class TestTolerance:
    def test_rounds_taken_back_and_unsound_are_named_and_the_judged_metric_is_shown(self):
        assert markdown(judged()) == JUDGED + (
            "There score is 0.9425, 0.0075 below the yardstick of 0.95 (sound down to 0.94). Rounds taken back: 1 of 5."
        )

    def test_a_metric_that_is_better_when_smaller_is_sound_up_to_its_bound(self):
        assert markdown(judged(mode="min")).splitlines()[-1] == (
            "There score is -0.9425, 0.0075 above the yardstick of -0.95 (sound up to -0.94). "
            "Rounds taken back: 1 of 5."
        )

    def test_a_round_that_is_the_yardstick_is_as_good(self):
        assert markdown(judged(restored=1)).splitlines()[-1] == (
            "There score is 0.95, as good as the yardstick of 0.95 (sound down to 0.94). Rounds taken back: 1 of 5."
        )

    def test_a_module_that_holds_no_sound_round_is_said(self):
        assert markdown(judged(restored=None)).splitlines()[-1] == (
            "There score is 0.5, 0.45 below the yardstick of 0.95 (sound down to 0.94), and not sound. "
            "Rounds taken back: 1 of 5."
        )

    @pytest.mark.parametrize("last", [math.nan, math.inf])
    def test_a_metric_that_is_not_finite_is_not_subtracted(self, last):
        assert markdown(judged(restored=None, last=last)).splitlines()[-1] == (
            "Whether it keeps the tolerance is not known. Rounds taken back: 1 of 5."
        )

    def test_the_judged_metric_is_shown_once_and_another_beside_it(self):
        assert markdown(judged(), metric="score") == markdown(judged())
        header, _, dense, *_ = markdown(judged(), metric="test_score").splitlines()
        assert header.endswith("| score | test_score |")
        assert dense.endswith("| 0.9000 | 0.2500 |")

    def test_the_judged_metric_has_the_name_of_the_one_that_fits(self):
        rounds = judged(last=math.nan)
        assert judged_by(rounds) == "score"
        assert judged_by([replace(r, metrics={**r.metrics, "same": r.metric}) for r in rounds]) == "metric"
        assert judged_by([replace(r, metrics={}) for r in rounds]) == "metric"
        assert judged_by(records()) is None

    def test_a_round_that_was_not_judged_has_no_metric(self):
        rounds = judged()
        rounds[1] = replace(rounds[1], metrics={}, sound=None, metric=None, yardstick=None, bound=None)
        assert markdown(rounds).splitlines()[3].endswith("| compression | – |")


class TestShow:
    @pytest.mark.parametrize("name", ["acc[/x]", "val_acc[top5]", "[bold]acc", "acc\\[x]"])
    def test_show_prints_brackets_in_the_name_of_a_metric_as_they_are(self, capsys, monkeypatch, name):
        pytest.importorskip("rich")
        monkeypatch.setenv("COLUMNS", "120")
        show([replace(record, metrics={name: 0.5}, phase="[/off]") for record in records()], metric=name)
        printed = capsys.readouterr().out
        assert name in printed
        assert "[/off]" in printed

    @pytest.mark.parametrize("width", [60, 80])
    def test_show_cuts_nothing_off_where_the_table_is_too_wide(self, capsys, monkeypatch, width):
        pytest.importorskip("rich")
        monkeypatch.setenv("COLUMNS", str(width))
        opened = ["encoder.layers.11.self_attention.out_proj.weight"]
        show([replace(record, opened=opened, regrown=29_491) for record in records()], metric="val_acc")
        printed = capsys.readouterr().out
        assert "…" not in printed
        lines = [line.split("│")[1:-1] for line in printed.splitlines() if line.startswith("│")]
        columns = ["".join(cells).replace(" ", "") for cells in zip(*lines, strict=True)]
        assert columns[2] == "2,000500200"
        assert columns[7] == 3 * opened[0].removesuffix(".weight")
        assert columns[8] == "regularizationcompression–"

    def test_show_prints_the_table_and_the_same_lines(self, capsys, monkeypatch):
        pytest.importorskip("rich")
        monkeypatch.setenv("COLUMNS", "120")
        show(records(restored=1, saved=(1,)), metric="val_acc", verdict="Stopped after round 2: [why].")
        printed = capsys.readouterr().out
        cells = [re.findall(r"[^\s│┃┏┓┡┩└┘─━┳╇┴]+", line) for line in printed.splitlines()]
        assert ["1", "4–7", "500", "25.00%", "0.2000", "1,200", "compression", "–"] in cells
        assert ["2", "8–11", "200", "10.00%", "0.1000", "–", "–", "0.7877"] in cells
        assert printed.splitlines()[-3:] == [
            "Stopped after round 2: [why].",
            "The module holds round 1 again: 25.00% of the prunable weights.",
            "1 round is saved, that of the module as rounds/sap-round-001.ckpt.",
        ]
