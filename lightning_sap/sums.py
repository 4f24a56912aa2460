"""SUMS: power sums of several weights, wherever these lie: on a device, in several processes, or measured before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sap.functional.pqi import PowerSums, chunk_size, concatenate, merge
from lightning_sap.functional.scratch import scratch
from lightning_sap.sharding import Shards

WORD = 8  # bytes
GOLDEN = -0x61C8864680B583EB  # 2^64 over the golden ratio, odd, as a signed number
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an entry


@dataclass
class Memory:
    """The latest power sums of one weight and of what they were taken, for whoever asks next.

    Monitor and pruner ask for the same ones at the end of a round. Other callbacks may have written to the weight in
    between, in ways that leave no trace, so that its bits are looked at: a third of the time that the sums take.
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


def fingerprints(tensors: Sequence[Tensor]) -> list[int]:
    """The bits of each tensor as one number of 64 bits; of all of them in one transfer.

    Words of 8 bytes are scrambled, multiplied by numbers as good as random, one for each position, and summed modulo
    2^64. Without any of that, changes that many weights have in common would cancel: signs, a factor, masks moved.

    Example:
        >>> import torch
        >>> a, b, c = fingerprints([torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])])
        >>> a == b, a == c
        (True, False)
    """
    if not tensors:
        return []
    longest = max(min(chunk_size(tensor), tensor.nbytes // WORD + WORD) for tensor in tensors)
    multipliers = _multipliers(longest, tensors[0].device)
    found = [_fingerprint(tensor.detach(), multipliers.to(tensor.device)) for tensor in tensors]
    return torch.stack([number.to(multipliers.device) for number in found]).tolist()


def _fingerprint(tensor: Tensor, multipliers: Tensor) -> Tensor:
    flat = tensor.reshape(-1).contiguous()
    in_a_word = WORD // flat.element_size()
    if flat.storage_offset() % in_a_word:
        flat = flat.clone()
    end = len(flat) - len(flat) % in_a_word
    words, rest = flat[:end].view(torch.int64), flat[end:].view(INTEGERS[flat.element_size()]).to(torch.int64)
    space = scratch(multipliers.nbytes, flat.device).view(torch.int64)
    found = torch.zeros((), dtype=torch.int64, device=flat.device)
    for part in (*torch.split(words, len(multipliers)), rest):
        scrambled = torch.bitwise_right_shift(part, 32, out=space[: len(part)]).bitwise_xor_(part)
        found = found * GOLDEN + scrambled.mul_(multipliers[: len(part)]).sum()
    return found


def _multipliers(count: int, device: torch.device) -> Tensor:
    """Odd numbers as good as random, the same ones always."""
    numbers = torch.arange(1, count + 1, device=device) * GOLDEN
    numbers = (numbers ^ (numbers >> 31)) * GOLDEN
    return (numbers ^ (numbers >> 29)) | 1


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
