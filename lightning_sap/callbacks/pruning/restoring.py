"""The way back to a saved round: checked on all ranks, and only then written into the module."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from lightning_sap.callbacks.pruning import archive, compatibility, folders, roundfile, snapshots
from lightning_sap.callbacks.pruning.agreement import of_ranks
from lightning_sap.callbacks.pruning.checks import state_key
from lightning_sap.callbacks.pruning.roundfile import Digest, Identity
from lightning_sap.callbacks.pruning.state import PruningState
from lightning_sap.engine.weights import COMPILE_PREFIX
from lightning_sap.rewind import place_weights, restore_weights_
from lightning_sap.rounds.history import RoundRecord

if TYPE_CHECKING:
    from lightning_sap.callbacks.pruning.session import PruningSession

T = TypeVar("T")


def restore_(
    session: PruningSession,
    record: RoundRecord,
    module: nn.Module,
    beside: Sequence[PruningSession],
    fit: tuple[Trainer, LightningModule] | None,
) -> None:
    """Put a round back into the module, its masks into all sessions; nothing is changed unless all ranks can.

    Raises:
        ValueError: If its file is damaged, another one, or of another module.
        FileNotFoundError: If it is not there.
    """
    path, sessions = _place(session, record), [session, *beside]
    _agree(record, lambda: _see(path))
    _agree(record, lambda: _check(session, record, path))
    checkpoint = _agree(record, lambda: _read(path, module))
    states = _agree(record, lambda: [_state(other, checkpoint, module) for other in sessions])
    placed = _agree(record, lambda: _placed(module, checkpoint))
    snapshots.warn_of_left_buffers(session.options, restore_weights_(module, placed))
    if fit is not None:
        compatibility.in_averages_(*fit, partial(_write_, fit[1], checkpoint))
    for other, state in zip(sessions, states, strict=True):
        other.state = state.holding(other.state.history)
        other.state.history.mark_restored(state.round)


def put_back(name: str, wanted: int, records: Sequence[RoundRecord], restore: Callable[[int], Any]) -> None:
    """After training: restore a round, or where that cannot be the latest sound one before it; nothing may be lost."""
    faults = []
    for round in (wanted, *_sound_before(wanted, records)):
        try:
            restore(round)
        except (ValueError, OSError) as error:
            faults.append(str(error))
        else:
            if faults:
                warnings.warn(f"{name}: {' '.join(faults)} Round {round} is put back instead.", stacklevel=2)
            return
    warnings.warn(
        f"{name}: the module stays as it is after round {records[-1].round}. {' '.join(faults)}", stacklevel=2
    )


def _sound_before(wanted: int, records: Sequence[RoundRecord]) -> Iterator[int]:
    """The saved rounds before one, the latest first, but those that were unsound, collapsed or taken back."""
    for record in reversed(records):
        bad = record.taken_back or record.sound is False or record.phase == "collapse"
        if record.round < wanted and record.path and not bad:
            yield record.round


def _place(session: PruningSession, record: RoundRecord) -> str:
    """The file of a round, of that name, and in a folder of its run that the options name or its fit found."""
    name = os.path.basename(str(record.path))
    if not roundfile.is_name_of(name, session.options.name, record.round):
        raise ValueError(f"Round {record.round} has no file: {record.path!r} is not the name of one.")
    if record.run not in session.places:
        there = folders.known(session.options, None, None)
        found = next((f for f in there if folders.owned(f, session.options.name, record.run)), None)
        if found is None:
            raise FileNotFoundError(
                f"The round was saved as {name!r}, and the folder that it is in is not known here: give dirpath='...' "
                f"(now {session.options.dirpath!r}), the folder of the rounds of this run."
            )
        session.places[record.run] = found
    return str(archive.path_of(session, record.run, record.round, name))


def _agree(record: RoundRecord, find: Callable[[], T]) -> T:
    """What a function finds on this rank, if it finds it on all; else each rank raises and nothing is changed."""
    found: Any = None
    error: Exception | None = None
    try:
        found = find()
    except Exception as fault:  # on each rank another may happen
        error = fault
    faults = of_ranks(None if error is None else (isinstance(error, FileNotFoundError), str(error)))
    if not any(faults):
        return found  # type: ignore[no-any-return]
    if len(faults) == 1 and error is not None:
        raise error
    said = [f"not seen by rank {rank}" for rank, fault in enumerate(faults) if fault and fault[0]]
    said += [f"rank {rank}: {fault[1]}" for rank, fault in enumerate(faults) if fault and not fault[0]]
    kind = FileNotFoundError if any(fault and fault[0] for fault in faults) else ValueError
    raise kind(f"Round {record.round} is put back on no rank, from {record.path!r}: {'; '.join(said)}.") from error


def _see(path: str) -> None:
    if not os.path.exists(path):
        raise FileNotFoundError(f"The round was saved as {path!r}, which is not there any more.")


def _check(session: PruningSession, record: RoundRecord, path: str) -> None:
    """Raise unless it is the file that was saved."""
    if record.sha256 is not None:
        size, sha256 = roundfile.digest_of(path)
        if size != record.size:
            raise ValueError(f"Round {record.round} is damaged: {path!r} has {size:,} bytes of {record.size:,}.")
        if Digest(size, sha256) != Digest(size, record.sha256):
            raise ValueError(f"Round {record.round} is damaged: {path!r} has not the SHA-256 that it was saved with.")
    identity = roundfile.identity_of(path, state_key(session.options.name))
    if identity is None:
        raise ValueError(
            f"Round {record.round} cannot be read: {path!r} is damaged, or holds objects that cannot be read without "
            "executing code, such as hyperparameters of a class of your own that is a list. "
            "Give save_hyperparameters plain values."
        )
    if identity != Identity(record.run, record.round):
        raise ValueError(f"{path!r} is not round {record.round} of this run, but of another ({identity}).")


def _read(path: str, module: nn.Module) -> dict[str, Any]:
    try:
        return roundfile.read(path, module)
    except (Exception, CheckpointException) as error:
        raise ValueError(f"{path!r} cannot be read: {error}") from error


def _state(session: PruningSession, checkpoint: dict[str, Any], module: nn.Module) -> PruningState:
    key = state_key(session.options.name)
    if key not in checkpoint["callbacks"]:
        raise ValueError(f"The saved round has no state of the callback {session.options.name!r}.")
    return PruningState.live(checkpoint["callbacks"][key], module)


def _write_(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint's weights and buffers into a module, in place; a collective where they are sharded."""
    restore_weights_(module, _placed(module, checkpoint))


def _placed(module: nn.Module, checkpoint: dict[str, Any]) -> Any:
    """A checkpoint's weights and buffers, where those of the module are.

    Raises:
        ValueError: If the module has other ones.
    """
    saved = {name.replace(COMPILE_PREFIX, ""): tensor for name, tensor in checkpoint["state_dict"].items()}
    live = {name.replace(COMPILE_PREFIX, "") for name in module.state_dict()}
    missing, surplus = sorted(live - saved.keys()), sorted(saved.keys() - live)
    if surplus or (missing and getattr(module, "strict_loading", True)):
        raise ValueError(
            f"The saved round does not fit the module: it lacks {missing} and has {surplus} besides. Give the module "
            "that was pruned; if its on_save_checkpoint leaves weights out, set strict_loading = False on it."
        )
    tensors = {name: value for name, value in saved.items() if isinstance(value, torch.Tensor)}
    return place_weights(module, tensors)
