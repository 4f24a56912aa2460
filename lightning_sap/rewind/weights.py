"""Weight rewinding: parameters and buffers as they were."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from lightning_sap.engine.weights import COMPILE_PREFIX, parameter_names
from lightning_sap.sharding import local, placed_like


def take_weights(module: nn.Module, without: Collection[str] = ()) -> dict[str, Tensor]:
    """Copies of its parameters and buffers on the CPU, sharded alike, sharing no storage with the live ones.

    Buffers that no ``state_dict`` holds are left out: a module makes them anew from what it holds.

    Args:
        module: The module.
        without: Names of parameters that are left out too, as those that nothing changes.

    Raises:
        ValueError: If a lazy module has not seen a batch yet.

    Example:
        >>> from torch import nn
        >>> sorted(take_weights(nn.BatchNorm1d(2), without=["bias"]))
        ['num_batches_tracked', 'running_mean', 'running_var', 'weight']
    """
    left_out = {*without, *_passing_buffers(module)}
    live = {name: tensor for name, tensor in live_tensors(module).items() if name not in left_out}
    lazy_kinds = (nn.UninitializedParameter, nn.UninitializedBuffer)
    if lazy := [name for name, tensor in live.items() if isinstance(tensor, lazy_kinds)]:
        raise ValueError(
            f"There are no weights to rewind to yet: {lazy} are not initialized before the first batch. Pass a batch "
            "through the module before fit, or rewind to the weights after an epoch (rewind_weights=1)."
        )
    return {name: copy_of(tensor) for name, tensor in live.items()}


def copy_of(tensor: Tensor) -> Tensor:
    """A copy on the CPU that shares no storage with it."""
    return tensor.detach().to("cpu", copy=True)


def restore_weights_(module: nn.Module, snapshot: Mapping[str, Tensor]) -> list[str]:
    """Write a snapshot back in place; tensors that the snapshot does not know stay as they are.

    Returns:
        The names of buffers that changed their shape since, and stay as they are too: those of an observer, say, which
        is empty before the first batch.

    Raises:
        ValueError: If a parameter changed its shape; nothing is written then.
    """
    live = {name: tensor for name, tensor in live_tensors(module).items() if name in snapshot}
    others = {name: tensor for name, tensor in live.items() if tensor.shape != snapshot[name].shape}
    for name, tensor in others.items():
        if isinstance(tensor, nn.Parameter):
            raise ValueError(
                f"Cannot rewind {name!r}: its shape was {tuple(snapshot[name].shape)} and is {tuple(tensor.shape)} now."
            )
    with torch.no_grad():
        for name, tensor in live.items():
            if name not in others:
                local(tensor).copy_(local(snapshot[name]))
    return list(others)


def place_weights(module: nn.Module, snapshot: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A snapshot from a checkpoint on the CPU, each tensor sharded as the live one is; a collective where they are."""
    live = live_tensors(module)
    return {name: placed_like(t, live[name]).to("cpu") if name in live else t for name, t in snapshot.items()}


def live_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Its parameters and buffers, by the names that they have without ``torch.compile``."""
    buffers = {name.replace(COMPILE_PREFIX, ""): buffer for name, buffer in module.named_buffers()}
    return {**parameter_names(module), **buffers}


def _passing_buffers(module: nn.Module) -> Iterator[str]:
    """The names of buffers that no ``state_dict`` holds."""
    for path, part in module.named_modules():
        for name in part._non_persistent_buffers_set:
            yield f"{path}.{name}".lstrip(".").replace(COMPILE_PREFIX, "")
