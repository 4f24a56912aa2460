"""WHERE rounds lie: only in folders that the options and the Trainer name, and there in those of a run's own files."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from lightning.pytorch import Trainer

from lightning_sap.callbacks.pruning.checks import state_key
from lightning_sap.callbacks.pruning.options import Options
from lightning_sap.callbacks.pruning.roundfile import identity_of, is_name_of

TAKEN = ".taken"  # a file with a run's identity in the folder that it has chosen, until there is a round in it
DEFAULT = "rounds"


def wanted(options: Options, trainer: Trainer) -> str:
    """The folder that the options and the Trainer name; a collective.

    Raises:
        ValueError: If it is not on a local disk, which the rounds are read from.
    """
    logs = trainer.log_dir or trainer.default_root_dir
    folder = os.path.expanduser(options.dirpath or os.path.join(logs, DEFAULT))
    if "://" in folder:
        raise ValueError(
            f"The rounds are saved in a local folder, got {folder!r}; give dirpath='...', or save_rounds=False (and "
            "PQIMonitor(restore=False))."
        )
    return os.path.abspath(folder)


def take(folder: str, run: str) -> str:
    """The folder, or the first one with a number behind it, that is not there yet or empty; made and marked.

    Raises:
        OSError: If it cannot be written.
    """
    return next(path for path in (f"{folder}-v{i}" if i else folder for i in itertools.count()) if _take(path, run))


def _take(folder: str, run: str) -> bool:
    """Mark a folder as that of one run; False if there is something in it."""
    os.makedirs(folder, exist_ok=True)
    if os.listdir(folder):
        return False
    try:
        with open(os.path.join(folder, TAKEN), "x", encoding="utf-8") as file:
            file.write(run)
    except FileExistsError:  # by a run that looked at the same moment
        return False
    return True


def release(folder: str, run: str) -> None:
    """Give up a folder that this run has marked, and saved no round in; one that cannot be written stays."""
    with suppress(OSError):
        if os.listdir(folder) == [TAKEN] and _mark(folder) == run:
            os.unlink(os.path.join(folder, TAKEN))
            os.rmdir(folder)


def unmark(folder: str) -> None:
    """The folder has a round in it, by which it is known from now on."""
    with suppress(OSError):
        os.unlink(os.path.join(folder, TAKEN))


def _mark(folder: str) -> str | None:
    with suppress(OSError, ValueError):
        return Path(folder, TAKEN).read_text(encoding="utf-8")
    return None


def owned(folder: str, name: str, run: str | None) -> bool:
    """Whether a folder is marked by this run, or has a round of it under that name; older rounds name no run."""
    if run is not None and _mark(folder) == run:
        return True
    with suppress(OSError):
        files = [os.path.join(folder, file) for file in sorted(os.listdir(folder)) if is_name_of(file, name)]
        found = (identity_of(path, state_key(name)) for path in files)
        return any(identity is not None and identity.run == run for identity in found)
    return False


def known(options: Options, trainer: Trainer | None, stored: str | None) -> list[str]:
    """The folders in which rounds of a run that is resumed may lie, nearest first; a collective with a Trainer.

    These are the one that the options name and its numbered ones, and without ``dirpath`` those of the name that is
    stored (where a state says so, inside) in what the Trainer names: its folders of logs and the place of the
    checkpoint that it resumes from.
    """
    places = [] if trainer is None else [wanted(options, trainer)]
    if trainer is None and options.dirpath is not None:
        places = [os.path.abspath(os.path.expanduser(options.dirpath))]
    for parent in [] if trainer is None else _parents(trainer):
        inside = os.path.join(parent, re.sub(r"-v\d+$", "", stored or DEFAULT))
        places += [inside] if is_inside(inside, parent) else []
        places += [os.path.join(parent, os.path.basename(inside))]
    return list(dict.fromkeys(itertools.chain.from_iterable(_numbered(os.path.abspath(place)) for place in places)))


def named_by(options: Options, folders: Iterable[str], trainer: Trainer) -> list[str]:
    """Of these folders, those that a run may write to: with ``dirpath`` that one and its numbered ones alone."""
    if options.dirpath is None:
        return list(folders)
    own = _numbered(wanted(options, trainer))
    return [folder for folder in folders if folder in own]


def relative(folder: str, trainer: Trainer) -> str:
    """A folder as it is kept in a state: inside what the Trainer names, else its name alone."""
    for parent in _parents(trainer):
        if is_inside(folder, parent):
            return os.path.relpath(os.path.realpath(folder), os.path.realpath(parent))
    return os.path.basename(folder)


def is_inside(path: str, parent: str) -> bool:
    """Whether a path lies inside a folder, links followed."""
    path, parent = os.path.realpath(path), os.path.realpath(parent)
    return path != parent and path.startswith(os.path.join(parent, ""))


def _parents(trainer: Trainer) -> list[str]:
    """The folders that the Trainer names: of the logs, and around the checkpoint that it resumes from."""
    file = str(trainer.ckpt_path or "")
    beside = [] if not file or "://" in file else [Path(os.path.abspath(file)).parent]
    loggers = [logger.save_dir for logger in trainer.loggers if logger.save_dir]
    found = map(str, [trainer.default_root_dir, *loggers, *beside, *(path.parent for path in beside)])
    return [os.path.abspath(path) for path in found if "://" not in path]


def _numbered(folder: str) -> list[str]:
    """A folder and those with a number behind its name, as far as they are there."""
    parent, stem = os.path.split(folder)
    with suppress(OSError):
        there = [name for name in os.listdir(parent) if re.fullmatch(rf"{re.escape(stem)}(-v\d+)?", name)]
        paths = [os.path.join(parent, name) for name in sorted(there, key=lambda name: (len(name), name))]
        return [path for path in paths if os.path.isdir(path)]
    return []
