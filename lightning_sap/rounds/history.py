"""The rounds so far: append-only records."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from typing import Any, Literal

from lightning_sap.files import replacing

OF_THE_FILE = ("run", "parent", "size", "sha256")  # fields by which the checkpoint of a round is known


@dataclass(frozen=True)
class RoundRecord:
    """What is known of one round of training.

    Attributes:
        round: Number of prunings before it; 0 is the dense round.
        first_epoch: Its first epoch.
        last_epoch: Its last epoch.
        remaining: Fraction of the prunable weights that it trained.
        layers_remaining: The same of each prunable parameter.
        pqi: PQ Index of its trained weights, all as one vector.
        layers_pqi: The same of each prunable parameter.
        pruned: Number of weights pruned at its end; None at the end of training, where nothing is pruned.
        pqi_pruned: PQ Index right after that pruning, before retraining.
        layers_pqi_pruned: The same of each prunable parameter.
        lr: Learning rate of the first parameter group in its last step.
        seconds: Time that pruning took at its end.
        metrics: Every logged metric as it stood at its end.
        weights: Number of prunable weights that it trained.
        phase: Where a monitor saw the network at its end, see :class:`lightning_sap.Phase`; None without a monitor.
        reason: Why, in one sentence.
        path: The checkpoint of its trained model; None if there is none.
        restored: Whether its weights and masks were put back into the module.
        first_step: Optimizer steps of the Trainer before it.
        last_step: Optimizer steps of the Trainer before its last one.
        unit: What rounds are counted in: "epoch" or "step".
        regrown: Number of weights that came back at its end.
        taken_back: Whether the run went back to an earlier round at its end. ``pruned`` counts from that round's masks.
        sound: Whether it kept the tolerance; None where there is none, or where that was not judged.
        metric: The metric that it was judged by.
        yardstick: What that was held against, when it was judged.
        bound: The worst metric that was sound then.
        opened: Names of the parameters that were open in it, to be pruned again, see :class:`GrowAndPrune`.
        run: Identity of the run that trained it.
        parent: Identity of the run that this one branched off from; None if it began by itself.
        size: Bytes of its checkpoint.
        sha256: SHA-256 of these bytes; of a folder, of a list of its files with the SHA-256 of each.
    """

    round: int
    first_epoch: int
    last_epoch: int
    remaining: float
    layers_remaining: dict[str, float]
    pqi: float
    layers_pqi: dict[str, float]
    pruned: int | None = None
    pqi_pruned: float | None = None
    layers_pqi_pruned: dict[str, float] = field(default_factory=dict)
    lr: float | None = None
    seconds: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    weights: int | None = None
    phase: str | None = None
    reason: str | None = None
    path: str | None = None
    restored: bool = False
    first_step: int | None = None
    last_step: int | None = None
    unit: Literal["epoch", "step"] = "epoch"
    regrown: int | None = None
    taken_back: bool = False
    sound: bool | None = None
    metric: float | None = None
    yardstick: float | None = None
    bound: float | None = None
    opened: list[str] = field(default_factory=list)
    run: str | None = field(default=None, compare=False)
    parent: str | None = field(default=None, compare=False)
    size: int | None = field(default=None, compare=False)
    sha256: str | None = field(default=None, compare=False)

    def row(self) -> dict[str, Any]:
        """One flat mapping: the metrics, the fields; by parameter ``remaining/…``, ``pqi/…`` and ``pqi_pruned/…``.

        Which run it was and what its file must hold are left out: rows say what was trained.
        """
        row = {key: value for key, value in asdict(self).items() if key not in OF_THE_FILE}
        fields = {"remaining": "layers_remaining", "pqi": "layers_pqi", "pqi_pruned": "layers_pqi_pruned"}
        layers = {f"{key}/{name}": value for key, of in fields.items() for name, value in row.pop(of).items()}
        return {**row.pop("metrics"), **row, "opened": ", ".join(row["opened"]), **layers}


class History(Sequence[RoundRecord]):
    """Records of the rounds, oldest first.

    Example:
        >>> history = History()
        >>> for t, (left, acc) in enumerate([(1.0, 0.95), (0.5, 0.97), (0.3, 0.965), (0.1, 0.5)]):
        ...     history.append(RoundRecord(t, t, t, left, {}, 0.2, {}, metrics={"val_acc": acc}))
        >>> history.best(monitor="val_acc", tolerance=0.01).round
        2
    """

    def __init__(self, records: Iterable[RoundRecord] = ()) -> None:
        self._records = list(records)

    def __getitem__(self, index: Any) -> Any:
        """One record, or a list of them for a slice."""
        return self._records[index]

    def __len__(self) -> int:
        """Number of rounds that ended."""
        return len(self._records)

    def __iter__(self) -> Iterator[RoundRecord]:
        """The records, oldest first."""
        return iter(self._records)

    def __repr__(self) -> str:
        """The number of rounds and the last of them."""
        return f"History({len(self)} rounds, last {self._records[-1] if self._records else None})"

    def append(self, record: RoundRecord) -> None:
        """Add the record of the round that ended."""
        self._records.append(record)

    def of_round(self, round: int) -> RoundRecord:
        """The record of a round.

        Raises:
            ValueError: If no such round has ended.
        """
        known = {record.round: record for record in self._records}
        if round not in known:
            raise ValueError(f"There is no record of round {round}; those that ended are {list(known)}.")
        return known[round]

    def note(self, round: int, **fields: Any) -> RoundRecord:
        """Add what became known of a round after it was recorded; returns its new record."""
        record = replace(self.of_round(round), **fields)
        self._records = [record if other.round == round else other for other in self._records]
        return record

    def mark_restored(self, round: int) -> None:
        """Remember which round was put back into the module."""
        self._records = [replace(record, restored=record.round == round) for record in self._records]

    @property
    def restored(self) -> RoundRecord | None:
        """The round whose weights and masks were put back into the module last; None if none was."""
        return next((record for record in self._records if record.restored), None)

    def rows(self) -> list[dict[str, Any]]:
        """One flat mapping per round, see :meth:`RoundRecord.row`."""
        return [record.row() for record in self._records]

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write the rows to a CSV file, whole or not at all; what a round does not know is left empty.

        The paths of checkpoints are relative to the folder of the CSV file.
        """
        rows, text, folder = self.rows(), io.StringIO(newline=""), os.path.dirname(os.path.abspath(path))
        rows = [{**row, "path": row["path"] and os.path.relpath(row["path"], folder)} for row in rows]
        writer = csv.DictWriter(text, list(dict.fromkeys(["round", *(key for row in rows for key in row)])))
        writer.writeheader()
        writer.writerows(rows)
        with replacing(path) as file:
            file.write(text.getvalue().encode())

    def best(self, monitor: str, mode: Literal["max", "min"] = "max", tolerance: float = 0.0) -> RoundRecord:
        """The sparsest round whose metric is within the tolerance of the best round's.

        Args:
            monitor: Name of a logged metric.
            mode: Whether the metric is better when larger or smaller.
            tolerance: Greatest loss against the best round, in the metric's unit.

        Raises:
            ValueError: If no round knows the metric, or the mode is unknown.
        """
        if mode not in ("max", "min"):
            raise ValueError(f"mode must be 'max' or 'min', got {mode!r}.")
        known = [r for r in self._records if not math.isnan(r.metrics.get(monitor, math.nan))]
        if not known:
            logged = sorted({key for r in self._records for key in r.metrics})
            raise ValueError(f"No round knows the metric {monitor!r}; those logged are {logged}.")
        sign = 1 if mode == "max" else -1
        best = max(sign * r.metrics[monitor] for r in known)
        sound = [r for r in known if sign * r.metrics[monitor] >= best - tolerance]
        return min(sound, key=lambda r: r.remaining)
