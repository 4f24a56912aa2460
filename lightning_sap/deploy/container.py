"""The container of the files: safetensors, eight bytes of length, a header in JSON, then the bytes of the tensors.

Reading takes one tensor at a time; writing needs no size beforehand, and leaves a whole file or none.
"""

from __future__ import annotations

import io
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from lightning_sap.files import replacing

LENGTH = 8  # bytes that say how long the header is
LONGEST_HEADER = 100_000_000  # as in the safetensors library
IN_MEMORY = 1 << 26  # bytes that wait in memory until the header is known; more wait in a file
BLOCK = 1 << 20
METADATA = "__metadata__"
NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {key: getattr(torch, name) for key, name in NAMES.items() if hasattr(torch, name)}
KEYS = {dtype: key for key, dtype in DTYPES.items()}
ITEM_SIZES = {key: dtype.itemsize for key, dtype in DTYPES.items()}


class Stored(NamedTuple):
    """One tensor of a file: dtype by the name in the file, shape, and where its bytes begin and end in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """What the header of a file says: texts by key, and the tensors by name."""

    metadata: dict[str, str]
    tensors: dict[str, Stored]


def read_header(file: BinaryIO, path: str | Path) -> Header:
    """The header of a safetensors file, checked against the file's length.

    Raises:
        ValueError: If it is no safetensors file, is cut off, or contradicts itself; the message says where.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    length = int.from_bytes(file.read(LENGTH), "little")
    if size < LENGTH or not 2 <= length <= LONGEST_HEADER:
        raise ValueError(f"{path} is not a safetensors file: it does not begin with the length of a header.")
    if LENGTH + length > size:
        raise ValueError(f"{path} is cut off: its header has {length:,} bytes, the file only {size:,}.")
    try:
        header = json.loads(file.read(length))
        metadata = {str(key): str(text) for key, text in header.pop(METADATA, {}).items()}
        tensors = {name: _stored(entry, LENGTH + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or is not a safetensors file: its header cannot be read.") from error
    _check_layout(path, tensors, LENGTH + length, size)
    return Header(metadata, tensors)


def read_bytes(file: BinaryIO, path: str | Path, name: str, stored: Stored) -> bytearray:
    """The bytes of one tensor.

    Raises:
        ValueError: If the file ends before them.
    """
    data = bytearray(stored.end - stored.begin)
    file.seek(stored.begin)
    if read_into(file, data) != len(data):
        raise ValueError(f"{path} is cut off: it ends within {name!r}.")
    return data


def read_into(file: BinaryIO, data: bytearray) -> int:
    """Fill a buffer from the file; how many bytes there were."""
    view, done = memoryview(data), 0
    while done < len(data) and (count := file.readinto(view[done:])):  # type: ignore[attr-defined]
        done += count
    return done


class Writer:
    """Takes tensors one after the other; they wait until all are known, for the header stands before them."""

    def __init__(self, folder: Path) -> None:
        self._waiting = tempfile.SpooledTemporaryFile(IN_MEMORY, dir=str(folder))  # noqa: SIM115  # closed by `writing`
        self._tensors: dict[str, Stored] = {}
        self.metadata: dict[str, str] = {}

    def add(self, name: str, dtype: str, shape: Sequence[int], parts: Iterable[Any]) -> None:
        """Take one tensor: the file's name of its dtype, its shape, and its bytes in any number of parts."""
        if name == METADATA:
            raise ValueError(f"A tensor cannot be named {METADATA!r}: the file keeps its texts under that name.")
        begin = self._waiting.tell()
        for part in parts:
            self._waiting.write(memoryview(part).cast("B") if len(part) else b"")
        self._tensors[name] = Stored(dtype, tuple(shape), begin, self._waiting.tell())

    def finish(self, file: BinaryIO) -> None:
        """Write header and tensors, those of the widest dtype first, so that each stands at a multiple of its size."""
        order = sorted(self._tensors.items(), key=lambda item: -ITEM_SIZES[item[1].dtype])
        header: dict[str, Any] = {METADATA: self.metadata} if self.metadata else {}
        offset = 0
        for name, (dtype, shape, begin, end) in order:
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + end - begin]}
            offset += end - begin
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % LENGTH)
        file.write(len(text).to_bytes(LENGTH, "little") + text)
        for _, (_, _, begin, end) in order:
            self._waiting.seek(begin)
            for at in range(begin, end, BLOCK):
                file.write(self._waiting.read(min(BLOCK, end - at)))

    def close(self) -> None:
        """Let go of what waits."""
        self._waiting.close()


@contextmanager
def writing(path: str | Path) -> Iterator[Writer]:
    """A writer whose file takes its place when the block ends; after an exception all is as it was before.

    Raises:
        FileNotFoundError: If the folder does not exist.
    """
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"The folder {folder} of {Path(path).name} does not exist.")
    writer = Writer(folder)
    try:
        yield writer
        with replacing(path) as file:
            writer.finish(file)
    finally:
        writer.close()


def tensor_of(data: bytearray, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """The tensor that has these bytes; it shares their memory."""
    if not data:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(tuple(shape))


def open_binary(path: str | Path) -> io.BufferedReader:
    """A file to read from."""
    return open(path, "rb")


def _stored(entry: Mapping[str, Any], start: int) -> Stored:
    begin, end = (int(offset) for offset in entry["data_offsets"])
    return Stored(str(entry["dtype"]), tuple(int(size) for size in entry["shape"]), start + begin, start + end)


def _check_layout(path: str | Path, tensors: Mapping[str, Stored], start: int, size: int) -> None:
    """Raise unless the tensors fill the file one behind the other, each as long as its shape says."""
    at = start
    for name, (dtype, shape, begin, end) in sorted(tensors.items(), key=lambda item: item[1][2:]):
        told = math.prod(shape) * ITEM_SIZES[dtype] if dtype in ITEM_SIZES else end - begin
        if begin != at or end - begin != told or min(shape, default=0) < 0:
            raise ValueError(f"{path} is damaged: the header contradicts itself at {name!r}.")
        at = end
    if at > size:
        raise ValueError(f"{path} is cut off: {at:,} bytes belong to it, {size:,} are there.")
    if at < size:
        raise ValueError(f"{path} is damaged: {size - at:,} bytes after its last tensor belong to nothing.")
