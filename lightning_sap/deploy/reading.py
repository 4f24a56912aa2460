"""The tensors of safetensors files, one at a time: as they stand there, or unpacked by the file's index."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from lightning_sap.deploy.container import DTYPES, Header, read_bytes, tensor_of
from lightning_sap.deploy.packing import unpack

INDEX, CHECK = "lightning_sap", "lightning_sap_crc32"  # keys of the file's texts
VERSION = 1
ZIP = b"PK\x03\x04"


class Named(NamedTuple):
    """One tensor to be had: its name, how to get it, and a key that tensors which are one and the same share."""

    name: str
    load: Callable[[], Tensor]
    key: Hashable = None
    axis: int = 0


def is_safetensors(file: BinaryIO) -> bool:
    """Whether a file begins as safetensors files do."""
    file.seek(0)
    start = file.read(9)
    return start[:4] != ZIP and start[8:] == b"{"


def _plain(file: BinaryIO, path: Path, header: Header) -> Iterator[Named]:
    """The tensors of a safetensors file as they stand there."""
    for name, stored in header.tensors.items():
        if stored.dtype not in DTYPES:
            raise ValueError(f"{path} holds {name!r} as {stored.dtype}, which PyTorch {torch.__version__} lacks.")

        def load(name: str = name) -> Tensor:
            stored = header.tensors[name]
            return tensor_of(read_bytes(file, path, name, stored), DTYPES[stored.dtype], stored.shape)

        yield Named(name, load)


def tensors_of(file: BinaryIO, path: Path, header: Header) -> Iterator[Named]:
    """The tensors of a file, of a packed one unpacked; there the key of a tied tensor is the name of the first.

    Raises:
        ValueError: If index and header disagree.
    """
    if INDEX not in header.metadata:
        yield from _plain(file, path, header)
        return
    index = index_of_file(path, header)
    for name, entry in index.items():
        first = str(entry.get("same_as", name))

        def load(name: str = first) -> Tensor:
            return _load(file, path, header, name, index[name])

        yield Named(name, load, first)


def index_texts(index: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The texts of a file that tell how each tensor is stored."""
    text = json.dumps({"version": VERSION, "tensors": index}, separators=(",", ":"))
    return {INDEX: text, CHECK: str(zlib.crc32(text.encode()))}


def index_of_file(path: Path, header: Header) -> dict[str, dict[str, Any]]:
    """What a packed file tells of each tensor.

    Raises:
        ValueError: If index and header disagree.
    """
    text = header.metadata[INDEX]
    if str(zlib.crc32(text.encode())) != header.metadata.get(CHECK):
        raise ValueError(f"{path} is damaged: its index is not the one that was written.")
    index = json.loads(text)
    if index["version"] != VERSION:
        raise ValueError(f"{path} is of version {index['version']}, this reads {VERSION}; update lightning-sap.")
    stored = {name for name, entry in index["tensors"].items() if "same_as" not in entry}
    if stored != set(header.tensors):
        raise ValueError(f"{path} is damaged: header and index name different tensors.")
    tensors: dict[str, dict[str, Any]] = index["tensors"]
    return tensors


def _load(file: BinaryIO, path: Path, header: Header, name: str, entry: Mapping[str, Any]) -> Tensor:
    stored = header.tensors[name]
    data = read_bytes(file, path, name, stored)
    if zlib.crc32(data) != entry["crc32"]:
        raise ValueError(f"{path} is damaged: the bytes of {name!r} are not those that were written.")
    try:
        return unpack(entry, data)
    except (ValueError, RuntimeError, KeyError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read at {name!r}: {error}.") from error
