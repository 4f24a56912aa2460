"""The round archive: a checkpoint of each round's trained model, and the way back to it."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_shards

from lightning_sap.callbacks.pruning.options import Options
from lightning_sap.callbacks.pruning.state import PruningState
from lightning_sap.engine.weights import COMPILE_PREFIX
from lightning_sap.rewind import place_weights, restore_weights_

TAKEN = ".taken"  # an empty file in a folder that a run has chosen, until there is a round in it
METADATA = "meta.pt"  # where a distributed checkpoint of Lightning keeps all that is not sharded


def choose_folder(trainer: Trainer, dirpath: str | Path | None) -> str:
    """A folder that is not there yet or empty, made and marked as taken; on all ranks that of rank 0, a collective.

    Raises:
        ValueError: If it is not on a local disk, which the rounds are read from.
    """
    wanted = os.fspath(dirpath or os.path.join(trainer.log_dir or trainer.default_root_dir, "rounds"))
    if "://" in wanted:
        raise ValueError(
            f"The rounds are saved in a local folder, got {wanted!r}; give dirpath='...', or save_rounds=False (and "
            "PQIMonitor(restore=False))."
        )
    folders = (f"{wanted}-v{i}" if i else wanted for i in itertools.count())
    free = next(filter(_take, map(os.path.abspath, folders))) if trainer.is_global_zero else None
    return str(trainer.strategy.broadcast(free))


def _take(folder: str) -> bool:
    """Mark a folder as that of one run; False if there is something in it."""
    os.makedirs(folder, exist_ok=True)
    if os.listdir(folder):
        return False
    try:
        Path(folder, TAKEN).touch(exist_ok=False)
    except FileExistsError:  # by a run that looked at the same moment
        return False
    return True


def can_save(trainer: Trainer, folder: str) -> bool:
    """Whether the folder of a run that is resumed can be had here; on all ranks what rank 0 finds, a collective."""
    try:
        if trainer.is_global_zero:
            os.makedirs(folder, exist_ok=True)
        able = os.access(folder, os.W_OK)
    except OSError:
        able = False
    return bool(trainer.strategy.broadcast(able))


def path_of(folder: str, name: str, round: int) -> str:
    """Where the checkpoint of a round lies."""
    return os.path.join(folder, f"{name}-round-{round:02d}.ckpt")


def open_folder(trainer: Trainer, options: Options, state: PruningState, wanted: bool, shared: str | None) -> None:
    """Note where the rounds are saved: once chosen, that folder, as long as the options say the same."""
    if not wanted or state.plan.rounds == 0:
        state.folder = None
    elif state.folder is None or not can_save(trainer, state.folder):
        state.folder = shared or choose_folder(trainer, options.dirpath)


def save_round(trainer: Trainer, options: Options, state: PruningState) -> None:
    """Save the round that ends now, once, if that is asked for; a collective."""
    if state.folder is not None and "path" not in state.note:
        before, path = state.note, path_of(state.folder, options.name, state.round)
        state.note = {**before, "path": path}  # which the file says too
        try:
            trainer.save_checkpoint(path, weights_only=False)
        except BaseException:
            state.note = before
            raise
        tidy(trainer, options, state.folder, state)


def tidy(trainer: Trainer, options: Options, folder: str, state: PruningState) -> None:
    """Once the round that ends now is saved: delete the mark, and the checkpoints of rounds too old to be kept."""
    if trainer.is_global_zero:
        Path(folder, TAKEN).unlink(missing_ok=True)
    keep = options.save_rounds
    if keep is None or isinstance(keep, bool):
        return
    for record in [record for record in state.history if record.path and record.round <= state.round - keep]:
        if trainer.is_global_zero:
            _delete(Path(str(record.path)))
        state.history.note(record.round, path=None)


def _delete(path: Path) -> None:
    """Delete a checkpoint; one that cannot be deleted, as of a run that began elsewhere, stays."""
    try:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    except OSError as error:
        rank_zero_warn(f"The old round {str(path)!r} could not be deleted: {error}")


def release(trainer: Trainer, folder: str) -> None:
    """Give up a folder that no round was saved in."""
    if trainer.is_global_zero and os.path.isdir(folder) and os.listdir(folder) == [TAKEN]:
        Path(folder, TAKEN).unlink()
        os.rmdir(folder)


def read_round(path: str, module: nn.Module) -> dict[str, Any]:
    """The checkpoint of a round; a distributed one in shards as the module's, a collective.

    It is unpickled as a whole, since a module's hyperparameters may be any objects: it is a file that we wrote.

    Raises:
        FileNotFoundError: If it is not there any more.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"The round was saved as {path!r}, which is not there any more.")
    if not os.path.isdir(path):
        return dict(torch.load(path, map_location="cpu", weights_only=False, mmap=True))
    checkpoint = dict(torch.load(os.path.join(path, METADATA), map_location="cpu", weights_only=False))
    weights = get_model_state_dict(module, options=StateDictOptions(cpu_offload=True))
    load_shards({"state_dict": weights}, checkpoint_id=path)
    return {**checkpoint, "state_dict": weights}


def restore_model_(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint's weights and buffers into a module, in place; a collective where they are sharded.

    Raises:
        ValueError: If the module has other ones; nothing is written then.
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
    restore_weights_(module, place_weights(module, tensors))
