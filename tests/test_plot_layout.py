"""The figures of the rounds as they are seen: nothing is cut off, nothing lies over another."""

from itertools import combinations

import pytest

from lightning_sap.plot import plot_layers, plot_rounds

pytest.importorskip("matplotlib")

WORDS = ["regularization", "compression", "collapse"]


def rows(rounds=6, left=0.5, **more):
    """Rounds in which that share of all weights, and less of the second layer, survives."""
    return [
        {
            "round": t, "epoch": t, "pqi": 0.2, "layer_mean": 0.3 - 0.01 * t, "remaining": left**t, "metric": 0.9,
            "phase": WORDS[3 * t // rounds], "layers": {"a": 0.1, "b": 0.2},
            "layers_remaining": {"a": left**t, "b": left ** (2 * t)}, **more,
        }
        for t in range(rounds)
    ]  # fmt: skip


def searched():
    """Rounds of a tolerance: the last was taken back, far below the band."""
    some = rows(taken_back=False, yardstick=0.9, bound=0.85)
    some[-1] |= {"taken_back": True, "metric": 0.2}
    return some


def drawn(figure):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()
    return figure


def ticks(axis):
    """The labels of an axis that are seen: what they say, and their boxes."""
    low, high = sorted(axis.get_view_interval())
    of = 0 if axis.axis_name == "x" else 1
    labels = [label for label in axis.get_ticklabels(which="both") if label.get_text() and label.get_visible()]
    labels = [label for label in labels if low <= label.get_position()[of] <= high]
    return {label.get_text(): label.get_window_extent() for label in labels}


# 0.99 leaves almost all of the weights, 0.25 a thousandth of them and a millionth of a layer
@pytest.mark.parametrize(("rounds", "left"), [(1, 1.0), (6, 0.99), (6, 0.8), (6, 0.6), (6, 0.4), (6, 0.25)])
@pytest.mark.parametrize("draw", [lambda some: plot_rounds(some, "val_acc"), plot_layers])
def test_no_label_of_an_axis_lies_over_another(draw, rounds, left):
    figure = drawn(draw(rows(rounds, left)))
    shares = figure.axes[-1 if draw is plot_layers else 1].yaxis
    assert 1 <= len(ticks(shares)) < 10
    for panel in figure.axes:
        for axis in (panel.xaxis, panel.yaxis):
            for (one, box), (other, beside) in combinations(ticks(axis).items(), 2):
                assert not box.overlaps(beside), (one, other)


def test_ticks_of_the_remaining_weights_are_closer_where_less_is_pruned():
    def said(left):
        figure = drawn(plot_rounds(rows(left=left)))
        return [*ticks(figure.axes[1].yaxis)]

    assert said(0.95) == ["80%", "90%", "100%"]
    assert said(0.61) == ["10%", "20%", "30%", "50%", "70%", "100%"]
    assert said(0.4) == ["1%", "2%", "5%", "10%", "20%", "50%", "100%"]
    assert said(0.25) == ["0.1%", "1%", "10%", "100%"]


def test_the_first_round_alone_has_a_whole_number_below_it():
    for figure in (plot_rounds(rows(1), "val_acc"), plot_layers(rows(1))):
        drawn(figure)
        panel = figure.axes[-1] if len(figure.axes) == 3 else figure.axes[1]
        assert [*ticks(panel.xaxis)] == ["0"]


def test_a_network_of_which_no_weight_is_left_can_be_drawn():
    assert "100%" in ticks(drawn(plot_rounds(rows(2, left=0.0), "val_acc")).axes[1].yaxis)


@pytest.mark.parametrize("some", [rows(), searched()])
def test_legends_are_inside_the_figure_and_over_no_panel(some):
    figure = drawn(plot_rounds(some, "val_acc", stopped=5, restored=3))
    width, height = figure.canvas.get_width_height()
    legends = [*figure.legends, *(panel.get_legend() for panel in figure.axes if panel.get_legend())]
    assert len(legends) == (3 if some[0].get("yardstick") else 2)
    for legend in legends:
        box = legend.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= width
        assert 0 <= box.y0 < box.y1 <= height
        assert not any(box.overlaps(panel.get_window_extent()) for panel in figure.axes)
    for one, other in combinations(legends, 2):
        assert not one.get_window_extent().overlaps(other.get_window_extent())


def test_no_panel_shows_more_rounds_than_there_were():
    for figure in (plot_rounds(rows(10), "val_acc"), plot_layers(rows(10))):
        assert {panel.get_xlim() for panel in figure.axes[: 3 if len(figure.axes) == 3 else 2]} == {(-0.5, 9.5)}


@pytest.mark.parametrize(("dark", "pale"), [(False, "#b2e2d5"), (True, "#1d4c3f")])
def test_the_band_has_one_colour_over_all_phases(dark, pale):
    from matplotlib.colors import to_hex

    panel = plot_rounds(searched(), "val_acc", dark=dark).axes[2]
    [band] = panel.collections
    assert (to_hex(band.get_facecolor()[0]), band.get_alpha()) == (pale, None)
    assert max(shade.get_zorder() for shade in panel.patches) < band.get_zorder()
    assert band.get_zorder() < min(line.get_zorder() for line in panel.lines)
