"""FLOORS: sets of weights of which some always stay, such as the rows that weight norm divides by their norms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_sap.functional.select import smallest_of_rows
from lightning_sap.sharding import Shards, shards_of

if TYPE_CHECKING:
    from lightning_sap.engine.groups import PrunableTensor, Scope


class Floor(NamedTuple):
    """Of each set of a weight's entries so many stay, all of them where it has fewer.

    Attributes:
        least: How many.
        axes: The axes whose indices tell the sets apart; ``()``: all are one set. None: each output unit is one.

    Example:
        >>> weight = torch.arange(6.0).view(2, 3)
        >>> Floor(1, (1,)).rows(weight)
        tensor([[0., 3.],
                [1., 4.],
                [2., 5.]])
    """

    least: int
    axes: tuple[int, ...] | None = None

    def rows(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as ``(sets, weights of a set)``; of output units see the weight itself."""
        axes = self.axes or ()
        sets = math.prod(tensor.shape[axis] for axis in axes)
        return tensor.permute(self._order(tensor)).reshape(sets, -1 if sets else 0)

    def from_rows(self, rows: Tensor, like: Tensor) -> Tensor:
        """Undo :meth:`rows`, for a tensor of the shape of ``like``."""
        order = self._order(like)
        moved = rows.reshape([like.shape[axis] for axis in order])
        return moved.permute(sorted(range(like.dim()), key=order.__getitem__))

    def _order(self, tensor: Tensor) -> list[int]:
        axes = self.axes or ()
        return [*axes, *(axis for axis in range(tensor.dim()) if axis not in axes)]


class Room(NamedTuple):
    """What may be picked.

    Attributes:
        excluded: By name a bool tensor, True where this process may pick none; None: nowhere.
        held: By name how many kept weights floors hold back, of all processes.
        of_groups: The same of each group of a scope; None where nothing is held back.
    """

    excluded: dict[str, Tensor | None]
    held: dict[str, int]
    of_groups: Tensor | None


def room_of(tensors: Mapping[str, PrunableTensor], scores: Mapping[str, Tensor], scope: Scope, shards: Shards) -> Room:
    """What floors leave to be picked: of each set the largest scores stay, of equals those at the higher positions.

    A collective where weights with floors are sharded.

    Args:
        tensors: What this process holds of the weights.
        scores: Their scores, finite.
        scope: What forms a group.
        shards: The processes that hold the rows of the weights.
    """
    held = {name: held_back(t, scores[name], shards) for name, t in tensors.items() if t.floors}
    excluded = {name: tensor.pruned for name, tensor in tensors.items()}
    if not held:
        return Room(excluded, dict.fromkeys(tensors, 0), None)
    for name, flags in held.items():
        old = excluded[name]
        excluded[name] = flags if old is None else flags | old
    parts = {name: _counts(tensor, held.get(name), scope, shards) for name, tensor in tensors.items()}
    counts, of_groups = {name: int(part.sum()) for name, part in parts.items()}, torch.cat(list(parts.values()))
    return Room(excluded, counts, of_groups.sum(0, keepdim=True) if scope == "global" else of_groups)


def _counts(tensor: PrunableTensor, held: Tensor | None, scope: Scope, shards: Shards) -> Tensor:
    """How many weights of each group of a tensor are held back, of all processes."""
    groups = tensor.groups(tensor.weight, scope).shape[0]
    here = torch.zeros(groups, dtype=torch.int64) if held is None else tensor.groups(held, scope).sum(1).cpu()
    return torch.cat(shards.gather(here)) if tensor.is_apart(scope) else shards.sum(here)


def held_back(tensor: PrunableTensor, scores: Tensor, shards: Shards) -> Tensor:
    """Which kept weights that this process holds stay, whatever is asked for; a collective under sharding."""
    found = torch.zeros(tensor.weight.shape, dtype=torch.bool, device=tensor.weight.device)
    for floor in tensor.floors:
        of_rows = tensor.units is None or tensor.layout.stack > 0 if floor.axes is None else 0 in floor.axes
        if shards.mesh is None or of_rows:
            found |= _held(tensor, floor, scores, tensor.pruned)
        else:  # a set lies in several processes: each looks at all rows, of one weight at a time
            pruned = None if tensor.pruned is None else torch.cat(shards.gather(tensor.pruned))
            every = _held(tensor, floor, torch.cat(shards.gather(scores)), pruned)
            found |= shards.own(every, len(found))
    return found


def _held(tensor: PrunableTensor, floor: Floor, scores: Tensor, pruned: Tensor | None) -> Tensor:
    like = tensor._replace(weight=scores)
    rows = like.rows if floor.axes is None else floor.rows
    flags = largest_of_rows(rows(scores), None if pruned is None else rows(pruned), floor.least)
    return like.from_rows(flags) if floor.axes is None else floor.from_rows(flags, scores)


def largest_of_rows(rows: Tensor, excluded: Tensor | None, count: int) -> Tensor:
    """Flag the ``count`` largest magnitudes of each row: what is left of it when its smallest are picked.

    Args:
        rows: As for :func:`smallest_of_rows`.
        excluded: The same, True where none may be flagged.
        count: How many of each row; all that may be flagged, where these are fewer.

    Returns:
        Bool tensor of the shape of ``rows``; of equals those at the higher positions are flagged.

    Example:
        >>> import torch
        >>> largest_of_rows(torch.tensor([[3.0, -4.0, 4.0], [0.0, 2.0, 1.0]]), None, 1)
        tensor([[False, False,  True],
                [False,  True, False]])
    """
    if excluded is None:
        others = torch.full((len(rows),), max(0, rows.shape[1] - count), device=rows.device)
        return smallest_of_rows(rows, None, others).logical_not_()
    others = (rows.shape[1] - count - excluded.sum(1)).clamp(min=0)
    return smallest_of_rows(rows, excluded, others).logical_or_(excluded).logical_not_()


def fewest(tensors: Mapping[str, PrunableTensor]) -> dict[str, int]:
    """How many weights stay in each tensor by its floors, at least: by that floor which holds most back.

    A collective where weights with floors are sharded.
    """
    found, shards = dict.fromkeys(tensors, 0), shards_of(tensor.weight for tensor in tensors.values())
    for name, tensor in tensors.items():
        here = tensor.local()
        equal = torch.zeros((), dtype=torch.float16, device=here.weight.device).expand(here.weight.shape)
        for floor in tensor.floors:
            count = held_back(here._replace(floors=(floor,)), equal, shards).sum(dtype=torch.int64).cpu()
            found[name] = max(found[name], int(shards.sum(count.view(1))))
    return found
