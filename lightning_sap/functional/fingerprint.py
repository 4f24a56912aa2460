"""FINGERPRINT: the bits of a tensor as one number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sap.functional.pqi import chunk_size
from lightning_sap.functional.scratch import scratch

WORD = 8  # bytes
GOLDEN = -0x61C8864680B583EB  # 2^64 over the golden ratio, odd, as a signed number
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an entry


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
