"""The round archive: whose rounds there are, where they lie, and where the next ones go."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_sap.callbacks.pruning import folders, roundfile
from lightning_sap.callbacks.pruning.agreement import of_ranks
from lightning_sap.callbacks.pruning.checks import state_key
from lightning_sap.callbacks.pruning.roundfile import Identity
from lightning_sap.rounds.history import History, RoundRecord

if TYPE_CHECKING:
    from lightning_sap.callbacks.pruning.session import PruningSession

NOT_SAVED: dict[str, Any] = {"path": None, "size": None, "sha256": None}


def new_run(trainer: Trainer) -> str:
    """An identity that no other run has; the same on all ranks, a collective."""
    return str(trainer.strategy.broadcast(uuid.uuid4().hex))


def open_archive(trainer: Trainer, session: PruningSession, is_wanted: bool, shared: str | None) -> None:
    """Find the rounds that are there, and say where the next ones go: where this run's are, else in a new folder.

    A collective. What cannot be written is warned of, and no rounds are saved then.
    """
    state, options = session.state, session.options
    state.run = state.run or new_run(trainer)
    is_wanted = is_wanted and state.plan.rounds != 0
    there = folders.known(options, trainer, state.folder) if is_wanted or state.history or state.note else []
    own = folders.named_by(options, there, trainer) if is_wanted else []
    found = trainer.strategy.broadcast(_places(session, there) if trainer.is_global_zero else {})
    session.places = dict(found)
    _seal(session)
    place = session.places.get(state.run)
    session.archive = place if place in own and is_wanted else None
    if is_wanted and (session.archive is None or not _is_writable(trainer, session.archive)):
        session.archive = choose(trainer, session, shared)
    if session.archive is not None:
        state.folder = folders.relative(session.archive, trainer)
        if trainer.is_global_zero:
            _clear(session.archive, options.name, state.run)


def _places(session: PruningSession, there: Iterable[str]) -> dict[str | None, str]:
    """The folder of each run that rounds of the history are of, of the one that goes on too."""
    state, there = session.state, list(there)
    runs = dict.fromkeys([state.run, *(record.run for record in state.history if record.path)])
    found = {run: next((f for f in there if folders.owned(f, session.options.name, run)), None) for run in runs}
    return {run: folder for run, folder in found.items() if folder is not None}


def _seal(session: PruningSession) -> None:
    """Say in full where rounds lie; take the digest of a round that was resumed from its own file."""
    state, name = session.state, session.options.name
    state.history = History(_placed(session, record) for record in state.history)
    if state.undone is not None:
        state.undone = _placed(session, state.undone)
    if state.pruning is not None:
        state.pruning = replace(state.pruning, record=_placed(session, state.pruning.record))
    if not state.note.get("path"):
        return
    path = str(path_of(session, state.run, state.round, state.note["path"]))
    if "sha256" not in state.note:
        is_known = os.path.isabs(path)  # the same on all ranks
        if not is_known or identities(path, name) != [Identity(state.run, state.round)]:
            state.note = {key: value for key, value in state.note.items() if key not in NOT_SAVED}
            return
        state.note |= roundfile.digest_of(path)._asdict()
    state.note |= {"path": path}


def _placed(session: PruningSession, record: RoundRecord) -> RoundRecord:
    return replace(record, path=path_of(session, record.run, record.round, record.path))


def identities(path: str, name: str) -> list[Identity | None]:
    """What the file of a round says that it is: one answer, if all ranks see the same; a collective."""
    found = of_ranks(roundfile.identity_of(path, state_key(name)))
    return list(dict.fromkeys(found))


def path_of(session: PruningSession, run: str | None, round: int, stored: str | None) -> str | None:
    """Where a round lies: in the folder of its run, whatever folder was stored; of a strange name, the name alone."""
    if stored is None:
        return None
    file, folder = os.path.basename(stored), session.places.get(run)
    return os.path.join(folder, file) if folder and roundfile.is_name_of(file, session.options.name, round) else file


def _is_writable(trainer: Trainer, folder: str) -> bool:
    """Whether rank 0 can write to the folder; a collective."""
    return bool(trainer.strategy.broadcast(os.access(folder, os.W_OK)))


def choose(trainer: Trainer, session: PruningSession, shared: str | None) -> str | None:
    """A folder for the rounds of this run, or that of a callback before it; None if there can be none; a collective."""
    if shared is not None:
        return shared
    folder, chosen = folders.wanted(session.options, trainer), ("", "")
    if trainer.is_global_zero:
        try:
            chosen = folders.take(folder, session.state.run), ""
        except OSError as error:
            chosen = "", str(error)
    place, fault = trainer.strategy.broadcast(chosen)
    if fault:
        rank_zero_warn(
            f"{session.options.name}: no rounds are saved, so that none can be restored: {fault}. Give "
            "dirpath='...', a folder that can be written."
        )
    return place or None


def release(trainer: Trainer, session: PruningSession) -> None:
    """Give up a folder in which no round was saved."""
    if session.archive is not None and trainer.is_global_zero:
        folders.release(session.archive, session.state.run)


def _clear(folder: str, name: str, run: str) -> None:
    """Delete what killed saves of this run have left."""
    with suppress(OSError):
        for file in os.listdir(folder):
            if roundfile.is_temporary(file, name, run):
                remove(os.path.join(folder, file))


def remove(path: str) -> None:
    """Delete a file or a folder, if it is there.

    Raises:
        OSError: If that cannot be.
    """
    shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else Path(path).unlink(missing_ok=True)
