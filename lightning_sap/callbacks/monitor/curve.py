"""The curve so far: how each round (without a pruner, each epoch) ended, and the monitored metric where known."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer

from lightning_sap.callbacks.monitor.stopping import Verdict
from lightning_sap.callbacks.round_metrics import RoundMetrics
from lightning_sap.engine.measure import Measure
from lightning_sap.report import judged_by, judges
from lightning_sap.rounds.history import RoundRecord


class Curve:
    """Rows as the user sees them, and the metrics that belong to the last of them."""

    def __init__(self, monitor: str | None) -> None:
        self.monitor = monitor or ""
        self.rows: list[dict[str, Any]] = []
        self.metrics = RoundMetrics()

    def metric(self, trainer: Trainer, moment: int) -> float | None:
        """The monitored metric of a round (without a pruner, an epoch); None where it is not known."""
        return self.metrics.of(trainer, moment).get(self.monitor)

    def add(self, epoch: int, round: int | None, phase: str | None, measure: Measure, sizes: Mapping[str, int]) -> None:
        """Keep what the epoch ended with, in the place of the round's epoch before."""
        row = {
            "epoch": epoch,
            "round": round,
            "pqi": measure.overall,
            "layer_mean": measure.layer_mean,
            "remaining": sum(measure.survivors.values()) / sum(sizes.values()),
            "metric": None,
            "phase": phase,
            "layers": measure.layers,
            "layers_remaining": {name: count / sizes[name] for name, count in measure.survivors.items()},
        }
        key = "epoch" if round is None else "round"
        self.rows = [*(other for other in self.rows if other[key] != row[key]), row]

    def note(self, metrics: Mapping[str, float]) -> None:
        """Add the monitored metric of a round that ends inside an epoch to its row."""
        self.rows[-1]["metric"] = metrics.get(self.monitor)

    def finish(self, trainer: Trainer) -> None:
        """Add the monitored metric to the last row, now that every hook had the time to log it.

        Raises:
            ValueError: If no such metric is logged.
        """
        if not self.monitor or trainer.barebones or not self.rows or self.rows[-1]["metric"] is not None:
            return
        metrics, row = self.metrics.known(trainer), self.rows[-1]
        row["metric"] = self.metric(trainer, row["epoch"] if row["round"] is None else row["round"])
        self.metrics.end(trainer)
        if self.monitor not in metrics and (self.metrics.has_validated or not trainer.enable_validation):
            raise ValueError(
                f"PQIMonitor(monitor={self.monitor!r}): no such metric is logged; those logged are {sorted(metrics)}."
            )

    def save_metric(self, trainer: Trainer, state: dict[str, Any], moment: int) -> None:
        """Keep the metric of this moment in a state that goes into a checkpoint: Lightning does not."""
        if self.monitor in self.metrics.known(trainer):
            found = self.metrics.for_checkpoint(trainer, moment)
            metric = {key: value for key, value in found["metrics"].items() if key == self.monitor}
            state |= {"metrics": metric, "logged": [self.monitor]}

    def state_dict(self) -> dict[str, Any]:
        """Everything it remembers, as plain values."""
        return {"rows": copy.deepcopy(self.rows), **self.metrics.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.rows = copy.deepcopy(state_dict["rows"])
        self.metrics.load_state_dict(state_dict)


def figure(
    kind: str,
    rows: Sequence[dict[str, Any]],
    records: Sequence[RoundRecord],
    monitor: str | None,
    verdict: Verdict | None,
    *,
    dark: bool,
) -> Any:
    """A figure of the rows: :meth:`PQIMonitor.plot`."""
    from lightning_sap.plot import plot_layers, plot_rounds

    if kind not in ("rounds", "layers"):
        raise ValueError(f"kind must be 'rounds' or 'layers', got {kind!r}.")
    if kind == "layers":
        return plot_layers(rows, dark=dark)
    restored = next((record.round for record in records if record.restored), None)
    merged, metric = with_verdicts(rows, records, monitor)
    return plot_rounds(merged, metric, dark=dark, stopped=verdict.round if verdict else None, restored=restored)


def with_verdicts(
    rows: Sequence[Mapping[str, Any]], records: Sequence[RoundRecord], monitor: str | None
) -> tuple[list[dict[str, Any]], str | None]:
    """The rows with what a tolerance made of their rounds, and the name of the metric that they show.

    Where the monitor watches no metric, that is the judged one; where it watches another, there is no yardstick for it.
    """
    known, name = {record.round: record for record in records}, monitor or judged_by(records)
    given_up = _given_up(records)
    judged = monitor is None or judges(records, monitor)
    merged = [dict(row) for row in rows]
    for row in merged:
        record = known.get(row["round"])
        if record is None:
            continue
        row["taken_back"] = record.round in given_up
        row["phase"] = None if row["taken_back"] or record.sound is False else row["phase"]
        if judged:
            row |= {"yardstick": record.yardstick, "bound": record.bound}
            row["metric"] = row["metric"] if record.metric is None else record.metric
    return merged, name


def _given_up(records: Sequence[RoundRecord]) -> set[int]:
    """The rounds that were taken back, each with the near misses under the same masks before it."""
    given_up: set[int] = set()
    after: RoundRecord | None = None  # the round after, if it is given up
    for record in reversed(records):
        same = after is not None and record.remaining == after.remaining < records[0].remaining
        after = record if record.taken_back or (same and record.sound is False) else None
        given_up |= set() if after is None else {record.round}
    return given_up
