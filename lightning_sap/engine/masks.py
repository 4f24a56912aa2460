"""MASK: which weights are pruned; validated, applied, packed, counted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from lightning_sap.functional.fingerprint import INTEGERS
from lightning_sap.functional.pqi import count_true
from lightning_sap.schema import TENSOR, Fields, MismatchError, Series, Table, Whole, must
from lightning_sap.sharding import local, placed_like, shard_like, shards_of, whole

PLAIN = (Tensor, nn.Parameter)
SMALL = 1 << 10  # up to so many entries tensors are masked all at once, for each call takes as long as they do
Factor: TypeAlias = tuple[torch.dtype | None, torch.device | None, Tensor | None]  # for this dtype and device
NO_FACTOR: Factor = None, None, None
CHUNK = 1 << 16  # weights masked at a time: what that takes stays in the cache, and is not given back to the system


class MaskSet:
    """Masks of several tensors by name; immutable, so that a wrong one never takes the place of a right one.

    Held is where a weight is *pruned* (the complement of the public masks), for that is what enforcing needs. Masks of
    sharded weights are sharded alike; their counts are of all shards, so that making a set is a collective, and so are
    the methods that make or pack one.

    Args:
        pruned: For each name a bool tensor, True where the weight is pruned.

    Raises:
        TypeError: If a mask is not a bool tensor.

    Example:
        >>> import torch
        >>> masks = MaskSet({"fc.weight": torch.tensor([[True, False], [False, False]])})
        >>> masks.remaining
        0.75
        >>> weight = torch.ones(2, 2)
        >>> masks.apply_({"fc.weight": weight})
        >>> weight
        tensor([[0., 1.],
                [1., 1.]])
    """

    def __init__(self, pruned: Mapping[str, Tensor]) -> None:
        for name, mask in pruned.items():
            if mask.dtype != torch.bool:
                raise TypeError(f"The mask of {name!r} must be a bool tensor, got {mask.dtype}.")
        self._pruned = dict(pruned)
        self._shapes = {name: mask.shape for name, mask in pruned.items()}
        self._factors: dict[str, Factor] = {}  # by name, once it was asked for
        counts = count_true([local(mask) for mask in pruned.values()])
        self._counts = dict(zip(pruned, shards_of(pruned.values()).sum(counts).tolist(), strict=True))

    @classmethod
    def dense(cls, weights: Mapping[str, Tensor]) -> MaskSet:
        """Masks that prune nothing."""
        return cls({name: shard_like(torch.zeros_like(local(w), dtype=torch.bool), w) for name, w in weights.items()})

    @classmethod
    def from_zeros(cls, weights: Mapping[str, Tensor]) -> MaskSet:
        """Masks that prune the weights that are exactly zero."""
        return cls({name: shard_like(local(w).detach() == 0, w) for name, w in weights.items()})

    @property
    def pruned(self) -> Mapping[str, Tensor]:
        """Where weights are pruned, by name; not to be written to."""
        return self._pruned

    @property
    def kept(self) -> dict[str, Tensor]:
        """Where weights survive, by name; new tensors."""
        return {name: shard_like(~local(mask), mask) for name, mask in self._pruned.items()}

    @property
    def total(self) -> int:
        """Number of weights under the masks, pruned or not."""
        return sum(mask.numel() for mask in self._pruned.values())

    @property
    def survivors(self) -> dict[str, int]:
        """Number of surviving weights by name."""
        return {name: mask.numel() - self._counts[name] for name, mask in self._pruned.items()}

    @property
    def remaining(self) -> float:
        """Fraction of the weights that survives; 1.0 where there are none."""
        return sum(self.survivors.values()) / self.total if self.total else 1.0

    @property
    def is_dense(self) -> bool:
        """True where nothing is pruned."""
        return not any(self._counts.values())

    def extended(self, weights: Mapping[str, Tensor]) -> MaskSet:
        """The same masks, and dense ones for the names that have none yet, in the order of ``weights``."""
        new = {name: w for name, w in weights.items() if name not in self._pruned}
        return MaskSet({**self._pruned, **MaskSet.dense(new)._pruned}) if new else self

    def matched(self, weights: Mapping[str, Tensor]) -> MaskSet:
        """The masks of these weights and of no others, dense ones where there are none, in their order."""
        masks = self.extended(weights)._pruned
        return MaskSet({name: masks[name] for name in weights})

    def grown_since(self, older: MaskSet) -> Iterator[tuple[str, Tensor]]:
        """Where weights are kept that older masks pruned: name and bool tensor, one after the other, as they are asked.

        Names are left out that one of the two does not have, or of which the older one prunes nothing. A collective
        where older masks of sharded weights are not sharded like these.

        Example:
            >>> import torch
            >>> older = MaskSet({"w": torch.tensor([True, True, False])})
            >>> dict(MaskSet({"w": torch.tensor([True, False, True])}).grown_since(older))
            {'w': tensor([False,  True, False])}
        """
        for name, mask in self._pruned.items():
            if older._counts.get(name):
                before = local(placed_like(older._pruned[name], mask))
                yield name, shard_like(before & ~local(mask), mask)

    def apply_(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the pruned entries of the named tensors, also of sparse ones, to zero in place (even if not finite).

        Raises:
            ValueError: If a tensor has another shape than its mask; it names it.
        """
        small: tuple[list[Tensor], list[Tensor]] = [], []
        with torch.no_grad():
            for name, tensor in tensors.items():
                if not self._counts.get(name):
                    continue
                if tensor.shape != self._shapes[name]:
                    raise ValueError(
                        f"{name!r} has the shape {tuple(tensor.shape)}, and what was pruned of it "
                        f"{tuple(self._shapes[name])}. To change a layer while training goes on, give it a new "
                        "nn.Parameter, and that to an optimizer."
                    )
                factor = self._factor(name, tensor) if type(tensor) in PLAIN and not tensor.is_sparse else None
                if factor is None:
                    zero_(local(tensor), local(self._pruned[name]))
                else:
                    small[0].append(tensor.view(factor.dtype))
                    small[1].append(factor)
            if small[0]:
                torch._foreach_mul_(*small)

    def masked(self, name: str, tensor: Tensor) -> Tensor | None:
        """A copy of a tensor of that name, its pruned entries zero; None where none are, or if it has another shape.

        Where gradients are recorded, as with ``create_graph=True``, they flow through what is kept.
        """
        if not self._counts.get(name) or tensor.shape != self._shapes[name]:
            return None
        pruned = local(self._pruned[name])
        if torch.is_grad_enabled() and tensor.requires_grad:
            return tensor.masked_fill(pruned, 0.0)
        copy = tensor.clone()
        zero_(copy, pruned)
        return copy

    def _factor(self, name: str, tensor: Tensor) -> Tensor | None:
        """What the bits of a small tensor are multiplied by: 0 where it is pruned, else 1; None for a large one."""
        dtype, device, factor = self._factors.get(name, NO_FACTOR)
        if dtype is not tensor.dtype or device != tensor.device:
            pruned, dtype, device, factor = self._pruned[name], tensor.dtype, tensor.device, None
            if tensor.numel() <= SMALL and type(pruned) in PLAIN:
                factor = (~pruned).to(device, INTEGERS[tensor.element_size()])
            self._factors[name] = dtype, device, factor
        return factor

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made anew when it is needed."""
        return {**vars(self), "_factors": {}}

    def holds_for(self, weights: Mapping[str, Tensor]) -> bool:
        """Whether each mask belongs to one of these weights and shape, and every pruned weight is zero."""
        if any(name not in weights or weights[name].shape != mask.shape for name, mask in self._pruned.items()):
            return False
        placed = {name: placed_like(mask, weights[name]) for name, mask in self._pruned.items()}
        nonzero = [int(local(weights[n].detach())[local(mask)].count_nonzero()) for n, mask in placed.items()]
        return not int(shards_of(placed.values()).sum(torch.tensor(nonzero)).sum())

    def pack(self) -> dict[str, Any]:
        """Plain values and uint8 tensors, one bit per weight, on the CPU; of sharded masks all shards."""
        return {
            name: {"shape": list(mask.shape), "bits": torch.from_numpy(np.packbits(whole(mask).cpu().numpy()))}
            for name, mask in self._pruned.items()
        }

    @classmethod
    def unpack(cls, packed: Mapping[str, Any]) -> MaskSet:
        """Masks from :meth:`pack`, on the CPU.

        Raises:
            ValueError: If they are not packed masks; nothing is unpacked then.

        Example:
            >>> import torch
            >>> masks = MaskSet({"w": torch.tensor([True, False, True])})
            >>> MaskSet.unpack(masks.pack()).pruned
            {'w': tensor([ True, False,  True])}
        """
        try:
            PACKED.check(packed)
        except MismatchError as mismatch:
            raise ValueError(f"These are no packed masks: masks{mismatch.path} {mismatch.text}.") from None
        return cls({name: _unpack(entry["bits"], entry["shape"]) for name, entry in packed.items()})

    def moved(self, tensors: Mapping[str, Tensor]) -> MaskSet:
        """The same masks where the named tensors are; masks of other names stay where they are."""
        return MaskSet({n: placed_like(mask, tensors[n]) if n in tensors else mask for n, mask in self._pruned.items()})

    def like(self, weights: Mapping[str, Tensor]) -> MaskSet:
        """The same masks on the devices of the weights and sharded as they are, in their order.

        Raises:
            ValueError: If the names or shapes differ; it says which are missing, surplus or of another shape.
        """
        check_shapes({name: mask.shape for name, mask in self._pruned.items()}, weights)
        return MaskSet({name: self._pruned[name] for name in weights}).moved(weights)


class _PackedMask:
    """A mask as :meth:`MaskSet.pack` writes it: a shape, and so many bits."""

    fields = Fields({"shape": Series(Whole(), most=64), "bits": TENSOR}, frozenset({"shape", "bits"}))

    def check(self, value: Any, *, strict: bool = True) -> None:
        """Raise for another value; one that takes less space than it says is expanded from a few bytes."""
        self.fields.check(value, strict=strict)
        bits, length = value["bits"], -(-math.prod(value["shape"]) // 8)
        fits = bits.dtype == torch.uint8 and tuple(bits.shape) == (length,) and bits.is_contiguous()
        must(fits, ".bits", bits, f"{length} bytes (torch.uint8), a bit for each weight of shape {value['shape']}")


PACKED = Table(_PackedMask())  # what `MaskSet.pack` makes


def check_shapes(shapes: Mapping[str, Sequence[int]], weights: Mapping[str, Tensor]) -> None:
    """Raise if masks of these shapes are not of these weights, no more and no fewer.

    Raises:
        ValueError: It says which names are missing, surplus or of another shape.
    """
    missing, surplus = sorted(weights.keys() - shapes.keys()), sorted(shapes.keys() - weights.keys())
    others = [
        f"{name} {tuple(shapes[name])} instead of {tuple(w.shape)}"
        for name, w in weights.items()
        if name in shapes and tuple(shapes[name]) != tuple(w.shape)
    ]
    if missing or surplus or others:
        raise ValueError(
            "The masks do not belong to the prunable weights of this model: "
            f"missing {missing}, surplus {surplus}, of another shape {others}. "
            "Give the same model, `include` and `exclude` as when the masks were made."
        )


def zero_(tensor: Tensor, where: Tensor) -> None:
    """Set the flagged entries to zero, in place."""
    if tensor.is_sparse:  # the gradient of some rows of an embedding, a row perhaps in several parts
        tensor._values().masked_fill_(where[tuple(tensor._indices())], 0.0)
        return
    if tensor.device.type != "cpu":
        tensor.masked_fill_(where, 0.0)
        return
    # On the CPU masked_fill_ takes many times as long. Bits times 0 are those of 0.0, also where they are of a NaN.
    bits = tensor.view(INTEGERS[tensor.element_size()])
    if bits.is_contiguous() and where.is_contiguous():
        bits, where = bits.view(-1), where.view(-1)
    rows = max(1, CHUNK * len(bits) // max(1, bits.numel()))  # a shard may be empty
    for part, flags in zip(torch.split(bits, rows), torch.split(where, rows), strict=True):
        part.mul_(~flags)


def _unpack(bits: Tensor, shape: list[int]) -> Tensor:
    count = int(np.prod(shape, dtype=np.int64))
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count).astype(bool)).reshape(shape)
