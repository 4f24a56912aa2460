"""What stays in the run's folder when training is over: report, rounds and figures, whatever the logger is."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_sap.files import replacing
from lightning_sap.rounds.history import History, RoundRecord


def write(
    trainer: Trainer,
    name: str,
    plot: Callable[[Any], Any] | None,
    report: str | None,
    records: Sequence[RoundRecord],
) -> None:
    """Write ``<name>-report.md``, ``<name>-rounds.csv`` and the figures to ``trainer.log_dir``; a collective.

    Nothing is written without a logger, where that folder is the one that the program was started in, nor under
    ``fast_dev_run``. A file that cannot be written is a warning.
    """
    folder = trainer.log_dir
    if not trainer.loggers or trainer.fast_dev_run or not folder or "://" in folder:  # type: ignore[attr-defined]
        return
    if not trainer.is_global_zero:
        return
    path = partial(os.path.join, folder)
    if report is not None:
        _try(path(f"{name}-report.md"), lambda file: _put(file, report.encode()))
        _try(path(f"{name}-rounds.csv"), History(records).to_csv)
    if plot is not None and importlib.util.find_spec("matplotlib") is not None:
        for kind in ("rounds", "layers"):
            _try(path(f"{name}-{kind}.png"), partial(_draw, plot, kind))


def _draw(plot: Callable[[Any], Any], kind: str, path: str) -> None:
    picture = io.BytesIO()
    plot(kind).savefig(picture, format="png", dpi=150)
    _put(path, picture.getvalue())


def _put(path: str, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


def _try(path: str, write: Callable[[str], None]) -> None:
    """Write a file that a run can do without."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write(path)
    except Exception as error:  # figures and disks fail in many ways, and training is over
        rank_zero_warn(f"{path!r} cannot be written: {error}")
