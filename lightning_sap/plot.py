"""Pictures of a pruning run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with any colour vision, and in grey by their markers
INDEX, REMAINING, METRIC = ("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^")


def plot_rounds(rows: Sequence[dict[str, Any]], metric: str | None = None) -> Figure:
    """Draw PQ Index, remaining weights and a metric over the rounds, one above the other.

    Args:
        rows: One mapping per round with ``round`` (None: drawn over ``epoch``), ``pqi``, ``layer_mean``, ``remaining``
            and ``metric``.
        metric: Name of the metric; None: it is not drawn.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If there are no rows.

    Example:
        >>> rows = [dict(round=t, epoch=t, pqi=0.2, layer_mean=0.3, remaining=0.5**t, metric=None) for t in range(3)]
        >>> [axes.get_ylabel() for axes in plot_rounds(rows).axes]
        ['PQ Index', 'remaining weights']
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('Plotting needs matplotlib: pip install "lightning-sap[plot]".') from error
    if not rows:
        raise ValueError("There is nothing to plot yet: no epoch has ended.")
    by_round = rows[0]["round"] is not None
    x = [row["round" if by_round else "epoch"] for row in rows]
    panels = 2 if metric is None else 3
    figure = Figure(figsize=(6.4, 2.1 * panels), layout="constrained", facecolor="white")
    axes = figure.subplots(panels, 1, sharex=True)
    axes[0].plot(x, [row["pqi"] for row in rows], color=INDEX[0], marker=INDEX[1], label="all weights")
    mean = [row["layer_mean"] for row in rows]
    axes[0].plot(x, mean, color="#56B4E9", marker="v", linestyle="--", label="mean of the layers")
    axes[0].set_ylabel("PQ Index")
    axes[0].legend(frameon=False)
    remaining = [row["remaining"] for row in rows]
    axes[1].plot(x, remaining, color=REMAINING[0], marker=REMAINING[1])
    axes[1].set(ylabel="remaining weights", yscale="log")
    axes[1].yaxis.set_major_locator(LogLocator(subs=(1.0,) if min(remaining) < 0.03 else (1.0, 2.0, 3.0, 5.0, 7.0)))
    axes[1].yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes[1].yaxis.set_minor_locator(NullLocator())
    if metric is not None:
        values = [float("nan") if row["metric"] is None else row["metric"] for row in rows]
        axes[2].plot(x, values, color=METRIC[0], marker=METRIC[1])
        axes[2].set_ylabel(metric)
    axes[-1].set_xlabel("round (number of prunings)" if by_round else "epoch")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    for panel in axes:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    return figure
