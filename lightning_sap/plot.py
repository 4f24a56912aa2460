"""Pictures of a pruning run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with any colour vision, and in grey by markers and hatching
INDEX, MEAN, REMAINING, METRIC = "o", "v", "s", "^"
LIGHT = {INDEX: "#0072B2", MEAN: "#56B4E9", REMAINING: "#D55E00", METRIC: "#009E73"}
DARK = {INDEX: "#56B4E9", MEAN: "#F0E442", REMAINING: "#E69F00", METRIC: "#2CC9A0"}
INK, PAPER = {False: "#222222", True: "#DDDDDD"}, {False: "white", True: "#161616"}  # by whether it is dark
SHADES = {"regularization": ("#56B4E9", ""), "compression": ("#E69F00", ".."), "collapse": ("#888888", "//")}


def plot_rounds(
    rows: Sequence[dict[str, Any]],
    metric: str | None = None,
    *,
    stopped: int | None = None,
    restored: int | None = None,
    dark: bool = False,
) -> Figure:
    """Draw PQ Index, remaining weights and a metric over the rounds, one above the other, the phases shaded.

    Args:
        rows: One mapping per round with ``round`` (None: drawn over ``epoch``), ``pqi``, ``layer_mean``, ``remaining``,
            and, where they are known, ``metric`` and ``phase``; of a tolerance ``taken_back`` (drawn hollow, beside the
            curve), and ``yardstick`` and ``bound`` of the metric (a line, and the band of what is sound; a metric
            that was taken back and lies far beyond is a number at the edge).
        metric: Name of the metric; None: it is not drawn.
        stopped: The round after which training was stopped.
        restored: The round that was put back.
        dark: Light on dark.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If there are no rows.

    Example:
        >>> rows = [dict(round=t, epoch=t, pqi=0.2, layer_mean=0.3, remaining=0.5**t) for t in range(3)]
        >>> [axes.get_ylabel() for axes in plot_rounds(rows).axes]
        ['PQ Index', 'remaining weights']
    """
    with _figure(rows, dark) as new:
        figure = new(figsize=(5.6, 0.7 + 1.75 * (2 if metric is None else 3)))
        axes = figure.subplots(2 if metric is None else 3, 1, sharex=True)
        x, colors = _positions(rows), DARK if dark else LIGHT

        def draw(panel: Axes, key: str, marker: str, **style: Any) -> None:
            _draw(panel, rows, key, marker=marker, color=colors[marker], paper=PAPER[dark], **style)

        draw(axes[0], "pqi", INDEX, label="all weights")
        draw(axes[0], "layer_mean", MEAN, linestyle="--", label="mean of the layers")
        axes[0].set_ylabel("PQ Index")
        _explain(axes[0])
        draw(axes[1], "remaining", REMAINING)
        axes[1].set(ylabel="remaining weights", yscale="log")
        shares = [row["remaining"] for row in rows if row["remaining"] > 0] or [1.0]
        _shares(axes[1].yaxis, shares, lambda value, _: f"{100 * value:g}%")
        beyond = max((max(shares) / min(shares)) ** 0.05, 1.02)  # the first round alone is a range too
        axes[1].set_ylim(min(shares) / beyond, max(shares) * beyond)
        if metric is not None:
            draw(axes[2], "metric", METRIC)
            axes[2].set_ylabel(metric)
            _tolerate(axes[2], rows, INK[dark], colors[METRIC], PAPER[dark])
        for panel in axes:
            _shade(panel, rows, x)
            _mark(panel, INK[dark], {"stopped": stopped, "restored": restored})
            panel.set_xlim(x[0] - 0.5, x[-1] + 0.5)
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
        _label_rounds(axes[-1], rows)
        own = axes[0].get_legend_handles_labels()
        above = [pair for pair in zip(*axes[1].get_legend_handles_labels(), strict=True) if pair[1] not in own[1][:2]]
        if above:
            figure.legend(
                *zip(*above, strict=True), loc="outside upper center", ncols=min(len(above), 3), frameon=False
            )
    return figure


def plot_layers(rows: Sequence[dict[str, Any]], *, dark: bool = False) -> Figure:
    """Draw PQ Index and remaining weights of each parameter over the rounds as two heat maps.

    Args:
        rows: One mapping per round with ``round`` (None: drawn over ``epoch``), and by parameter ``layers`` (the
            indices) and ``layers_remaining`` (the fractions that survive).
        dark: Light on dark.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If there are no rows.

    Example:
        >>> rows = [dict(round=t, layers={"w": 0.2}, layers_remaining={"w": 0.5**t}) for t in range(3)]
        >>> [axes.get_title() for axes in plot_layers(rows).axes[:2]]
        ['PQ Index', 'remaining weights']
    """
    from matplotlib.colors import LogNorm

    with _figure(rows, dark) as new:
        names = list(dict.fromkeys(name for row in rows for name in row["layers"]))
        figure = new(figsize=(3.8 + 0.2 * len(rows), 1.6 + 2 * max(1.6, 0.22 * len(names))))
        axes = figure.subplots(2, 1, sharex=True)
        index = [[row["layers"].get(name, float("nan")) for row in rows] for name in names]
        left = [[100 * row["layers_remaining"].get(name, float("nan")) for row in rows] for name in names]
        least = min((value for line in left for value in line if value > 0), default=100.0)
        x = _positions(rows)
        edges = [x[0] - 0.5, *(value + 0.5 for value in x)]
        for panel, values, title, options in (
            (axes[0], index, "PQ Index", {}),
            (axes[1], left, "remaining weights", {"norm": LogNorm(min(least, 99.0), 100.0)}),
        ):
            image = panel.pcolormesh(edges, range(len(names) + 1), values, cmap="cividis", **options)
            panel.set_title(title)
            panel.set_yticks([i + 0.5 for i in range(len(names))], names)
            panel.invert_yaxis()
            panel.set_facecolor("#B0B0B0")  # what has no value, such as the logarithm of no weights
            bar = figure.colorbar(image, ax=panel, label="remaining weights (%)" if options else "PQ Index")
            if options:
                _shares(bar.ax.yaxis, [least, 100.0], "{x:g}")
        _label_rounds(axes[1], rows)
    return figure


@contextmanager
def _figure(rows: Sequence[dict[str, Any]], dark: bool) -> Iterator[Callable[..., Figure]]:
    """The class of a new figure; what is made of it inside has the colours of the theme."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Plotting needs matplotlib: pip install matplotlib.") from error
    if not rows:
        raise ValueError("There is nothing to plot yet: no epoch has ended.")
    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    paper = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    colors: dict[Any, Any] = dict.fromkeys(ink, INK[dark]) | dict.fromkeys(paper, PAPER[dark])
    with rc_context(colors | {"hatch.linewidth": 0.4}):
        yield lambda **options: Figure(layout="constrained", **options)


def _positions(rows: Sequence[dict[str, Any]]) -> list[int]:
    return [row["epoch"] if row["round"] is None else row["round"] for row in rows]


def _numbers(rows: Sequence[dict[str, Any]], key: str) -> list[float]:
    """The values of a key, NaN where they are not known."""
    return [float("nan") if row.get(key) is None else float(row[key]) for row in rows]


def _draw(panel: Axes, rows: Sequence[dict[str, Any]], key: str, *, paper: str, **style: Any) -> None:
    """A curve through the rounds that were built on; those taken back stand beside it, hollow."""
    for back in (False, True):
        some = [row for row in rows if bool(row.get("taken_back")) == back]
        label = "taken back" if key == "remaining" else None  # said once
        hollow: dict[str, Any] = {"linestyle": "none", "markerfacecolor": paper, "label": label} if back else {}
        if some:
            panel.plot(_positions(some), _numbers(some, key), **{**style, **hollow})


def _explain(panel: Axes) -> None:
    """The legend of a panel, above it: where the curves go is not known."""
    panel.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.1, frameon=False)


def _tolerate(panel: Axes, rows: Sequence[dict[str, Any]], ink: str, color: str, paper: str) -> None:
    """The yardstick of each round as a line, and from there to the worst sound value a band, over the phases."""
    from matplotlib.colors import to_rgb

    if all(row.get("yardstick") is None for row in rows):
        return
    edges = [place + side for place in _positions(rows) for side in (-0.5, 0.5)]
    line, bound = ([v for v in _numbers(rows, key) for _ in edges[:2]] for key in ("yardstick", "bound"))
    pale = [0.3 * full + 0.7 * none for full, none in zip(to_rgb(color), to_rgb(paper), strict=True)]
    panel.fill_between(edges, bound, line, color=pale, zorder=1.2, linewidth=0, label="tolerance")
    panel.plot(edges, line, color=ink, linestyle="-.", linewidth=1.2, label="yardstick")
    _explain(panel)
    _zoom(panel, rows, color)


def _zoom(panel: Axes, rows: Sequence[dict[str, Any]], color: str) -> None:
    """Show the band, and what was built on; what was taken back and lies far beyond is a number at the edge."""
    back = [row for row in rows if row.get("taken_back")]
    values = [*_numbers(rows, "yardstick"), *_numbers(rows, "bound")]
    values += _numbers([row for row in rows if row not in back], "metric")
    shown = [value for value in values if math.isfinite(value)]
    widths = [abs(a - b) for a, b in zip(_numbers(rows, "yardstick"), _numbers(rows, "bound"), strict=True)]
    pad = max(0.1 * (max(shown) - min(shown)), *(width for width in widths if math.isfinite(width)))
    low, high = min(shown) - pad, max(shown) + pad
    if low == high:
        return
    panel.set_ylim(low, high)
    for place, value in zip(_positions(back), _numbers(back, "metric"), strict=True):
        if math.isfinite(value) and not low <= value <= high:
            arrow, edge, side = ("↓", 0, "bottom") if value < low else ("↑", 1, "top")
            at: dict[str, Any] = {"transform": panel.get_xaxis_transform(), "ha": "center", "va": side}
            panel.text(place, edge, f"{arrow} {value:.3g}", color=color, fontsize="small", **at)


def _label_rounds(panel: Axes, rows: Sequence[dict[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.set_xlabel("epoch" if rows[0]["round"] is None else "round (number of prunings)")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _shares(axis: Axis, shares: Sequence[float], written: Any) -> None:
    """Ticks of a logarithmic axis of shares: the fewer decades, the more of them in each, and none over another."""
    from matplotlib.ticker import LogLocator, NullLocator

    spread = min(shares) / max(shares)
    fine = ((0.4, range(1, 10)), (0.05, (1, 2, 3, 5, 7)), (0.005, (1, 2, 5)), (0.0, (1,)))
    subs = next(digits for least, digits in fine if spread >= least)
    axis.set_major_locator(LogLocator(subs=[float(digit) for digit in subs]))
    axis.set_major_formatter(written)
    axis.set_minor_locator(NullLocator())


def _shade(panel: Axes, rows: Sequence[dict[str, Any]], x: Sequence[int]) -> None:
    """The phases, from half a round before their first round to half a round after their last."""
    seen: set[str] = set()
    for phase, of_phase in groupby(zip(rows, x, strict=True), key=lambda pair: pair[0].get("phase")):
        if phase is not None:
            places = [place for _, place in of_phase]
            color, hatch = SHADES[phase]
            label = None if phase in seen else phase
            ends = (places[0] - 0.5, places[-1] + 0.5)
            panel.axvspan(*ends, facecolor=color, edgecolor=color, hatch=hatch, alpha=0.22, linewidth=0, label=label)
            seen.add(phase)


def _mark(panel: Axes, ink: str, rounds: dict[str, int | None]) -> None:
    for (label, round), style in zip(rounds.items(), ("--", ":"), strict=True):
        if round is not None:
            panel.axvline(round, color=ink, linestyle=style, linewidth=1.4, label=label)
