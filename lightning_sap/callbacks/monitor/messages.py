"""What a monitor says, beside its verdict."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_sap.callbacks.logging import log_line
from lightning_sap.report import show
from lightning_sap.rounds.history import RoundRecord

if TYPE_CHECKING:
    from lightning_sap.callbacks.monitor.callback import PQIMonitor
    from lightning_sap.callbacks.monitor.stopping import Verdict
    from lightning_sap.rounds.phases import Phase


def warn_of_no_pruner(name: str, stop_on: str) -> None:
    """Warn that there is nothing to judge."""
    rank_zero_warn(
        f"{name}: no callback of lightning-sap prunes in this Trainer, so PQIMonitor only logs and never stops. Add "
        f"SAPCallback or PruningCallback, or say stop_on=None (now {stop_on!r})."
    )


def warn_of_silence(name: str) -> None:
    """Warn that nothing is logged by a Trainer in barebones mode."""
    rank_zero_warn(
        f"PQIMonitor: Trainer(barebones=True) silences logging: {name}/global and the other values reach no logger and "
        "no callback; rows() and plot() have them all the same, without a monitored metric."
    )


def warn_of_no_sound_round(name: str, round: int) -> None:
    """Warn that there is no round to put back."""
    rank_zero_warn(f"{name}: the module stays as it is after round {round}. No round was sound.")


def tell_restored(name: str, record: RoundRecord) -> None:
    """Say which round the module holds again."""
    log_line(
        f"{name}: the module holds round {record.round} again, {record.remaining:.2%} of the weights"
        f"{'' if record.path is None else f': {record.path}'}"
    )


def tell_judgement(trainer: Trainer, monitor: PQIMonitor, round: int, before: tuple[Phase, Verdict | None]) -> None:
    """Tell the user of a verdict or a new phase."""
    if monitor.verdict != before[1]:
        least = trainer.min_epochs or 0
        more = f" Training goes on to min_epochs={least}." if trainer.current_epoch + 1 < least else ""
        log_line(f"{monitor.name}: {monitor.verdict}{more}")
    elif monitor.verbose and monitor.phase != before[0]:
        log_line(f"{monitor.name}: {monitor.phase} after round {round}. {monitor.reason}")


def tell_open(monitor: PQIMonitor, record: RoundRecord) -> dict[int, dict[str, Any]]:
    """Say, once, that rounds in which a part of the network is open are not judged; returns notes for such a round."""
    if record.round == 0 and record.opened and monitor.stop_on is not None:
        log_line(
            f"{monitor.name}: a part of the network is open in this round ({', '.join(record.opened)}). Only rounds in "
            "which all is pruned are judged, so that training stops in none before."
        )
    why = f"Not judged: {', '.join(record.opened)} was open, and the index of an open network cannot be compared."
    return {record.round: {"reason": why}} if record.opened else {}


def tell_report(monitor: PQIMonitor, records: Sequence[RoundRecord]) -> None:
    """Print the report: as a table where rich is installed, else as Markdown; training is over, and may not fail."""
    try:
        if importlib.util.find_spec("rich") is None:
            log_line(monitor.report())
        else:
            show(records, metric=monitor.monitor, verdict=str(monitor.verdict or ""))
    except OSError as error:
        rank_zero_warn(f"{monitor.name}: the report cannot be printed: {error}. monitor.report() has it.")
