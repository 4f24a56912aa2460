"""SUMS: power sums of several weights, wherever these lie: on a device, in several processes, or measured before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sap.functional.pqi import BITS, PowerSums, concatenate, merge
from lightning_sap.sharding import Shards


@dataclass
class Memory:
    """The latest power sums of one weight and of what they were taken, for whoever asks next.

    Monitor and pruner ask for the same ones at the end of a round. Other callbacks may have written to the weight in
    between, in ways that leave no trace, so that its bits are looked at: a tenth of the time that the sums take.
    """

    orders: tuple[float, float] | None = None
    pruned: Tensor | None = None
    bits: int = 0
    sums: PowerSums | None = None

    def recall(self, orders: tuple[float, float], pruned: Tensor | None, bits: int) -> PowerSums | None:
        """The sums, where they are of these orders, this very mask and these bits."""
        same = self.orders == orders and self.pruned is pruned and self.bits == bits
        return self.sums if same else None

    def keep(self, orders: tuple[float, float], pruned: Tensor | None, bits: int, sums: PowerSums) -> None:
        """Remember these instead."""
        self.orders, self.pruned, self.bits, self.sums = orders, pruned, bits, sums


def bits_of(weights: Sequence[Tensor], shards: Shards) -> list[int]:
    """The bits of each tensor, of all its shards, as one number: words added up modulo 2^64, whatever their order.

    Example:
        >>> import torch
        >>> from lightning_sap.sharding import ALONE
        >>> bits_of([torch.tensor([0.0, 0.0, -0.0]), torch.tensor([0.0])], ALONE)
        [-2147483648, 0]
    """
    if not weights:
        return []
    found = [_bits(weight).to(weights[0].device) for weight in weights]
    return [int(n) for n in shards.sum(torch.stack(found).cpu())]


def _bits(weight: Tensor) -> Tensor:
    flat = weight.detach().reshape(-1)
    in_a_word = 8 // flat.element_size()
    if flat.storage_offset() % in_a_word:
        flat = flat.clone()
    end = len(flat) - len(flat) % in_a_word
    return flat[:end].view(torch.int64).sum() + flat[end:].view(BITS[flat.dtype]).sum(dtype=torch.int64)


def on_cpu(sums: dict[str, PowerSums]) -> dict[str, PowerSums]:
    """The same on the CPU, in one transfer, which waits for all that is under way on the device."""
    devices = [part.count.device for part in sums.values()]
    if all(device.type == "cpu" for device in devices):
        return sums
    # all integers here are below 2^53
    tables = [torch.stack([field.to(devices[0], torch.float64) for field in part]) for part in sums.values()]
    parts = torch.split(torch.cat(tables, dim=1).cpu(), [len(part.count) for part in sums.values()], dim=1)
    return {
        name: PowerSums(count.to(torch.int64), exponent.to(torch.int64), sum_p, sum_q)
        for name, (count, exponent, sum_p, sum_q) in zip(sums, parts, strict=True)
    }


def over_shards(sums: dict[str, PowerSums], shards: Shards, p: float, q: float, by_unit: bool) -> dict[str, PowerSums]:
    """Power sums with those of other processes: units one process after the other, whole tensors added."""
    if shards.mesh is None or not sums:
        return sums
    lengths = shards.gather(torch.tensor([len(part.count) for part in sums.values()]))
    fields = [shards.gather(field) for field in concatenate(list(sums.values()))]
    of_ranks = [
        [PowerSums(*parts) for parts in zip(*(field.split(length.tolist()) for field in of_rank), strict=True)]
        for length, of_rank in zip(lengths, zip(*fields, strict=True), strict=True)
    ]
    of_names = zip(sums, zip(*of_ranks, strict=True), strict=True)
    return {name: concatenate(parts) if by_unit else merge(parts, p, q) for name, parts in of_names}
