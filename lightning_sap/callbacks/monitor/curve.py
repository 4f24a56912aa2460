"""The curve so far: how each round (without a pruner, each epoch) ended, and the monitored metric where known."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_sap.engine.measure import Measure


class Curve:
    """Rows as the user sees them, and whether the monitored metric of a moment is of that moment.

    Lightning keeps old metrics. Where validation logs the monitored one, it is known of the rounds only in which
    validation ran.
    """

    def __init__(self, monitor: str | None) -> None:
        self.monitor = monitor or ""
        self.rows: list[dict[str, Any]] = []
        self._validated: int | None = None  # the round (without a pruner the epoch) in which validation ran last
        self._of_validation = False  # whether validation logs the metric
        self._saved_metrics: dict[str, float] = {}  # of the epoch that was interrupted; Lightning forgets them
        self._before_validation: Tensor | None = None  # the metric

    def begin_validation(self, trainer: Trainer) -> None:
        """To be called before validation."""
        self._before_validation = trainer.callback_metrics.get(self.monitor)

    def note_validation(self, moment: int) -> None:
        """To be called when the epoch of validation ends, in that round (without a pruner, epoch)."""
        self._validated = moment

    def end_validation(self, trainer: Trainer) -> None:
        """To be called after validation: a metric that is new was logged by it."""
        self._of_validation |= trainer.callback_metrics.get(self.monitor) is not self._before_validation
        self._before_validation = None

    def metric(self, trainer: Trainer, moment: int) -> float | None:
        """The monitored metric of a round (without a pruner, an epoch); None where it is not known."""
        stale = self._of_validation and self._validated != moment
        return None if stale else self._metrics(trainer).get(self.monitor)

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

    def finish(self, trainer: Trainer) -> None:
        """Add the monitored metric to the last row, now that every hook had the time to log it.

        Raises:
            ValueError: If no such metric is logged.
        """
        if not self.monitor or trainer.barebones or not self.rows or self.rows[-1]["metric"] is not None:
            return
        metrics, row = self._metrics(trainer), self.rows[-1]
        row["metric"] = self.metric(trainer, row["epoch"] if row["round"] is None else row["round"])
        self._saved_metrics = {}
        if self.monitor not in metrics and (self._validated is not None or not trainer.enable_validation):
            raise ValueError(
                f"PQIMonitor(monitor={self.monitor!r}): no such metric is logged; those logged are {sorted(metrics)}."
            )

    def save_metric(self, trainer: Trainer, state: dict[str, Any]) -> None:
        """Keep the metric of this moment in a state that goes into a checkpoint: Lightning does not."""
        if self.monitor in trainer.callback_metrics:
            state["metrics"] = {self.monitor: float(trainer.callback_metrics[self.monitor])}

    def state_dict(self) -> dict[str, Any]:
        """Everything it remembers, as plain values."""
        return {
            "rows": copy.deepcopy(self.rows),
            "metrics": self._saved_metrics,
            "validated": self._validated,
            "of_validation": self._of_validation,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.rows = copy.deepcopy(state_dict["rows"])
        self._saved_metrics = dict(state_dict["metrics"])
        self._validated, self._of_validation = state_dict["validated"], state_dict.get("of_validation", False)

    def _metrics(self, trainer: Trainer) -> dict[str, float]:
        return self._saved_metrics | {key: float(value) for key, value in trainer.callback_metrics.items()}
