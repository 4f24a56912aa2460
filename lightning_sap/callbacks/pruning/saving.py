"""A round ends: its trained model is saved, whole or not at all, beside all that is there already."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from lightning_sap.callbacks.pruning import compatibility, roundfile
from lightning_sap.callbacks.pruning.agreement import of_ranks
from lightning_sap.callbacks.pruning.archive import NOT_SAVED, choose, identities, new_run, path_of, remove
from lightning_sap.callbacks.pruning.checks import state_key
from lightning_sap.callbacks.pruning.folders import relative, unmark
from lightning_sap.callbacks.pruning.messages import counted
from lightning_sap.callbacks.pruning.roundfile import Digest, Identity
from lightning_sap.files import flush_folder
from lightning_sap.sharding import is_sharded, local

if TYPE_CHECKING:
    from lightning_sap.callbacks.pruning.session import PruningSession

OF_PYTORCH = "PytorchStreamWriter", "inline_container"  # in the RuntimeErrors by which it tells of a full disk


def save_round(trainer: Trainer, session: PruningSession) -> None:
    """Save the round that ends now, once, if that is asked for; a collective.

    Where there is a file of the same round already, with other weights, this run has branched off: it gets an identity
    and a folder of its own, and what is there stays. A round that cannot be saved is warned of.
    """
    state, before = session.state, session.state.note
    if session.archive is None or "path" in before:
        return
    try:
        saved = _save(trainer, session)
        if saved is None:
            _branch(trainer, session)
            saved = (_save(trainer, session) if session.archive else None) or NOT_SAVED
    except (OSError, CheckpointException) as error:
        rank_zero_warn(
            f"{session.options.name}: round {state.round} is not saved, and cannot be restored: {_reason(error)}. "
            "Training goes on."
        )
        saved = NOT_SAVED
    finally:
        state.note = before
    state.note = {**before, **saved}
    if saved is not NOT_SAVED:
        _tidy(trainer, session)


def _save(trainer: Trainer, session: PruningSession) -> dict[str, Any] | None:
    """Path and digest of the round, once it is saved; None if there is another one in its place.

    Raises:
        OSError: If it cannot be saved, on all ranks.
    """
    state, name, folder = session.state, session.options.name, str(session.archive)
    path = os.path.join(folder, roundfile.file_name(name, state.round))
    token = trainer.strategy.broadcast(secrets.token_hex(4))
    new = os.path.join(folder, roundfile.temporary(name, state.round, state.run, token))
    state.note = {**state.note, "path": path}  # which the file says too
    try:
        _agree(trainer, lambda: _check_room(trainer, session, folder))
        digest = _write(trainer, new, state_key(name) if session.options.save_rounds == "weights" else None)
        there = trainer.strategy.broadcast(os.path.exists(path))
        old = roundfile.digest_of(path) if there else None
        if old is not None and old.sha256 not in session.replaced:
            if not _is_same(trainer, session, path, new):
                return None
            digest = old  # this run was there before, and goes on
        else:
            _agree(trainer, lambda: _put(new, path) if trainer.is_global_zero else None)
        return {"path": path, **digest._asdict()}
    finally:
        if trainer.is_global_zero:
            with suppress(OSError):
                remove(new)


def _write(trainer: Trainer, path: str, weights_of: str | None) -> Digest:
    """Have the Trainer write its checkpoint, or its weights beside the masks of a pruner; a collective.

    Raises:
        OSError: If that fails, on all ranks.
    """
    error: BaseException | None = None
    with _writing(trainer, weights_of) as writer:
        try:
            trainer.save_checkpoint(path, weights_only=False)
        except (OSError, CheckpointException) as found:
            error = found
        except RuntimeError as found:
            if not any(text in str(found) for text in OF_PYTORCH):
                raise
            error = found
        if error is not None:  # the other ranks wait there
            trainer.strategy.barrier("Trainer.save_checkpoint")
    _agree(trainer, lambda: _raise(error or writer.error))
    digest = trainer.strategy.broadcast(writer.digest)
    if digest is None:
        _agree(trainer, lambda: roundfile.flush(path) if trainer.is_global_zero else None)
        digest = roundfile.digest_of(path)
    return Digest(*digest)


@contextmanager
def _writing(trainer: Trainer, weights_of: str | None) -> Iterator[roundfile.RoundIO]:
    """Write as rounds are written, for a while."""
    before = trainer.strategy.checkpoint_io
    writer = roundfile.RoundIO(before, weights_of)
    trainer.strategy.checkpoint_io = writer
    try:
        yield writer
    finally:
        trainer.strategy.checkpoint_io = before


def _put(new: str, path: str) -> None:
    """Give a whole file its name, for good."""
    if os.path.isdir(path):
        remove(path)
    os.replace(new, path)
    with suppress(OSError):  # some systems cannot
        flush_folder(os.path.dirname(path))


def _raise(error: BaseException | None) -> None:
    if error is not None:
        raise OSError(_reason(error)) from error


def _agree(trainer: Trainer, act: Callable[[], None]) -> None:
    """Do something on each rank; a collective.

    Raises:
        OSError: If it failed on one of them, on all.
    """
    fault: str | None = None
    try:
        act()
    except OSError as error:
        fault = _reason(error)
    faults = of_ranks(fault) if trainer.world_size > 1 else [fault]
    if found := next(filter(None, faults), None):
        raise OSError(found)


def _reason(error: BaseException) -> str:
    """What went wrong, in one line."""
    causes = [str(cause) for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else []
    return (causes or [str(error)])[0].splitlines()[0].rstrip(".")


def _check_room(trainer: Trainer, session: PruningSession, folder: str) -> None:
    """Raise unless there is room for the round, and for the user's own next checkpoint beside it."""
    if not os.path.isdir(folder) and not trainer.is_global_zero and _is_sharded(trainer):
        raise OSError(f"{folder!r} is not seen by rank {trainer.global_rank}")
    if not trainer.is_global_zero:
        return
    module, state = trainer.lightning_module, session.state
    kept = [] if state.kept is None else [state.kept.weights, state.kept.averages]
    tree = [list(module.parameters()), list(module.buffers()), [o.state for o in trainer.optimizers]]
    needed = trainer.world_size * _bytes(tree) if _is_sharded(trainer) else _bytes(tree)
    needed += _bytes([state.first_weights or {}, kept])
    os.makedirs(folder, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if compatibility.saves_beside(trainer, folder) and free < 2 * needed:
        raise OSError(
            f"{free:,} bytes are free in {folder!r}, and the next file of ModelCheckpoint needs room beside the "
            f"{needed:,} bytes of the round"
        )


def told(trainer: Trainer, session: PruningSession) -> str | None:
    """How many checkpoints the rounds leave, where, and what they take on the disk; None if they leave none."""
    keep, number = session.options.save_rounds, session.state.plan.rounds
    if session.archive is None:
        return None
    of = "a checkpoint of every round" if number is None else f"{number + 1} checkpoints, one of each round"
    if isinstance(keep, int) and not isinstance(keep, bool):
        number, of = keep - 1, f"checkpoints of the latest {counted(keep, 'round')}"
    module, sharded = trainer.lightning_module, _is_sharded(trainer)
    size = _bytes([list(module.parameters()), list(module.buffers())]) * (trainer.world_size if sharded else 1)
    whole = "" if number is None else f", {(number + 1) * size / 1e6:,.1f} MB in all"
    more = "; what the optimizers keep comes on top"
    if keep == "weights":
        more = ""
        if sharded:
            rank_zero_warn(
                f"{session.options.name}: save_rounds='weights' keeps whole checkpoints of a module that is sharded, "
                "with what the optimizers keep. Give a number, to keep the latest rounds alone, or strategy='ddp'."
            )
    return f"{of} in {session.archive} ({size / 1e6:,.1f} MB of weights each{whole}{more})"


def _bytes(tree: Any) -> int:
    """How much the tensors in something take, on this rank."""
    if isinstance(tree, Tensor):
        return local(tree).nbytes
    values = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list | tuple) else ()
    return sum(map(_bytes, values))


def _is_sharded(trainer: Trainer) -> bool:
    """Whether every process holds but a part of the weights, and may write a part of the file."""
    return any(map(is_sharded, trainer.lightning_module.parameters()))


def _is_same(trainer: Trainer, session: PruningSession, old: str, new: str) -> bool:
    """Whether two files hold the same round of the same run, weight by weight; a collective."""
    state, module = session.state, trainer.lightning_module
    if identities(old, session.options.name) != [Identity(state.run, state.round)]:
        return False
    try:
        a, b = (roundfile.read(path, module)["state_dict"] for path in (old, new))
        alike = a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    except (Exception, CheckpointException):  # a file may be damaged in any way
        alike = False
    return all(of_ranks(alike)) if trainer.world_size > 1 else alike


def _equal(a: Any, b: Any) -> bool:
    """Whether two entries of a checkpoint are the same, of sharded ones the part that is here."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b)
    a, b = local(a), local(b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (a, b)))  # NaN too


def _branch(trainer: Trainer, session: PruningSession) -> None:
    """Become a run of its own, with a folder of its own."""
    state, left = session.state, session.archive
    state.parent, state.run = state.run, new_run(trainer)
    session.archive = choose(trainer, session, None)
    state.note = {key: value for key, value in state.note.items() if key not in NOT_SAVED}
    if session.archive is not None:
        session.places[state.run] = session.archive
        state.folder = relative(session.archive, trainer)
        rank_zero_warn(
            f"{session.options.name}: {left!r} has another round {state.round} of the run that this one was resumed "
            f"from. It stays; from now on this is a run of its own, and its rounds are in {session.archive!r}."
        )


def _tidy(trainer: Trainer, session: PruningSession) -> None:
    """Once the round that ends now is saved: delete the mark, and the rounds of this run too old to be kept."""
    state, keep = session.state, session.options.save_rounds
    session.places[state.run] = str(session.archive)
    if trainer.is_global_zero:
        unmark(str(session.archive))
    if keep is None or isinstance(keep, bool | str):
        return
    for record in [r for r in state.history if r.path and r.run == state.run and r.round <= state.round - keep]:
        path = path_of(session, record.run, record.round, record.path) or ""
        if trainer.is_global_zero and os.path.lexists(path):
            _delete(path, session.options.name, Identity(record.run, record.round))
        state.history.note(record.round, **NOT_SAVED)


def _delete(path: str, name: str, identity: Identity) -> None:
    """Delete the file of a round; one that cannot be deleted, or is another, stays."""
    if roundfile.identity_of(path, state_key(name)) != identity:
        rank_zero_warn(f"{path!r} is not what was saved as round {identity.round} of this run, and is left there.")
        return
    try:
        remove(path)
    except OSError as error:
        rank_zero_warn(f"The old round {path!r} could not be deleted: {error}")
