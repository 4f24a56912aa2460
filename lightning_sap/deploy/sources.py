"""Where tensors come from: modules, dictionaries, and files, which are read one tensor at a time."""

from __future__ import annotations

import pickle
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import torch
from torch import Tensor, nn

from lightning_sap.deploy.container import open_binary, read_header, tensor_of
from lightning_sap.deploy.output_axes import output_axes
from lightning_sap.deploy.reading import ZIP, Named, is_safetensors, tensors_of

Source: TypeAlias = nn.Module | Mapping[str, Any] | str | Path

STATES = ("state_dict", "model_state_dict", "model", "module")  # where files keep the weights
PLAIN = (Tensor, nn.Parameter, nn.Buffer)


@contextmanager
def opened(source: Source) -> Iterator[list[Named]]:
    """The tensors of a module, a ``state_dict``, a checkpoint as a dictionary, or a file.

    Raises:
        TypeError: If it is nothing of these, or holds what is no tensor.
        ValueError: If a file is damaged, or is no file of tensors.
    """
    if isinstance(source, nn.Module):
        axes = output_axes(source)
        yield [named._replace(axis=axes.get(named.name, 0)) for named in _in_memory(source.state_dict())]
    elif isinstance(source, Mapping):
        yield list(_in_memory(state_of(source, "The dictionary")))
    elif isinstance(source, str | Path):
        with open_binary(source) as file:
            yield list(_of_file(file, Path(source)))
    else:
        raise TypeError(f"A module, a state_dict or a path is taken, got {type(source).__name__}.")


def state_of(loaded: Any, what: str) -> Mapping[str, Tensor]:
    """The ``state_dict`` in what a file or a dictionary holds.

    Raises:
        ValueError: If there is none.
        TypeError: If it holds what is no tensor.
    """
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{what} holds a {type(loaded).__name__}, not a state_dict: save model.state_dict().")
    for key in STATES:
        if isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    strange = {str(name): type(value).__name__ for name, value in loaded.items() if not isinstance(value, Tensor)}
    if len(strange) == len(loaded) > 0:
        raise ValueError(f"{what} has no state_dict: it holds {', '.join(sorted(strange)[:8])}.")
    if strange:
        name, kind = next(iter(strange.items()))
        raise TypeError(f"{what} holds a {kind} at {name!r}; a state_dict of tensors alone is taken.")
    state: Mapping[str, Tensor] = loaded
    return state


def _of_file(file: BinaryIO, path: Path) -> Iterator[Named]:
    if is_safetensors(file):
        yield from tensors_of(file, path, read_header(file, path))
    else:
        yield from _checkpoint_of(file, path)


def _in_memory(state: Mapping[str, Any]) -> Iterator[Named]:
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"The state holds a {type(tensor).__name__} at {name!r}; only tensors can be stored.")
        if type(tensor) not in PLAIN or tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise TypeError(
                f"{name!r} is a {type(tensor).__name__} on {tensor.device} of layout {tensor.layout}; "
                "give plain dense tensors: tensor.full_tensor(), tensor.to_dense() or tensor.dequantize()."
            )
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj())
        yield Named(name, partial(_same, tensor), place if tensor.numel() else None)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _checkpoint_of(file: BinaryIO, path: Path) -> Iterator[Named]:
    """The tensors of a file of ``torch.save``, each read when it is asked for; PyTorch 2.6 maps the file."""
    file.seek(0)
    zipped = file.read(4) == ZIP and _is_little(path)
    lazy = zipped and torch.__version__ >= "2.7"  # before, tensors do not say where they lie, and "meta" loads them
    state = state_of(_unpickled(path, map_location="meta" if lazy else "cpu", mmap=zipped and not lazy), str(path))
    if not all(_offset(tensor) is not None for tensor in state.values()) and lazy:
        lazy, state = False, state_of(_unpickled(path, map_location="cpu", mmap=True), str(path))
    if not lazy:
        yield from _in_memory(state)
        return
    for name, tensor in state.items():
        place = (_offset(tensor), tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride())
        yield Named(name, partial(_read, file, path, name, tensor), place)


def _unpickled(path: Path, **options: Any) -> Any:
    try:
        return torch.load(path, weights_only=True, **options)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it is no file of weights alone, and running what else it holds is not safe. Save "
            f"model.state_dict(). (torch.load with weights_only=True: {_first_line(error)})"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is damaged, or holds no weights: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _is_little(path: Path) -> bool:
    """Whether the bytes of the numbers stand as this machine reads them."""
    try:
        with zipfile.ZipFile(path) as archive:
            orders = [archive.read(name) for name in archive.namelist() if name.endswith("/byteorder")]
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} is cut off or damaged: {_first_line(error)}") from error
    return sys.byteorder == "little" and orders in ([], [b"little"])


def _offset(tensor: Tensor) -> int | None:
    """Where the storage of a tensor begins in its file; None where this version of PyTorch does not tell."""
    return getattr(tensor.untyped_storage(), "_checkpoint_offset", None)


def _read(file: BinaryIO, path: Path, name: str, told: Tensor) -> Tensor:
    """The tensor that one on the device ``meta`` tells of."""
    reach = sum((size - 1) * step for size, step in zip(told.shape, told.stride(), strict=True)) + 1
    data = bytearray(reach * told.element_size() if told.numel() else 0)
    file.seek((_offset(told) or 0) + int(told.storage_offset()) * told.element_size())
    if file.readinto(data) != len(data):  # type: ignore[attr-defined]
        raise ValueError(f"{path} is cut off: it ends within {name!r}.")
    flat = tensor_of(data, told.dtype, (len(data) // told.element_size(),))
    return flat.as_strided(told.shape, told.stride()) if data else flat.reshape(told.shape)
