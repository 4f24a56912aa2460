"""What goes to TensorBoard beside the scalars: a layout of charts, figures and a text."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.tensorboard import SummaryWriter

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
        writer.add_custom_scalars(layout(monitor, layers))


def show(trainer: Trainer, monitor: str, plot: Callable[[Any], Any] | None, report: str | None) -> None:
    """Put both figures among the images, where matplotlib is installed, and the report among the texts."""
    for writer in writers(trainer):
        if plot is not None and importlib.util.find_spec("matplotlib") is not None:
            for kind in ("rounds", "layers"):
                writer.add_figure(f"{monitor}/{kind}", plot(kind), global_step=trainer.global_step)
        if report is not None:
            writer.add_text(f"{monitor}/report", report, global_step=trainer.global_step)
