"""Lines for the terminal, and values that go to loggers and to other callbacks: at an epoch's end, and inside it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Container, Mapping

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm


class AboveBars(logging.Handler):
    """Writes to the standard error, above progress bars of tqdm and of rich."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        tqdm.write(self.format(record), file=sys.stderr)  # which rich may have put something in place of


LINES = logging.getLogger("lightning_sap")
if LINES.level == logging.NOTSET:
    LINES.setLevel(logging.INFO)
if not logging.getLogger().hasHandlers():  # as Lightning shows its own lines
    LINES.addHandler(AboveBars())
    LINES.propagate = False


@rank_zero_only
def log_line(line: str) -> None:
    """Show a line, on rank 0; the logger ``lightning_sap`` filters, formats and sends it elsewhere."""
    LINES.info(line)


def log_epoch(
    trainer: Trainer, module: LightningModule, values: Mapping[str, float], *, logger: bool, bar: Container[str] = ()
) -> None:
    """Log values of the epoch, to the loggers too or to callbacks alone; a Trainer in barebones mode logs nothing.

    Those whose names are in ``bar`` are shown on the progress bar.
    """
    to = None if logger else False  # True would warn where there is no logger
    for on_bar in () if trainer.barebones else (False, True):
        part = {key: value for key, value in values.items() if (key in bar) == on_bar}
        # all ranks have the same numbers, and the most of equal numbers is exactly each of them
        module.log_dict(part, prog_bar=on_bar, on_step=False, on_epoch=True, logger=to, sync_dist=True, reduce_fx="max")


def log_now(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Send values to every logger at the present step: what ``log`` is given inside an epoch waits for its end."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=trainer.global_step)
