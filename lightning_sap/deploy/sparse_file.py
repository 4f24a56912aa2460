"""Packed files: of each pruned tensor a mask and the values that survive, the rest as it is."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sap.deploy.container import KEYS, Writer, open_binary, read_header, writing
from lightning_sap.deploy.packing import VALUES, Values, as_it_is, is_packed, pack, raw_bytes
from lightning_sap.deploy.reading import INDEX, Named, index_of_file, index_texts, is_safetensors, tensors_of
from lightning_sap.deploy.sources import opened


def save_sparse(
    source: nn.Module | Mapping[str, Any] | str | Path,
    path: str | Path,
    *,
    values: Values = "same",
    compress: bool = True,
) -> None:
    """Write weights into one safetensors file: of what is pruned only the survivors and one bit per weight.

    A tensor is packed where that is smaller; all others stand in the file as they are. Tied weights are stored once.
    Nothing is pickled. The file is written whole or not at all. :func:`load_sparse` reads it.

    Args:
        source: A module, a ``state_dict``, a checkpoint of Lightning (its dictionary), or the path of a file: such a
            checkpoint, a ``state_dict`` saved by PyTorch, or a safetensors file. Files are read one tensor at a time.
        path: The file to write.
        values: How the survivors are stored: ``"same"``, bit for bit; ``"float16"``, of float32 and float64; or
            ``"int8"``, with a scale per output channel as in :func:`quantize_survivors`. The last two take weights of
            two or more dimensions that have zeros, and leave all else as it is.
        compress: Whether masks and values are also compressed by zlib, where that pays.

    Raises:
        ValueError: If ``values`` is unknown, or cannot hold the weights; if a file is damaged or holds no weights.
        TypeError: If the source holds what is no dense tensor.
        FileNotFoundError: If the file to read or the folder to write into does not exist.

    Example:
        >>> import os, tempfile
        >>> import torch
        >>> path = os.path.join(tempfile.mkdtemp(), "sparse.safetensors")
        >>> weight = torch.eye(256)  # 262,144 bytes
        >>> save_sparse({"weight": weight}, path)
        >>> os.path.getsize(path) < 1000, bool(load_sparse(path)["weight"].equal(weight))
        (True, True)
    """
    if values not in VALUES:
        raise ValueError(f"values must be one of {', '.join(map(repr, VALUES))}, got {values!r}.")
    index: dict[str, dict[str, Any]] = {}
    with opened(source) as tensors, writing(path) as writer:
        first: dict[Hashable, str] = {}
        for named in tensors:
            if named.key is not None and named.key in first:
                index[named.name] = {**index[first[named.key]], "same_as": first[named.key]}
            else:
                first[named.key] = named.name
                index[named.name] = _add(writer, named, values, compress)
        writer.metadata |= index_texts(index)
    if not any(is_packed(entry) for entry in index.values()):
        warnings.warn(
            f"No tensor has zeros enough to be packed: {path} is as large as a dense file, all values as they are.",
            stacklevel=2,
        )


def load_sparse(path: str | Path) -> dict[str, Tensor]:
    """The ``state_dict`` of a file of :func:`save_sparse`, dense, ready for ``load_state_dict`` of the dense model.

    Args:
        path: The file.

    Returns:
        By name the tensors, on the CPU, in the shapes and dtypes that were saved; tied ones are one tensor.

    Raises:
        ValueError: If the file is cut off, damaged, or was not written by :func:`save_sparse`; the message says which.
        FileNotFoundError: If there is no such file.
    """
    state: dict[str, Tensor] = {}
    with _packed(path) as tensors:
        for named in tensors:
            state[named.name] = named.load() if named.key == named.name else state[str(named.key)]
    return state


def write_dense(path: str | Path, out: str | Path) -> None:
    """Write the tensors of a packed file into a plain safetensors file, one at a time; tied ones stand there each.

    Raises:
        ValueError: If the file is not a packed one, or a dtype has no name in safetensors files.
    """
    with _packed(path) as tensors, writing(out) as writer:
        for named in tensors:
            tensor = named.load()
            if tensor.dtype not in KEYS:
                raise ValueError(
                    f"{named.name!r} is {tensor.dtype}, which safetensors files lack; unpack to a .pt file."
                )
            writer.add(named.name, KEYS[tensor.dtype], tensor.shape, [raw_bytes(tensor)])


def unpacked_bytes(path: str | Path) -> int:
    """How many bytes the tensors of a packed file take when they are dense; tied ones once."""
    with open_binary(path) as file:
        index = index_of_file(Path(path), read_header(file, path))
    entries = [entry for entry in index.values() if "same_as" not in entry]
    return sum(math.prod(entry["shape"]) * getattr(torch, entry["dtype"]).itemsize for entry in entries)


@contextmanager
def _packed(path: str | Path) -> Iterator[Iterator[Named]]:
    with open_binary(path) as file:
        if not is_safetensors(file):
            raise ValueError(f"{path} is not a file of save_sparse, or its start is damaged.")
        header = read_header(file, path)
        if INDEX not in header.metadata:
            raise ValueError(f"{path} is not a file of save_sparse; read it with safetensors.torch.load_file(path).")
        yield tensors_of(file, Path(path), header)


def _add(writer: Writer, named: Named, values: Values, compress: bool) -> dict[str, Any]:
    """Give one tensor to the writer; what the index says of it."""
    tensor = named.load()
    packed = pack(named.name, tensor, values, compress, named.axis)
    entry, parts = packed or as_it_is(tensor)
    if packed is None and tensor.dtype in KEYS:
        writer.add(named.name, KEYS[tensor.dtype], tensor.shape, parts)
    else:
        writer.add(named.name, "U8", [sum(map(len, parts))], parts)
    entry["crc32"] = 0
    for part in parts:
        entry["crc32"] = zlib.crc32(part, entry["crc32"])
    return entry
