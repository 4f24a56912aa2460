"""The rounds of a fit as a table, in Markdown or in the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_sap.rounds.history import RoundRecord

TEXTUAL = ("open", "phase")  # columns of words


def markdown(records: Sequence[RoundRecord], *, metric: str | None = None, verdict: str = "") -> str:
    """The rounds as Markdown: a table, why training stopped, what is in the module, and how far from the yardstick.

    Args:
        records: What is known of the rounds.
        metric: Name of a logged metric to show beside the one that a tolerance judges by.
        verdict: Why training was stopped; empty if it came to its end.

    Raises:
        ValueError: If there are no records.

    Example:
        >>> dense = RoundRecord(0, 0, 3, 1.0, {}, 0.31, {}, pruned=20, weights=40, phase="regularization")
        >>> print(markdown([dense, RoundRecord(1, 4, 7, 0.5, {}, 0.25, {}, weights=20, phase="regularization")]))
        | round | epochs | weights | remaining | PQ Index | pruned | phase |
        | ---: | ---: | ---: | ---: | ---: | ---: | --- |
        | 0 | 0–3 | 40 | 100.00% | 0.3100 | 20 | regularization |
        | 1 | 4–7 | 20 | 50.00% | 0.2500 | – | regularization |
        <BLANKLINE>
        The module holds round 1: 50.00% of the prunable weights.
    """
    header, *lines = table(records, metric)
    rows = [_escaped(header), ["---" if name in TEXTUAL else "---:" for name in header], *map(_escaped, lines)]
    lines_of_table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return "\n\n".join([lines_of_table, *_closing(records, verdict)])


def show(records: Sequence[RoundRecord], *, metric: str | None = None, verdict: str = "") -> None:
    """Print the same in the terminal; needs rich."""
    from rich import get_console
    from rich.table import Column, Table
    from rich.text import Text

    header, *lines = table(records, metric)  # as Text: in the names of metrics brackets are no markup
    grid = Table(
        *(Column(Text(name), justify="left" if name in TEXTUAL else "right", overflow="fold") for name in header),
        title="Rounds",
        padding=0,
    )  # so that it fits into 80 columns; where it does not, a cell goes on below and is not cut off
    for line in lines:
        grid.add_row(*map(Text, line))
    get_console().print(grid)
    get_console().print("\n".join(_closing(records, verdict)), highlight=False, markup=False, soft_wrap=True)


def _escaped(cells: Sequence[str]) -> list[str]:
    """Cells of a Markdown table: what would end one, or the line, does not."""
    return [" ".join(cell.replace("|", "\\|").split("\n")) for cell in cells]


def judged_by(records: Sequence[RoundRecord]) -> str | None:
    """Name of the metric that a tolerance judged these rounds by; ``"metric"`` where no logged one, or more, fit.

    Example:
        >>> judged_by([RoundRecord(0, 0, 3, 1.0, {}, 0.3, {}, metrics={"val_acc": 0.97}, sound=True, metric=0.97)])
        'val_acc'
    """
    judged = [record for record in records if record.metric is not None]
    if not judged:
        return None
    names = [name for name in judged[0].metrics if judges(records, name)]
    return names[0] if len(names) == 1 else "metric"


def judges(records: Sequence[RoundRecord], name: str) -> bool:
    """Whether the rounds were judged by the metric of this name: whether it has the judged value in each of them."""
    judged = [(r.metric, r.metrics.get(name)) for r in records if r.metric is not None]
    return bool(judged) and all(a == b or (a != a and b is not None and b != b) for a, b in judged)  # NaN too


def table(records: Sequence[RoundRecord], metric: str | None = None) -> list[list[str]]:
    """The header, then one line for each round.

    Raises:
        ValueError: If there are no records.

    Example:
        >>> table([RoundRecord(0, 0, 3, 1.0, {}, 0.31, {}, pruned=20, weights=40)])[1]
        ['0', '0–3', '40', '100.00%', '0.3100', '20', '–']
    """
    if not records:
        raise ValueError("There is nothing to report yet: no round has ended.")
    columns = {
        "round": [str(r.round) for r in records],
        f"{records[0].unit}s": [_span(r) for r in records],
        "weights": ["–" if r.weights is None else f"{r.weights:,}" for r in records],
        "remaining": [_percent(r.remaining) for r in records],
        "PQ Index": [f"{r.pqi:.4f}" for r in records],
        "pruned": ["–" if r.pruned is None else f"{r.pruned:,}" for r in records],
    }
    if any(r.regrown or r.opened for r in records):
        columns["came back"] = ["–" if r.regrown is None else f"{r.regrown:,}" for r in records]
        columns["open"] = [_first(r.opened) for r in records]
    columns["phase"] = [
        "taken back" if r.taken_back else "unsound" if r.sound is False else r.phase or "–" for r in records
    ]
    if judged := judged_by(records):
        columns[judged] = [_measured(r.metric) for r in records]
    if metric is not None and not judges(records, metric):
        columns[metric] = [_measured(r.metrics.get(metric)) for r in records]
    return [list(columns), *map(list, zip(*columns.values(), strict=True))]


def _closing(records: Sequence[RoundRecord], verdict: str) -> list[str]:
    held = next((r for r in records if r.restored), records[-1])
    lines = [verdict] if verdict else []
    again = " again" if held.restored else ""
    lines.append(f"The module holds round {held.round}{again}: {_percent(held.remaining)} of the prunable weights.")
    lines += _against_yardstick(records, held)
    if saved := [r for r in records if r.path]:
        are = "1 round is" if len(saved) == 1 else f"{len(saved)} rounds are"
        lines.append(f"{are} saved, that of the module as {held.path}.")
    return lines


def _against_yardstick(records: Sequence[RoundRecord], held: RoundRecord) -> list[str]:
    """How far the round in the module is from the yardstick, and how many were taken back; where they were judged."""
    name, metric, yardstick = judged_by(records), held.metric, held.yardstick
    if name is None:
        return []
    back = f"Rounds taken back: {sum(r.taken_back for r in records)} of {len(records)}."
    if metric is None or yardstick is None or held.bound is None or not math.isfinite(metric):
        return [f"Whether it keeps the tolerance is not known. {back}"]
    side = "below" if metric < yardstick else "above"
    distance = "as good as" if metric == yardstick else f"{abs(metric - yardstick):.2g} {side}"
    limit = f"sound {'down' if held.bound <= yardstick else 'up'} to {held.bound:.4g}"
    unsound = "" if held.sound else ", and not sound"
    return [f"There {name} is {metric:.4g}, {distance} the yardstick of {yardstick:.4g} ({limit}){unsound}. {back}"]


def _measured(metric: float | None) -> str:
    """Four digits, the last ones zeros or not, so that those of a column stand below one another."""
    return "–" if metric is None else f"{metric:#.4g}".removesuffix(".")


def _first(names: Sequence[str]) -> str:
    """The first of these parameters, by the module of a weight, and how many follow."""
    return (names[0].removesuffix(".weight") if names else "–") + (f" + {len(names) - 1}" if len(names) > 1 else "")


def _span(record: RoundRecord) -> str:
    """From its first to its last epoch or step."""
    if record.unit == "step":
        return f"{record.first_step:,}–{record.last_step:,}"
    return f"{record.first_epoch}–{record.last_epoch}"


def _percent(share: float) -> str:
    return f"{share:.2%}"
