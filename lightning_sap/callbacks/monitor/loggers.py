"""What goes to TensorBoard beside the scalars: a layout of charts, figures and a text."""

from __future__ import annotations

import re
from collections.abc import Iterable
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
