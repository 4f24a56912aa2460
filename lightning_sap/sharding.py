"""SHARDS: weights of which every process holds some rows (FSDP2's DTensors), and what the processes tell one another.

What sums, gathers or moves rows (the methods of :class:`Shards`, :func:`whole`, :func:`placed_like`) is a collective:
every process must call it, in the same order. Where no weight is sharded, nothing is sent.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

ALTERNATIVE = (
    "Prune with parameters sharded by `fully_shard` on axis 0 over a one-dimensional mesh of all processes "
    "(ModelParallelStrategy(data_parallel_size=<devices>, tensor_parallel_size=1)), or replicated with strategy='ddp'."
)


@dataclass(frozen=True)
class Shards:
    """The processes that hold the rows of the same weights, in the order of the rows.

    Attributes:
        mesh: The device mesh over which they are sharded; None: this process holds everything.
    """

    mesh: Any = None

    @property
    def rank(self) -> int:
        """Which of them this process is."""
        return 0 if self.mesh is None else int(self.mesh.get_local_rank())

    def sum(self, numbers: Tensor) -> Tensor:
        """Sum of a tensor over the processes."""
        if self.mesh is None or not numbers.numel():
            return numbers
        sent = numbers.to(self.mesh.device_type, copy=True)
        dist.all_reduce(sent, group=self.mesh.get_group())
        return sent.to(numbers.device)

    def gather(self, rows: Tensor) -> list[Tensor]:
        """The tensors of all processes, which may differ in length."""
        if self.mesh is None:
            return [rows]
        lengths = [int(n) for n in self._gather(torch.tensor([len(rows)]))]
        # as bytes, which every backend can send
        sent = rows.new_zeros(max(lengths), *rows.shape[1:])
        sent[: len(rows)] = rows
        received = self._gather(sent.reshape(-1).view(torch.uint8))
        return [r.view(rows.dtype).reshape(sent.shape)[:n] for r, n in zip(received, lengths, strict=True)]

    def own(self, rows: Tensor, length: int) -> Tensor:
        """Of the rows of all processes, one after the other, those of this one, of which there are ``length``."""
        start = sum(int(n) for n in self.gather(torch.tensor([length]))[: self.rank])
        return rows[start : start + length]

    def _gather(self, same: Tensor) -> list[Tensor]:
        sent = same.to(self.mesh.device_type)
        received = [torch.empty_like(sent) for _ in range(self.mesh.size())]
        dist.all_gather(received, sent, group=self.mesh.get_group())
        return [r.to(same.device) for r in received]


ALONE = Shards()


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process may hold but a part of the tensor."""
    if type(tensor) in (Tensor, nn.Parameter) or not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def shards_of(tensors: Iterable[Tensor]) -> Shards:
    """The processes over which these tensors are sharded: all over the same, or none at all."""
    return next((Shards(_parts(tensor).device_mesh) for tensor in tensors if is_sharded(tensor)), ALONE)


def local(tensor: Tensor) -> Tensor:
    """The rows that this process holds, sharing their storage."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        rows: Tensor = _parts(tensor).to_local()
    return rows


def shard_like(rows: Tensor, like: Tensor) -> Tensor:
    """What this process holds of a tensor that is sharded as ``like`` is, as that tensor."""
    if not is_sharded(like):
        return rows
    from torch.distributed.tensor import DTensor

    parts = _parts(like)
    made = DTensor.from_local(rows, parts.device_mesh, parts.placements, shape=like.shape, stride=like.stride())
    return made.to(rows.device)  # back from the device of the mesh, where shards are kept on the CPU


def whole(tensor: Tensor) -> Tensor:
    """All rows of a tensor, plain."""
    return torch.cat(shards_of([tensor]).gather(local(tensor))) if is_sharded(tensor) else tensor


def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The same tensor on the device of ``like`` and sharded as it is."""
    if is_sharded(tensor) and is_sharded(like) and _parts(tensor).device_mesh == _parts(like).device_mesh:
        return shard_like(local(tensor).to(like.device), like)
    rows = whole(tensor)
    if is_sharded(like):
        rows = shards_of([like]).own(rows, len(local(like))).clone()
    return shard_like(rows.to(like.device), like)


def reshard(module: nn.Module) -> None:
    """Let go of the gathered copies that FSDP2 leaves after a forward without a backward, as validation is.

    Until then the module shows these copies as its parameters: what is written to them is lost, and what is written to
    the shards stays unseen by the next forward. Sends nothing.
    """
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


def check_placements(weights: dict[str, Tensor]) -> None:
    """Raise unless all of these weights are plain, or all are sharded alike: on axis 0, over all processes.

    Raises:
        ValueError: If not; it names a weight, how it is placed, and the alternative.
    """
    sharded = [name for name, weight in weights.items() if is_sharded(weight)]
    if not sharded:
        return
    from torch.distributed.tensor import Shard

    first = _parts(weights[sharded[0]]).device_mesh
    for name, weight in weights.items():
        if not is_sharded(weight):
            raise ValueError(
                f"The weight {name!r} is not sharded, but {sharded[0]!r} is, and both are prunable. Shard both or "
                f"neither, or leave one out with `exclude`. {ALTERNATIVE}"
            )
        placements, mesh = tuple(_parts(weight).placements), _parts(weight).device_mesh
        # exactly Shard: its relatives, made by tensor parallelism under FSDP2, order the rows in another way
        plain = len(placements) == 1 and type(placements[0]) is Shard and placements[0].dim == 0
        if not plain or mesh != first or mesh.size() != dist.get_world_size():
            raise ValueError(f"Cannot prune {name!r}, which is placed as {placements} over {mesh}. {ALTERNATIVE}")


def _parts(tensor: Tensor) -> Any:
    """A sharded tensor, typed as what has a mesh and placements."""
    return tensor
