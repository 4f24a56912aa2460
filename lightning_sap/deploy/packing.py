"""One tensor packed: a mask of one bit per weight, and the values where it is set."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_sap.deploy.container import tensor_of
from lightning_sap.deploy.quantize import dequantize, is_weight, quantize

Values: TypeAlias = Literal["same", "float16", "int8"]
Bytes: TypeAlias = npt.NDArray[np.uint8]

VALUES = ("same", "float16", "int8")
LEVEL = 1  # of zlib: higher ones take several times as long for a hundredth
SAMPLE = 1 << 16  # bytes that tell whether compressing pays
WORTH = 0.97
TOLD = 64  # bytes that the index takes to tell of a packed tensor
# Bits that follow no pattern are a fifth smaller, and sooner, without a search for repetitions; whole rows need it.
STRATEGIES = (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY)
SIGNED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # that have a zero of each sign
WIDTHS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Packed(NamedTuple):
    """What the index of a file says of a tensor, and its bytes."""

    entry: dict[str, Any]
    parts: list[Any]


def raw_bytes(tensor: Tensor) -> Bytes:
    """The bytes of a tensor in order, on the CPU."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy() if plain.numel() else np.empty(0, np.uint8)


def pack(name: str, tensor: Tensor, values: Values, compress: bool, axis: int = 0) -> Packed | None:
    """Mask and values of a tensor; None where it is no smaller that way.

    Where zeros of both signs are among the floats, one bit for each zero says which. With fewer bits (``values``) go
    the floating weights of two or more dimensions that have zeros.

    Raises:
        ValueError: If its weights cannot be held by fewer bits.
    """
    entry = _entry(tensor)
    words = _words(raw_bytes(tensor), tensor.element_size())
    kept, signs = _survivors(words, tensor.dtype)
    least = math.ceil(tensor.numel() / 8) + np.count_nonzero(kept)  # bytes that mask and values take at the least
    fewer = bool(least < tensor.nbytes and is_weight(name, tensor) and not kept.all())
    first = {"mask": np.packbits(kept), **signs}
    if fewer and values == "int8":
        numbers, scale = quantize(name, tensor.cpu(), axis)
        words = raw_bytes(numbers)
        kept = words != 0
        first = {"mask": np.packbits(kept), "scale": raw_bytes(scale)}
        entry |= {"stored": "int8", "scale": list(scale.shape)}
    chosen = words[kept]
    if fewer and values == "float16" and tensor.dtype in (torch.float32, torch.float64):
        chosen = _halves(name, chosen, tensor.dtype)
        entry["stored"] = "float16"
        first.pop("signs", None)
    width = chosen.itemsize * math.prod(chosen.shape[1:])
    if sum(map(len, first.values())) + len(chosen) * width + TOLD > tensor.nbytes:
        return None
    return _parts(entry, first, chosen.view(np.uint8).reshape(len(chosen), width), compress)


def unpack(entry: Mapping[str, Any], data: bytearray) -> Tensor:
    """The dense tensor of an entry and its bytes.

    Raises:
        ValueError: If they do not belong together.
    """
    shape, dtype, stored = _told(entry)
    if not is_packed(entry):
        return tensor_of(data, dtype, shape)
    parts = _split(entry, data)
    count = math.prod(shape)
    kept = np.unpackbits(parts["mask"][0], count=count).view(bool)
    survivors = int(np.count_nonzero(kept))
    if sum(map(len, parts["values"])) != survivors * stored.itemsize:
        raise ValueError("mask and values disagree")
    chosen = _words(np.ascontiguousarray(np.stack(parts["values"], axis=1)).reshape(-1), stored.itemsize)
    words = np.zeros((count, *chosen.shape[1:]), chosen.dtype)
    words[kept] = chosen
    if "signs" in parts:
        signs = np.unpackbits(parts["signs"][0], count=count - survivors)
        words[~kept] = signs.astype(words.dtype) << (8 * stored.itemsize - 1)
    dense = torch.from_numpy(words.view(np.uint8).reshape(-1)).view(stored).reshape(shape)
    if "scale" not in parts:
        return dense.to(dtype)
    scale = torch.from_numpy(parts["scale"][0].copy()).view(torch.float32)
    return dequantize(dense, scale.reshape(entry["scale"]), dtype)


def is_packed(entry: Mapping[str, Any]) -> bool:
    """Whether an entry tells of a mask and values, not of a tensor as it is."""
    return bool(entry["parts"][0][0] == "mask")


def as_it_is(tensor: Tensor) -> Packed:
    """The entry and the bytes of a tensor that is not packed."""
    return Packed(_entry(tensor) | {"parts": [["values", 0, tensor.nbytes, False]]}, [raw_bytes(tensor)])


def _entry(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def _words(data: Bytes, size: int) -> npt.NDArray[Any]:
    """Bytes as whole numbers of the size of an element; elements of other sizes as rows of the largest that fits."""
    if size in WIDTHS:
        return data.view(WIDTHS[size])
    width = math.gcd(size, 8)
    return data.view(WIDTHS[width]).reshape(-1, size // width)


def _survivors(words: npt.NDArray[Any], dtype: torch.dtype) -> tuple[npt.NDArray[np.bool_], dict[str, Bytes]]:
    """Where an element is not zero; and the signs of the zeros, where there are negative ones."""
    if dtype not in SIGNED:
        return np.asarray(words.reshape(len(words), -1).any(1), bool), {}
    magnitudes = words & np.array((1 << 8 * dtype.itemsize - 1) - 1, words.dtype)
    kept = magnitudes != 0
    if bool(((words != 0) == kept).all()):
        return kept, {}
    return kept, {"signs": np.packbits(words[~kept] != 0)}


def _halves(name: str, words: npt.NDArray[Any], dtype: torch.dtype) -> npt.NDArray[Any]:
    weights = words.view(np.float32 if dtype == torch.float32 else np.float64)
    with np.errstate(over="ignore"):
        halves = weights.astype(np.float16)
    if bool((np.isinf(halves) & np.isfinite(weights)).any()):
        largest = float(np.abs(weights[np.isfinite(weights)]).max())
        raise ValueError(f'{name} reaches {largest:g}, and float16 only 65504; pack it with values="same".')
    return halves.view(np.uint16)


def _parts(entry: dict[str, Any], first: Mapping[str, Bytes], chosen: Bytes, compress: bool) -> Packed:
    """Entry and bytes of mask, signs, scales and values; to be compressed, the values' bytes go by place, as planes."""
    planes = np.ascontiguousarray(chosen.T) if compress else chosen.reshape(1, -1)
    entry["parts"], parts, at = [], [], 0
    for kind, part in (*first.items(), *(("values", plane) for plane in planes)):
        zipped = _zipped(part) if compress else None
        parts.append(part if zipped is None else zipped)
        entry["parts"].append([kind, at, at := at + len(parts[-1]), zipped is not None])
    return Packed(entry, parts)


def _zipped(part: Bytes) -> bytes | None:
    """The bytes compressed, or None where that does not pay; a sample tells how to compress them."""
    sample = part[:SAMPLE]
    size, strategy = min((len(_deflate(sample, strategy)), strategy) for strategy in STRATEGIES)
    if size > WORTH * len(sample):
        return None
    zipped = _deflate(part, strategy)
    return zipped if len(zipped) < len(part) else None


def _deflate(part: Bytes, strategy: int) -> bytes:
    packer = zlib.compressobj(LEVEL, zlib.DEFLATED, strategy=strategy)
    return packer.compress(part.data) + packer.flush()


def _split(entry: Mapping[str, Any], data: bytearray) -> dict[str, list[Bytes]]:
    """The parts of a tensor's bytes by their kind, unzipped."""
    longest = math.prod(entry["shape"]) * 16 + 64  # what a part could unzip to
    parts: dict[str, list[Bytes]] = {}
    for kind, begin, end, zipped in entry["parts"]:
        part: Any = memoryview(data)[begin:end]
        if zipped:
            part = zlib.decompressobj().decompress(part, longest)
        parts.setdefault(kind, []).append(np.frombuffer(part, np.uint8))
    return parts


def _told(entry: Mapping[str, Any]) -> tuple[list[int], torch.dtype, torch.dtype]:
    """Shape, dtype and dtype of the stored values."""
    names = entry["dtype"], entry.get("stored", entry["dtype"])
    dtypes = [getattr(torch, name, None) for name in names]
    if not all(isinstance(dtype, torch.dtype) for dtype in dtypes):
        raise ValueError(f"this version of PyTorch ({torch.__version__}) does not know the dtype {names[0]!r}")
    return entry["shape"], dtypes[0], dtypes[1]  # type: ignore[return-value]
