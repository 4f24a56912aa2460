"""What goes to TensorBoard beside the scalars: a layout of charts, figures and a text."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.tensorboard import SummaryWriter

from lightning_sap.callbacks.monitor import outputs
from lightning_sap.rounds.history import RoundRecord

CHART = "lightning-sap"


def writers(trainer: Trainer) -> list[SummaryWriter]:
    """What writes to TensorBoard in this process, whichever logger has it."""
    experiments = [getattr(logger, "experiment", None) for logger in trainer.loggers]
    return [experiment for experiment in experiments if isinstance(experiment, SummaryWriter)]


def layout(monitor: str, layers: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """One chart for the index, and one each for the curves of the layers; TensorBoard takes tags as regexes."""
    own, names = re.escape(monitor), [re.escape(name) for name in layers]
    charts = {"PQ Index": ["Multiline", [f"{own}/{key}$" for key in ("global", "layer_mean", "global_pruned")]]}
    if names:
        charts["PQ Index of the layers"] = ["Multiline", [f"{own}/{name}$" for name in names]]
        charts["Remaining weights of the layers"] = ["Multiline", [f"remaining/{name}$" for name in names]]
    return {CHART: charts}


def lay_out(trainer: Trainer, monitor: str, layers: Iterable[str]) -> None:
    """Put the charts under Custom Scalars."""
    for writer in writers(trainer):
        _try(f"{monitor}: the charts", partial(writer.add_custom_scalars, layout(monitor, layers)))


def show(
    trainer: Trainer,
    monitor: str,
    plot: Callable[[Any], Any] | None,
    report: str | None,
    records: Sequence[RoundRecord],
) -> None:
    """Put both figures among the images, where matplotlib is installed, and the report among the texts; a collective.

    All of it is written to the run's folder too.
    """
    outputs.write(trainer, monitor, plot, report, records)
    step = trainer.global_step
    for writer in writers(trainer):
        if plot is not None and importlib.util.find_spec("matplotlib") is not None:
            for kind in ("rounds", "layers"):
                _try(
                    f"{monitor}: the figure of the {kind}",
                    partial(_add_figure, writer, f"{monitor}/{kind}", plot, step),
                )
        if report is not None:
            _try(f"{monitor}: the report", partial(writer.add_text, f"{monitor}/report", report, global_step=step))


def _add_figure(writer: SummaryWriter, tag: str, plot: Callable[[Any], Any], step: int) -> None:
    writer.add_figure(tag, plot(tag.rpartition("/")[2]), global_step=step)


def _try(what: str, write: Callable[[], Any]) -> None:
    """Write something that a run can do without: what goes wrong is a warning."""
    try:
        write()
    except Exception as error:  # figures and disks fail in many ways, and training is over
        rank_zero_warn(f"{what} cannot be written to TensorBoard: {error}")
