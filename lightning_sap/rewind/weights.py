"""Weight rewinding: parameters and buffers as they were."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_sap.engine.weights import COMPILE_PREFIX, parameter_names
from lightning_sap.sharding import local, placed_like


def take_weights(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers on the CPU, sharded alike, sharing no storage with the live ones.

    Raises:
        ValueError: If a lazy module has not seen a batch yet.

    Example:
        >>> from torch import nn
        >>> sorted(take_weights(nn.BatchNorm1d(2)))
        ['bias', 'num_batches_tracked', 'running_mean', 'running_var', 'weight']
    """
    live, lazy_kinds = live_tensors(module), (nn.UninitializedParameter, nn.UninitializedBuffer)
    if lazy := [name for name, tensor in live.items() if isinstance(tensor, lazy_kinds)]:
        raise ValueError(
            f"There are no weights to rewind to yet: {lazy} are not initialized before the first batch. Pass a batch "
            "through the module before fit, or rewind to the weights after an epoch (rewind_weights=1)."
        )
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in live.items()}


def restore_weights_(module: nn.Module, snapshot: Mapping[str, Tensor]) -> None:
    """Write a snapshot back in place; tensors that the snapshot does not know stay as they are.

    Raises:
        ValueError: If a tensor changed its shape since; nothing is written then.
    """
    live = {name: tensor for name, tensor in live_tensors(module).items() if name in snapshot}
    for name, tensor in live.items():
        if tensor.shape != snapshot[name].shape:
            raise ValueError(
                f"Cannot rewind {name!r}: its shape was {tuple(snapshot[name].shape)} and is {tuple(tensor.shape)} now."
            )
    with torch.no_grad():
        for name, tensor in live.items():
            local(tensor).copy_(local(snapshot[name]))


def place_weights(module: nn.Module, snapshot: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A snapshot from a checkpoint on the CPU, each tensor sharded as the live one is; a collective where they are."""
    live = live_tensors(module)
    return {name: placed_like(t, live[name]).to("cpu") if name in live else t for name, t in snapshot.items()}


def live_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Its parameters and buffers, by the names that they have without ``torch.compile``."""
    buffers = {name.replace(COMPILE_PREFIX, ""): buffer for name, buffer in module.named_buffers()}
    return {**parameter_names(module), **buffers}
