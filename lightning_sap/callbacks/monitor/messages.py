"""What a monitor says, beside its verdict."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_sap.rounds.history import RoundRecord


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
    rank_zero_info(
        f"{name}: the module holds round {record.round} again, {record.remaining:.2%} of the weights"
        f"{'' if record.path is None else f': {record.path}'}"
    )
