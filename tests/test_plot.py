"""The figure of the rounds: what is drawn, and where."""

import builtins
import re

import pytest

from lightning_sap.plot import plot_rounds

pytest.importorskip("matplotlib")


def rows(rounds=4, metric=True):
    return [
        {
            "round": t, "epoch": 3 * t, "pqi": 0.2 + 0.01 * t, "layer_mean": 0.3 - 0.01 * t, "remaining": 0.5**t,
            "metric": 0.9 - 0.1 * t if metric else None,
        }
        for t in range(rounds)
    ]  # fmt: skip


def data(axes, line=0):
    x, y = axes.lines[line].get_data()
    return list(x), list(y)


class TestPlotRounds:
    def test_index_remaining_and_metric_over_the_rounds(self):
        index, remaining, metric = plot_rounds(rows(), metric="val_acc").axes
        x = [0, 1, 2, 3]
        assert data(index) == (x, [row["pqi"] for row in rows()])
        assert data(index, 1) == (x, [row["layer_mean"] for row in rows()])
        assert data(remaining) == (x, [1.0, 0.5, 0.25, 0.125])
        assert data(metric) == (x, [row["metric"] for row in rows()])
        assert [a.get_ylabel() for a in (index, remaining, metric)] == ["PQ Index", "remaining weights", "val_acc"]
        assert remaining.get_yscale() == "log"
        assert metric.get_xlabel() == "round (number of prunings)"
        assert [text.get_text() for text in index.get_legend().get_texts()] == ["all weights", "mean of the layers"]

    def test_two_panels_without_a_metric(self):
        figure = plot_rounds(rows(metric=False))
        assert [axes.get_ylabel() for axes in figure.axes] == ["PQ Index", "remaining weights"]

    def test_over_the_epochs_where_there_are_no_rounds(self):
        index, remaining = plot_rounds([{**row, "round": None} for row in rows()]).axes
        assert data(index)[0] == [0, 3, 6, 9]
        assert remaining.get_xlabel() == "epoch"

    def test_a_round_without_the_metric_is_a_gap(self):
        some = rows()
        some[1]["metric"] = None
        y = data(plot_rounds(some, metric="val_acc").axes[2])[1]
        assert [value != value for value in y] == [False, True, False, False]

    def test_one_round(self, tmp_path):
        figure = plot_rounds(rows(1), metric="val_acc")
        figure.savefig(tmp_path / "one.png")
        assert (tmp_path / "one.png").stat().st_size > 1000

    def test_drawing_changes_nothing(self):
        import matplotlib.pyplot

        some, before = rows(), rows()
        plot_rounds(some, metric="val_acc")
        assert some == before
        assert matplotlib.pyplot.get_fignums() == []

    def test_nothing_to_plot(self):
        with pytest.raises(ValueError, match=re.escape("There is nothing to plot yet: no epoch has ended.")):
            plot_rounds([])

    def test_without_matplotlib_it_says_what_to_install(self, monkeypatch):
        original = builtins.__import__

        def missing(name, *arguments, **options):
            if name.startswith("matplotlib"):
                raise ModuleNotFoundError(name)
            return original(name, *arguments, **options)

        monkeypatch.setattr(builtins, "__import__", missing)
        with pytest.raises(ModuleNotFoundError, match=re.escape('pip install "lightning-sap[plot]"')):
            plot_rounds(rows())
