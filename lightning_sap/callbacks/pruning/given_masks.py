"""Masks that a user gives a run to start under: from a dictionary, a file, a history, another callback."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_sap.callbacks.pruning.checks import STATE_PREFIX, state_key
from lightning_sap.callbacks.pruning.roundfile import METADATA, values_of
from lightning_sap.callbacks.pruning.state import PruningState
from lightning_sap.rounds.history import History, RoundRecord

TAKEN = (
    "a mapping from the names of parameters to bool tensors, True where a weight is kept; a path to a checkpoint, a "
    "round, a file of save_sparse, or such a mapping saved by torch.save; the history of a run whose rounds were "
    "saved, or a record of it; or another pruning callback"
)


def check_given(masks: object) -> None:
    """Raise for what cannot be masks at the start.

    Raises:
        TypeError: If it is of another kind; it says what is taken.
        ValueError: If it is a mapping of nothing.
    """
    if isinstance(masks, Mapping):
        if not masks:
            raise ValueError("masks is empty and names no parameter: give None to start dense, or a mask by its name.")
        for name, mask in masks.items():
            if not (isinstance(name, str) and isinstance(mask, Tensor) and mask.dtype == torch.bool):
                got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(f"masks[{name!r}] must be a bool tensor, True where a weight is kept, got {got}.")
    elif not (masks is None or isinstance(masks, str | Path | History | RoundRecord) or _is_pruner(masks)):
        raise TypeError(f"masks must be None, or {TAKEN}; got {type(masks).__name__}.")


def given_masks(masks: Any, name: str) -> dict[str, Tensor]:
    """Where weights are kept, by the names of parameters, on the CPU.

    Args:
        masks: What the option was given.
        name: The name of the callback, under which a checkpoint holds its state.

    Raises:
        ValueError: If there are none in it.
        FileNotFoundError: If there is no such file.
    """
    if _is_pruner(masks):
        found = dict(masks.masks)
        if not found:
            raise ValueError(f"masks={type(masks).__name__}(…) was not in a fit yet, and has no masks.")
        return found
    if isinstance(masks, History | RoundRecord):
        masks = _path_of([masks] if isinstance(masks, RoundRecord) else list(masks))
    return dict(masks) if isinstance(masks, Mapping) else _of_file(str(masks), name)


def _is_pruner(masks: object) -> bool:
    return hasattr(masks, "restore_round") and isinstance(getattr(masks, "masks", None), Mapping)


def _path_of(records: list[RoundRecord]) -> str:
    """The file of the round that was put back, else of the latest that was saved."""
    saved = [record for record in records if record.path]
    if not saved:
        raise ValueError(
            f"masks=History(…) has {len(records)} rounds, and none was saved. Give save_rounds=True to the run before, "
            "or its masks themselves (callback.masks)."
        )
    return str(next((record for record in saved if record.restored), saved[-1]).path)


def _of_file(path: str, name: str) -> dict[str, Tensor]:
    if not os.path.exists(path):
        raise FileNotFoundError(f"masks={path!r}: there is no such file.")
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, METADATA)):
        raise ValueError(f"masks={path!r} is a folder and no checkpoint, which would have a {METADATA}: give {TAKEN}.")
    if os.path.isfile(path) and (packed := _of_packed(path)) is not None:
        return packed
    try:
        found = values_of(path)
    except Exception as error:  # whatever can be wrong with a file that may be anything
        raise ValueError(f"masks={path!r} is damaged, or no file of masks: give {TAKEN}.") from error
    callbacks = found.get("callbacks")
    if isinstance(callbacks, Mapping) and (
        states := {k: v for k, v in callbacks.items() if k.startswith(STATE_PREFIX)}
    ):
        return _of_state(path, states, name)
    if found and all(isinstance(mask, Tensor) and mask.dtype == torch.bool for mask in found.values()):
        return found
    raise ValueError(f"masks={path!r} holds no masks: give {TAKEN}.")


def _of_packed(path: str) -> dict[str, Tensor] | None:
    """Of the matrices of a packed file that have zeros, whatever it is called; None for a file of another kind."""
    from lightning_sap.deploy.reading import is_safetensors
    from lightning_sap.deploy.sparse_file import load_sparse

    with open(path, "rb") as file:
        if not is_safetensors(file):
            return None
    try:
        tensors = load_sparse(path)
    except ValueError as error:
        raise ValueError(f"masks={path!r}: {error} Give {TAKEN}.") from error
    found = {key: tensor != 0 for key, tensor in tensors.items() if tensor.dim() > 1 and (tensor == 0).any()}
    if not found:
        raise ValueError(f"masks={path!r} has no zero in any matrix: it was not pruned. Give {TAKEN}.")
    return found


def _of_state(path: str, states: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """Of the callback of that name in a checkpoint, or of the only one."""
    own = states.get(state_key(name), next(iter(states.values())) if len(states) == 1 else None)
    if own is None:
        names = [key.removeprefix(STATE_PREFIX) for key in states]
        raise ValueError(f"masks={path!r} holds the masks of {names}: give the callback one of these as its name.")
    try:
        found = PruningState.unpack(own).masks.kept
    except ValueError as error:
        raise ValueError(f"masks={path!r}: {error}") from error
    if not found:
        raise ValueError(f"masks={path!r} holds no masks: it was saved before its callback was in a fit. Give {TAKEN}.")
    return found
