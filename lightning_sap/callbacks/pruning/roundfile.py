"""The file of a round: how it is named, written, told from others, checked and read. Nothing in it is ever executed."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.serialization import (
    add_safe_globals,
    clear_safe_globals,
    get_safe_globals,
    get_unsafe_globals_in_checkpoint,
    safe_globals,
)

from lightning_sap.callbacks.pruning.agreement import of_ranks, place

METADATA = "meta.pt"  # where a distributed checkpoint of Lightning keeps all that is not sharded
BLOCK = 1 << 20
TO_RESUME = ("optimizer_states", "lr_schedulers", "loops", "MixedPrecision")  # keys of a checkpoint of Lightning
COPIES = ("first_weights", "kept")  # keys of the pruner's state that hold weights again
WRITES_PLAIN = (TorchCheckpointIO, AsyncCheckpointIO)  # write what `torch.save` does, and no error must be lost
CHECKPOINT, FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
IN_METADATA = frozenset(  # what the list of a distributed checkpoint's shards is made of
    {(CHECKPOINT, name) for name in (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )}
    | {(FILES, "_StorageInfo"), ("torch.serialization", "_get_layout"), ("torch", "Size"), ("torch", "device")}
    | {("pathlib", name) for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")}
    | {("pathlib._local", name) for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")}
    | {("collections", "OrderedDict")}
)  # fmt: skip


class Digest(NamedTuple):
    """By what the bytes of a file are known."""

    size: int
    sha256: str


class Identity(NamedTuple):
    """Which round of which run a file says that it is."""

    run: str | None
    round: int


def file_name(name: str, round: int) -> str:
    """Under which a round is saved."""
    return f"{name}-round-{round:03d}.ckpt"


def is_name_of(file: str, name: str, round: int | None = None) -> bool:
    """Whether a file name is that of a round, or of this one; older versions wrote two digits."""
    found = re.fullmatch(rf"{re.escape(name)}-round-(\d{{2,}})\.ckpt", file, re.ASCII)
    return found is not None and round in (None, int(found[1]))


def temporary(name: str, round: int, run: str, token: str) -> str:
    """Under which it stands until it is whole."""
    return f".{file_name(name, round)}.{run}.{token}.tmp"


def is_temporary(file: str, name: str, run: str) -> bool:
    """Whether a file name is one of those that this run gives to what is not whole yet."""
    return re.fullmatch(rf"\.{re.escape(name)}-round-\d+\.ckpt\.{re.escape(run)}\.[0-9a-f]+\.tmp", file) is not None


# -- writing ----------------------------------------------------------------------------------------------------------


class RoundIO(CheckpointIO):
    """Writes one file of the Trainer and notes its digest; an error is kept, for the other processes wait.

    A plugin of the user that writes files of another kind goes on to do so. Without the means to resume, a file has
    the weights and what callbacks keep, but for the copies of weights that the pruner under that key keeps.
    """

    def __init__(self, inner: CheckpointIO, weights_of: str | None = None) -> None:
        self.inner = inner
        self.weights_of = weights_of
        self.digest: Digest | None = None
        self.error: OSError | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint."""
        if self.weights_of is not None:
            states = checkpoint["callbacks"]
            own = {**states[self.weights_of], **dict.fromkeys(COPIES)}
            kept = {key: value for key, value in checkpoint.items() if key not in TO_RESUME}
            checkpoint = {**kept, "callbacks": {**states, self.weights_of: own}}
        try:
            if type(self.inner) in WRITES_PLAIN:
                self.digest = write(checkpoint, path)
            else:
                self.inner.save_checkpoint(checkpoint, path, storage_options)
        except OSError as error:
            self.error = error

    def load_checkpoint(self, path: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Read one, as the inner one does."""
        return self.inner.load_checkpoint(path, *arguments, **options)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete one, as the inner one does."""
        self.inner.remove_checkpoint(path)


class _Hashing:
    """What `torch.save` writes to: the bytes go to a file and into a sum; PyTorch would hide an error of the disk."""

    def __init__(self, file: Any) -> None:
        self.file, self.sum = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            written = int(self.file.write(data))
        except OSError as error:
            self.error = error
            raise
        self.sum.update(data)
        return written

    def flush(self) -> None:
        self.file.flush()


def write(checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> Digest:
    """Write a new file to the disk.

    Raises:
        OSError: If it cannot be written; what there is of it stays.
    """
    with open(path, "xb") as file:
        hashing = _Hashing(file)
        try:
            torch.save(checkpoint, hashing)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise hashing.error or error from None
        file.flush()
        os.fsync(file.fileno())
        return Digest(file.tell(), hashing.sum.hexdigest())


# -- checking ---------------------------------------------------------------------------------------------------------


def digest_of(path: str) -> Digest:
    """Size and SHA-256 of a file; of a folder, of all of its files, of which each process reads some, a collective."""
    if not os.path.isdir(path):
        return _digest(path)
    files = sorted(os.path.relpath(file, path) for file in Path(path).rglob("*") if file.is_file())
    rank, world = place()
    mine = {name: _digest(os.path.join(path, name)) for name in files[rank::world]}
    found = {name: digest for of_rank in of_ranks(mine) for name, digest in of_rank.items()}
    lines = "".join(f"{name}\0{size}\0{text}\n" for name, (size, text) in sorted(found.items()))
    return Digest(sum(size for size, _ in found.values()), hashlib.sha256(lines.encode()).hexdigest())


def flush(path: str) -> None:
    """Have a file, or all files of a folder, on the disk."""
    for file in [path] if os.path.isfile(path) else [str(f) for f in Path(path).rglob("*") if f.is_file()]:
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())


def _digest(path: str) -> Digest:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
        return Digest(file.tell(), found.hexdigest())


def values_of(path: str) -> dict[str, Any]:
    """The plain values and tensors of a checkpoint, of one in shards without its weights; nothing is executed."""
    return _load(os.path.join(path, METADATA) if os.path.isdir(path) else path)


def identity_of(path: str, key: str) -> Identity | None:
    """Which round a file says that it is, by the state under that key; None if it says nothing, or cannot be read."""
    try:
        return identity_in(values_of(path), key)
    except Exception:  # whatever can be wrong with a file that may be anything
        return None


def identity_in(checkpoint: Mapping[str, Any], key: str) -> Identity:
    """Which round a checkpoint says that it is."""
    state = checkpoint["callbacks"][key]
    run = state.get("run")
    return Identity(None if run is None else str(run), int(state["round"]))


# -- reading ----------------------------------------------------------------------------------------------------------


def read(path: str, module: nn.Module) -> dict[str, Any]:
    """The checkpoint of a round; a distributed one in shards as the module's, a collective.

    Objects of classes that PyTorch does not know, as hyperparameters may be, are left out: nothing is executed.
    """
    if not os.path.isdir(path):
        return _load(path)
    checkpoint = _load(os.path.join(path, METADATA))
    state = get_model_state_dict(module, options=StateDictOptions(cpu_offload=True))
    # on the CPU these are the live ones, and they are read into
    weights = {name: value.detach().clone() for name, value in state.items() if isinstance(value, torch.Tensor)}
    load_shards({"state_dict": weights}, storage_reader=_Reader(path), planner=_TensorsOnly())
    return {**checkpoint, "state_dict": weights}


def _load(path: str) -> dict[str, Any]:
    """The plain values and tensors of a file."""
    names = get_unsafe_globals_in_checkpoint(path)
    try:
        return _load_with(path, [(_absent(name), name) for name in names])
    except (pickle.UnpicklingError, TypeError):  # PyTorch fills no dict but its own kinds, as hyperparameters may be
        with _no_safe_dicts():
            names = get_unsafe_globals_in_checkpoint(path)
            return _load_with(path, [(_absent_dict(), name) for name in names])


@contextmanager
def _no_safe_dicts() -> Iterator[None]:
    """Dicts of other kinds that a package has told PyTorch to be safe are unknown for a while, and so replaced."""
    before = get_safe_globals()
    clear_safe_globals()
    add_safe_globals([each for each in before if not (isinstance(each, type) and issubclass(each, dict))])
    try:
        yield
    finally:
        clear_safe_globals()
        add_safe_globals(before)


def _load_with(path: str, known: list[tuple[Callable[..., Any], str]]) -> dict[str, Any]:
    with safe_globals(known):  # type: ignore[arg-type]
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))


def _absent_dict() -> Callable[..., Any]:
    """A class that makes plain dicts."""

    class AbsentDict:
        def __new__(cls, *_: Any, **__: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
            return OrderedDict()

    return AbsentDict


def _absent(name: str) -> Callable[..., Any]:
    """A class that stands for another, and does nothing."""

    class Absent:
        def __new__(cls, *_: Any, **__: Any) -> Absent:
            return object.__new__(cls)

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def __setstate__(self, state: Any) -> None: ...

        def __repr__(self) -> str:
            return f"<{name}, not read>"

    return Absent


class _Reader(FileSystemReader):
    """Reads the list of shards as data: PyTorch's own would unpickle whatever stands in it."""

    def read_metadata(self, *arguments: Any, **options: Any) -> Any:
        del arguments, options
        with open(os.path.join(self.path, ".metadata"), "rb") as file:
            metadata = _Listing(file).load()
        if getattr(metadata, "storage_meta", None) is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class _Listing(pickle.Unpickler):
    """Unpickles the list of shards alone."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in IN_METADATA:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"A list of shards has no {module}.{name}.")


class _TensorsOnly(DefaultLoadPlanner):
    """Reads no pickled objects."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        raise pickle.UnpicklingError(f"{read_item.dest_index.fqn!r} is no tensor in the checkpoint.")
