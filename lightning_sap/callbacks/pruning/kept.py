"""What can be gone back to: the first weights, and a round; how they are kept, and how the module gets a round back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_sap.callbacks.pruning import compatibility, snapshots
from lightning_sap.callbacks.pruning.kept_round import KeptRound, copied_sums
from lightning_sap.rewind import take_weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_sap.callbacks.pruning.session import PruningSession


def take_first_(session: PruningSession, module: LightningModule, epochs: int) -> None:
    """Take the weights to rewind to, when it is time."""
    state, wanted = session.state, session.options.snapshot_epoch
    is_first_round = state.round == 0 and state.plan.rounds != 0
    if is_first_round and wanted is not None and epochs - state.first_epoch >= wanted and not state.first_weights:
        state.first_weights = snapshots.take(session, module)


def keep_(session: PruningSession, trainer: Trainer, module: LightningModule) -> None:
    """Keep the round as it is now, with the averages that other callbacks make of it."""
    state, averages = session.state, list[dict[str, Tensor]]()
    weights = snapshots.take(session, module)
    still = session.subject.still.keys() - weights.keys()
    compatibility.in_averages_(trainer, module, lambda: averages.append(take_weights(module, still)))
    sums = copied_sums(state.gathered)
    state.kept = KeptRound(state.round, weights, state.masks, averages, state.companions, sums)


def go_back_(
    session: PruningSession, trainer: Trainer, module: LightningModule, beside: Sequence[PruningSession]
) -> None:
    """Put back the weights, buffers and masks of the round that was kept, in the averages those of its averages."""
    kept = session.state.kept
    if kept is None:
        raise RuntimeError("No round was kept to go back to.")
    session.state.masks = kept.masks.matched(session.live())
    session.state.companions = kept.companions
    session.state.gathered = kept.gathered
    averages = iter(kept.averages)
    session.restore_(module, kept.weights, beside)
    compatibility.in_averages_(trainer, module, lambda: session.restore_(module, next(averages, kept.weights), beside))


def hand_back_(
    session: PruningSession, trainer: Trainer, module: LightningModule, beside: Sequence[PruningSession]
) -> None:
    """Training has ended: the module holds the round that was kept; where it was averaged, the average."""
    go_back_(session, trainer, module, beside)
    kept = session.state.kept
    if kept is not None:
        if kept.averages:
            session.restore_(module, kept.averages[-1], beside)
        session.state.history.mark_restored(kept.round)
