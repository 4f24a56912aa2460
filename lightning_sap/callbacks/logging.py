"""Values that go to loggers and to other callbacks: at the end of an epoch, and inside it."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import LightningModule, Trainer


def log_epoch(trainer: Trainer, module: LightningModule, values: Mapping[str, float], *, logger: bool) -> None:
    """Log values of the epoch, to the loggers too or to callbacks alone; a Trainer in barebones mode logs nothing."""
    if not trainer.barebones:
        to = None if logger else False  # True would warn where there is no logger
        # all ranks have the same numbers, and the most of equal numbers is exactly each of them
        module.log_dict(dict(values), on_step=False, on_epoch=True, logger=to, sync_dist=True, reduce_fx="max")


def log_now(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Send values to every logger at the present step: what ``log`` is given inside an epoch waits for its end."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=trainer.global_step)
