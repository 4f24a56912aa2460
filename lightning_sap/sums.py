"""SUMS: power sums of several weights, wherever these lie: on a device, in several processes, or measured before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sap.functional.pqi import PowerSums, chunk_size, concatenate, merge
from lightning_sap.sharding import Shards

WORD = 8  # bytes
SCRAMBLE = -0x61C8864680B583EB  # odd, its bits as good as random: 2^64 over the golden ratio, as a signed number
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an entry


@dataclass
class Memory:
    """The latest power sums of one weight and of what they were taken, for whoever asks next.

    Monitor and pruner ask for the same ones at the end of a round. Other callbacks may have written to the weight in
    between, in ways that leave no trace, so that its bits are looked at: half of the time that the sums take.
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


def fingerprint(tensor: Tensor) -> Tensor:
    """The bits of a tensor as one number, int64: scrambled words times odd numbers by position, summed modulo 2^64.

    Scrambled are they because a plain sum of multiples does not see what many weights have in common: where 2^20 words
    go up by 2^44, say since all weights were doubled, the changes add up to a multiple of 2^64.

    Example:
        >>> import torch
        >>> weight = torch.tensor([0.0, 1.0])
        >>> fingerprint(weight) == fingerprint(weight.clone()), fingerprint(weight) == fingerprint(weight.flip(0))
        (tensor(True), tensor(False))
    """
    flat = tensor.detach().reshape(-1)
    in_a_word = WORD // flat.element_size()
    if flat.storage_offset() % in_a_word:
        flat = flat.clone()
    end = len(flat) - len(flat) % in_a_word
    words, rest = flat[:end].view(torch.int64), flat[end:].view(INTEGERS[flat.element_size()]).to(torch.int64)
    longest = max(min(chunk_size(words), len(words)), len(rest))
    odd = torch.arange(1, 2 * longest + 1, 2, device=flat.device)
    scrambled, high = torch.empty_like(odd), torch.empty_like(odd)  # for all chunks the same memory
    found = torch.zeros((), dtype=torch.int64, device=flat.device)
    for part in (*torch.split(words, chunk_size(words)), rest):
        mixed, shifted = scrambled[: len(part)], high[: len(part)]
        torch.mul(part, SCRAMBLE, out=mixed)
        mixed ^= torch.bitwise_right_shift(mixed, 32, out=shifted)
        found = found * SCRAMBLE + mixed.mul_(odd[: len(part)]).sum()
    return found


def fingerprints(tensors: Sequence[Tensor]) -> list[int]:
    """Those of several tensors, in one transfer."""
    if not tensors:
        return []
    return torch.stack([fingerprint(tensor).to(tensors[0].device) for tensor in tensors]).tolist()


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
