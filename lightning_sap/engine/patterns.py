"""PATTERN: of every m consecutive weights along the inputs n are kept, as sparse tensor cores want it with 2:4."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sap.engine.decision import Decision
from lightning_sap.engine.groups import PrunableTensor, held_by, scores_of
from lightning_sap.engine.masks import MaskSet
from lightning_sap.engine.measure import check_finite, summary, sums_of
from lightning_sap.engine.weights import PrunableWeight
from lightning_sap.functional.select import smallest_of_rows
from lightning_sap.sharding import Shards, shard_like

FORM = re.compile(r"([1-9]\d*):([1-9]\d*)")


class Pattern(NamedTuple):
    """``kept`` of every ``of`` consecutive weights along the inputs survive.

    The inputs of a weight lie on axis 1, those of a convolution at one position of its kernel; of transposed
    convolutions and transformers' ``Conv1D`` they lie on axis 0, and those of experts in one
    tensor behind the axis of the experts.

    Example:
        >>> Pattern.named("2:4")
        Pattern(kept=2, of=4)
    """

    kept: int
    of: int

    @classmethod
    def named(cls, name: object) -> Pattern | None:
        """The pattern ``"n:m"``, 0 < n < m; None if that is no name of one."""
        found = FORM.fullmatch(name) if isinstance(name, str) else None
        kept, of = map(int, found.groups()) if found else (0, 0)
        return cls(kept, of) if 0 < kept < of else None

    @property
    def remaining(self) -> float:
        """Fraction of the weights that it keeps."""
        return self.kept / self.of

    def fits(self, weight: PrunableWeight) -> bool:
        """Whether the number of inputs of each unit is a multiple of ``of``, and columns that are normalised keep one.

        Each of ``of`` columns beside one another can keep a weight if together they have so many places.
        """
        shape, axis, axes = weight.parameter.shape, weight.layout.input_axis, weight.normalised
        if shape[axis] // max(1, weight.transposed_groups) % self.of:
            return False
        if axes is None or axis not in axes:
            return True  # a set holds whole blocks
        return self.kept * (weight.parameter.numel() // math.prod(shape[a] for a in axes)) >= self.of

    def blocks(self, tensor: Tensor, axis: int) -> Tensor:
        """A tensor of a weight's shape as ``(blocks, of)``, its inputs on that axis."""
        return tensor.movedim(axis, -1).reshape(-1, self.of)


def decide_pattern(tensors: Mapping[str, PrunableTensor], pattern: Pattern, p: float, q: float) -> Decision:
    """Measure, and pick in each block the smallest scores until the pattern holds; nothing is changed.

    Blocks that have lost more already stay as they are. Ties go to the lower position. Where a column that is divided
    by its norm would be empty, the largest of its weights that can take the place of another one in its block does.

    Args:
        tensors: Weights that the pattern fits; every process that holds rows of them calls this.
        pattern: How many are kept of how many.
        p: Order of the smaller norm of the index that is measured.
        q: Order of the larger norm.

    Example:
        >>> import torch
        >>> weight = torch.tensor([[1.0, -3.0, 2.0, 0.0], [4.0, 4.0, 4.0, 4.0]])
        >>> decide_pattern({"w": PrunableTensor(weight)}, Pattern(2, 4), 0.5, 1.0).masks.kept
        {'w': tensor([[False,  True,  True, False],
                [False, False,  True,  True]])}
    """
    scores = scores_of(tensors)
    before = summary(sums_of(tensors, p, q, scores=scores), p, q)
    check_finite(before, tensors)
    picked, shards, short = {}, held_by(tensors), 0
    for name, tensor in tensors.items():
        picked[name] = found = _picked(tensor.local(), scores[name], pattern)
        if tensor.floors:
            picked[name] = _with_floors(tensor.local(), found, scores[name], pattern, shards)
            short += int(shards.sum((found.sum() - picked[name].sum()).view(1)))
    masks = MaskSet({name: shard_like(mask, tensors[name].weight) for name, mask in picked.items()})
    dropped = {name: count - masks.survivors[name] for name, count in before.survivors.items()}
    return Decision(before, dropped, dict.fromkeys(dropped, 0), masks, short=short)


def _picked(tensor: PrunableTensor, scores: Tensor, pattern: Pattern) -> Tensor:
    """Where the weights held by this process are pruned from now on."""
    axis = tensor.layout.input_axis
    rows, pruned = pattern.blocks(scores, axis), None
    counts = rows.new_full((len(rows),), pattern.of - pattern.kept, dtype=torch.int64)
    if tensor.pruned is not None:
        pruned = pattern.blocks(tensor.pruned, axis)
        counts = (counts - pruned.sum(1)).clamp(min=0)
    picked = smallest_of_rows(rows.contiguous(), pruned, counts)
    if pruned is not None:
        picked |= pruned
    moved = scores.movedim(axis, -1).shape
    return picked.view(moved).movedim(-1, axis).contiguous()


def _with_floors(tensor: PrunableTensor, pruned: Tensor, scores: Tensor, pattern: Pattern, shards: Shards) -> Tensor:
    """What is pruned once no column that is normalised is empty; a collective under sharding."""
    axis = tensor.layout.input_axis
    for floor in tensor.floors:
        if floor.axes is None or axis not in floor.axes:
            continue  # each of these sets holds a whole block
        rows = [torch.cat(shards.gather(part)) for part in (pruned, scores, tensor.mask())]
        numbers = torch.arange(rows[0].numel()).view(rows[0].shape)
        flat, magnitudes, before = (part.reshape(-1).cpu() for part in (rows[0], rows[1].abs(), rows[2]))
        sets, blocks = floor.rows(numbers), pattern.blocks(numbers, axis)
        _fill(flat, magnitudes, before, sets, blocks)
        pruned = shards.own(flat.view(rows[0].shape).to(pruned.device), len(pruned))
    return pruned


def _fill(pruned: Tensor, magnitudes: Tensor, before: Tensor, sets: Tensor, blocks: Tensor) -> None:
    """Let the largest weight of each set that a pruning emptied take the place of another weight in its block."""
    set_of, block_of = torch.empty_like(pruned, dtype=torch.int64), torch.empty_like(pruned, dtype=torch.int64)
    set_of[sets.reshape(-1)] = torch.arange(sets.numel()) // max(1, sets.shape[1])
    block_of[blocks.reshape(-1)] = torch.arange(blocks.numel()) // blocks.shape[1]
    kept = (~pruned)[sets].sum(1)
    for empty in ((kept == 0) & (~before)[sets].any(1)).nonzero().flatten().tolist():
        own = sets[empty][~before[sets[empty]]]
        for place in own[magnitudes[own].argsort(descending=True, stable=True)].tolist():
            others = blocks[block_of[place]]
            others = others[~pruned[others] & (kept[set_of[others]] > 1)]
            if len(others):
                loses = others[magnitudes[others].argmin()]
                pruned[loses], pruned[place] = True, False
                kept[set_of[loses]] -= 1
                break
        else:  # blocks that had lost more already have none to give
            pruned[own[magnitudes[own].argmax()]] = False
        kept[empty] = 1
