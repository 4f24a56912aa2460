"""The figure of the rounds: what is drawn, and where."""

import builtins
import re

import pytest

from lightning_sap.plot import plot_layers, plot_rounds

pytest.importorskip("matplotlib")


def rows(rounds=4, metric=True):
    return [
        {
            "round": t, "epoch": 3 * t, "pqi": 0.2 + 0.01 * t, "layer_mean": 0.3 - 0.01 * t, "remaining": 0.5**t,
            "metric": 0.9 - 0.1 * t if metric else None,
        }
        for t in range(rounds)
    ]  # fmt: skip


PHASES = ["regularization", "regularization", "compression", "collapse"]


def with_phases(phases=PHASES):
    return [{**row, "phase": phase} for row, phase in zip(rows(len(phases)), phases, strict=True)]


def spans(panel):
    """From where to where each phase is shaded, and how."""
    from matplotlib.colors import to_hex

    found = [(*patch.get_extents().get_points()[:, 0], patch) for patch in panel.patches]
    to_data = panel.transData.inverted()
    return [
        (
            *(round(float(to_data.transform((x, 0))[0]), 6) for x in (left, right)),
            to_hex(p.get_facecolor()),
            p.get_hatch(),
        )
        for left, right, p in found
    ]


def marks(panel):
    """Rounds of the vertical lines by their style."""
    return {line.get_linestyle(): line.get_xdata()[0] for line in panel.lines if len(set(line.get_xdata())) == 1}


def above(figure):
    """What the legend of the whole figure says."""
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def data(axes, line=0):
    x, y = axes.lines[line].get_data()
    return list(x), list(y)


class TestPlotRounds:
    def test_plot_rounds_draws_index_remaining_and_metric(self):
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

    def test_plot_rounds_of_one_round(self, tmp_path):
        figure = plot_rounds(rows(1), metric="val_acc")
        figure.savefig(tmp_path / "one.png")
        assert (tmp_path / "one.png").stat().st_size > 1000

    def test_plot_rounds_changes_no_rows(self):
        import matplotlib.pyplot

        some, before = rows(), rows()
        plot_rounds(some, metric="val_acc")
        assert some == before
        assert matplotlib.pyplot.get_fignums() == []

    def test_plot_rounds_of_nothing_is_refused(self):
        with pytest.raises(ValueError, match=re.escape("There is nothing to plot yet: no epoch has ended.")):
            plot_rounds([])

    def test_without_matplotlib_it_says_what_to_install(self, monkeypatch):
        original = builtins.__import__

        def missing(name, *arguments, **options):
            if name.startswith("matplotlib"):
                raise ModuleNotFoundError(name)
            return original(name, *arguments, **options)

        monkeypatch.setattr(builtins, "__import__", missing)
        with pytest.raises(ModuleNotFoundError, match=r"needs matplotlib: pip install matplotlib\."):
            plot_rounds(rows())


class TestPhases:
    def test_phases_are_shaded_in_every_panel_around_their_rounds(self):
        for panel in plot_rounds(with_phases(), metric="val_acc").axes:
            assert spans(panel) == [
                (-0.5, 1.5, "#56b4e9", ""), (1.5, 2.5, "#e69f00", ".."), (2.5, 3.5, "#888888", "//"),
            ]  # fmt: skip

    def test_the_legend_names_them_once(self):
        assert above(plot_rounds(with_phases())) == ["regularization", "compression", "collapse"]
        again = ["regularization", "compression", "regularization", "compression"]
        assert above(plot_rounds(with_phases(again))) == ["regularization", "compression"]
        assert len(spans(plot_rounds(with_phases(again)).axes[0])) == 4

    def test_a_round_without_a_phase_is_not_shaded(self):
        figure = plot_rounds(with_phases([None, "compression", None, "collapse"]))
        assert [span[:2] for span in spans(figure.axes[0])] == [(0.5, 1.5), (2.5, 3.5)]

    def test_without_phases_there_are_neither_spans_nor_legend(self):
        figure = plot_rounds(rows())
        assert (spans(figure.axes[0]), above(figure)) == ([], [])

    def test_stop_and_return_are_lines_in_every_panel(self):
        figure = plot_rounds(with_phases(), metric="val_acc", stopped=3, restored=1)
        assert [marks(panel) for panel in figure.axes] == [{"--": 3, ":": 1}] * 3
        assert above(figure) == ["regularization", "compression", "collapse", "stopped", "restored"]

    def test_a_stop_without_return(self):
        figure = plot_rounds(with_phases(), stopped=3)
        assert [marks(panel) for panel in figure.axes] == [{"--": 3}] * 2
        assert "restored" not in above(figure)

    def test_the_legend_of_the_curves_names_only_curves(self):
        panel = plot_rounds(with_phases(), stopped=3, restored=1).axes[0]
        assert [text.get_text() for text in panel.get_legend().get_texts()] == ["all weights", "mean of the layers"]


YARDSTICKS = [0.9, 0.9, 0.95, 0.95]


def searched(back=(2,)):
    """Four rounds that were judged, of which some were taken back."""
    return [
        {**row, "taken_back": row["round"] in back, "yardstick": yardstick, "bound": yardstick - 0.05}
        for row, yardstick in zip(rows(), YARDSTICKS, strict=True)
    ]


class TestTolerance:
    @pytest.mark.parametrize("dark", [False, True])
    def test_rounds_taken_back_are_hollow_beside_the_curve(self, dark):
        from matplotlib.colors import to_hex

        figure = plot_rounds(searched(), metric="val_acc", dark=dark)
        for panel, key, line in zip(figure.axes, ("pqi", "remaining", "metric"), (1, 1, 1), strict=True):
            values = [row[key] for row in rows()]
            assert data(panel) == ([0, 1, 3], [values[0], values[1], values[3]])
            assert data(panel, line) == ([2], [values[2]])
            hollow = panel.lines[line]
            assert hollow.get_linestyle() == "None"
            assert to_hex(hollow.get_markerfacecolor()) == to_hex(panel.get_facecolor())
            assert to_hex(hollow.get_markeredgecolor()) == to_hex(panel.lines[0].get_color())
        assert above(figure) == ["taken back"]
        assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
            "all weights", "mean of the layers",
        ]  # fmt: skip

    def test_the_yardstick_is_a_line_and_the_tolerance_a_band_below(self):
        panel = plot_rounds(searched(), metric="val_acc").axes[2]
        line = panel.lines[2]
        edges = [-0.5, 0.5, 0.5, 1.5, 1.5, 2.5, 2.5, 3.5]
        held = [0.9, 0.9, 0.9, 0.9, 0.95, 0.95, 0.95, 0.95]
        assert (list(line.get_xdata()), list(line.get_ydata()), line.get_label()) == (edges, held, "yardstick")
        [band] = panel.collections
        corners = {(float(x), round(float(y), 9)) for x, y in band.get_paths()[0].vertices}
        bound = [0.85, 0.85, 0.85, 0.85, 0.9, 0.9, 0.9, 0.9]
        assert corners == {*zip(edges, held, strict=True), *zip(edges, bound, strict=True)}
        assert {text.get_text() for text in panel.get_legend().get_texts()} == {"yardstick", "tolerance"}

    def test_rounds_that_were_not_judged_are_a_gap_in_the_band(self):
        some = searched()
        some[1] |= {"yardstick": None, "bound": None}
        drawn = plot_rounds(some, metric="val_acc").axes[2].lines[2].get_ydata()
        assert [value != value for value in drawn] == [False, False, True, True, False, False, False, False]

    @pytest.mark.parametrize(("sign", "written", "edge"), [(1, "↓ 0.2", 0), (-1, "↑ -0.2", 1)])
    def test_what_was_taken_back_far_beyond_the_band_is_a_number_at_the_edge(self, sign, written, edge):
        metrics = [0.9, 0.88, 0.2, 0.94]  # the third was taken back; the band reaches from 0.85 to 0.95
        some = [{**row, "metric": sign * metric} for row, metric in zip(searched(), metrics, strict=True)]
        for row in some:
            row |= {"yardstick": sign * row["yardstick"], "bound": sign * row["bound"]}
        panel = plot_rounds(some, metric="val_acc").axes[2]
        assert sorted(sign * limit for limit in panel.get_ylim()) == pytest.approx([0.8, 1.0])
        assert [(text.get_text(), *text.get_position()) for text in panel.texts] == [(written, 2, edge)]

    def test_a_near_miss_that_was_taken_back_is_drawn_where_it_is(self):
        some = [{**row, "metric": metric} for row, metric in zip(searched(), [0.9, 0.88, 0.83, 0.94], strict=True)]
        panel = plot_rounds(some, metric="val_acc").axes[2]
        assert len(panel.texts) == 0
        assert panel.get_ylim()[0] < 0.83

    def test_a_drop_of_nothing_can_be_drawn(self, tmp_path):
        some = [{**row, "metric": 0.9, "yardstick": 0.9, "bound": 0.9} for row in searched()]
        plot_rounds(some, metric="val_acc").savefig(tmp_path / "none.png")

    def test_without_a_tolerance_nothing_is_hollow_and_there_is_no_band(self):
        figure = plot_rounds(rows(), metric="val_acc")
        assert [len(panel.lines) for panel in figure.axes] == [2, 1, 1]
        assert len(figure.axes[2].collections) == 0
        assert figure.axes[2].get_legend() is None


def layers(shares=((1.0, 0.5, 0.25), (1.0, 0.1, 0.0))):
    """Two layers over three rounds; of the second none is left in the end."""
    return [
        {
            "round": t, "epoch": t, "layers": {"a": 0.1 + 0.1 * t, "b": 0.3},
            "layers_remaining": dict(zip("ab", left, strict=True)),
        }
        for t, left in enumerate(zip(*shares, strict=True))
    ]  # fmt: skip


class TestPlotLayers:
    def test_values_of_each_parameter_in_each_round(self):
        index, left, *bars = plot_layers(layers()).axes
        (above, below) = (panel.collections[0] for panel in (index, left))
        assert above.get_array().round(9).tolist() == [[0.1, 0.2, 0.3], [0.3, 0.3, 0.3]]
        assert below.get_array().tolist() == [[100.0, 50.0, 25.0], [100.0, 10.0, 0.0]]
        assert [bar.get_ylabel() for bar in bars] == ["PQ Index", "remaining weights (%)"]
        assert [panel.get_title() for panel in (index, left)] == ["PQ Index", "remaining weights"]
        assert left.get_xlabel() == "round (number of prunings)"

    def test_the_rounds_stand_in_the_middle_of_their_cells_and_the_first_parameter_on_top(self):
        for panel in plot_layers(layers()).axes[:2]:
            corners = panel.collections[0].get_coordinates()
            assert corners[0, :, 0].tolist() == [-0.5, 0.5, 1.5, 2.5]
            assert [text.get_text() for text in panel.get_yticklabels()] == ["a", "b"]
            assert list(panel.get_yticks()) == [0.5, 1.5]
            assert panel.yaxis_inverted()

    def test_shares_are_told_apart_over_many_decades_and_none_left_is_grey(self, tmp_path):
        from matplotlib.colors import LogNorm, to_hex

        figure = plot_layers(layers(((1.0, 0.5, 0.25), (1.0, 0.001, 0.0))))
        left = figure.axes[1]
        mesh = left.collections[0]
        assert isinstance(mesh.norm, LogNorm)
        assert (mesh.norm.vmin, mesh.norm.vmax) == (0.1, 100.0)
        figure.savefig(tmp_path / "layers.png")
        assert mesh.get_facecolors()[-1][3] == 0  # nothing is drawn, and so what is behind is seen
        assert to_hex(left.get_facecolor()) == "#b0b0b0"

    def test_plot_layers_where_nothing_is_pruned(self, tmp_path):
        figure = plot_layers(layers(((1.0, 1.0, 1.0), (1.0, 1.0, 1.0))))
        figure.savefig(tmp_path / "dense.png")
        assert figure.axes[1].collections[0].norm.vmax == 100.0

    def test_a_parameter_that_joins_is_a_gap_before(self):
        some = layers()
        del some[0]["layers"]["b"], some[0]["layers_remaining"]["b"]
        values = plot_layers(some).axes[0].collections[0].get_array()
        assert [value != value or value is None for value in values.filled(float("nan"))[1].tolist()] == [
            True, False, False,
        ]  # fmt: skip

    def test_over_the_epochs_where_there_are_no_rounds(self):
        figure = plot_layers([{**row, "round": None, "epoch": 5 + row["epoch"]} for row in layers()])
        assert figure.axes[1].get_xlabel() == "epoch"
        assert figure.axes[0].collections[0].get_coordinates()[0, :, 0].tolist() == [4.5, 5.5, 6.5, 7.5]

    def test_plot_layers_of_nothing_is_refused(self):
        with pytest.raises(ValueError, match=re.escape("There is nothing to plot yet: no epoch has ended.")):
            plot_layers([])

    def test_plot_layers_changes_no_layers(self):
        some = layers()
        plot_layers(some)
        assert some == layers()


class TestDark:
    @pytest.mark.parametrize(("dark", "ink", "paper"), [(False, "#222222", "#ffffff"), (True, "#dddddd", "#161616")])
    @pytest.mark.parametrize(
        "draw",
        [lambda dark: plot_rounds(with_phases(), stopped=3, dark=dark), lambda dark: plot_layers(layers(), dark=dark)],
    )
    def test_dark_theme_changes_ink_and_paper(self, draw, dark, ink, paper):
        from matplotlib.colors import to_hex

        figure = draw(dark)
        panel = figure.axes[0]
        assert to_hex(figure.get_facecolor()) == paper
        texts = [*panel.get_xticklabels(), *panel.get_yticklabels(), panel.yaxis.label, figure.axes[1].xaxis.label]
        assert {to_hex(text.get_color()) for text in texts} == {ink}
        assert to_hex(panel.spines["left"].get_edgecolor()) == ink

    def test_dark_theme_changes_curves_and_lines(self):
        from matplotlib.colors import to_hex

        for dark, colors in ((False, ["#0072b2", "#56b4e9", "#222222"]), (True, ["#56b4e9", "#f0e442", "#dddddd"])):
            panel = plot_rounds(with_phases(), stopped=3, dark=dark).axes[0]
            assert [to_hex(line.get_color()) for line in panel.lines] == colors

    def test_dark_theme_leaves_the_theme_of_others(self):
        import matplotlib

        before = dict(matplotlib.rcParams)
        plot_rounds(rows(), dark=True)
        plot_layers(layers(), dark=True)
        assert dict(matplotlib.rcParams) == before
