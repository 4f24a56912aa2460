"""Memory for one chunk, kept by each thread and used over again.

Taken anew for every tensor, it takes longer than what is done in it, and it is given back in holes that the results
between them keep the next tensor from: memory would grow with the number of tensors.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

SIZE = 1 << 21  # bytes that are kept
CPU = torch.device("cpu")
_OWN = threading.local()


def scratch(size: int, device: torch.device = CPU) -> Tensor:
    """So many bytes, written over by whoever asks next in this thread; elsewhere PyTorch keeps its memory itself.

    Example:
        >>> scratch(8).view(torch.int32).shape
        torch.Size([2])
    """
    if device != CPU or size > SIZE:
        return torch.empty(size, dtype=torch.uint8, device=device)
    if not hasattr(_OWN, "memory"):  # kept by NumPy: a tensor made in inference mode could not be used outside of it
        _OWN.memory = torch.empty(SIZE, dtype=torch.uint8, device=CPU).numpy()
    return torch.from_numpy(_OWN.memory[:size])
