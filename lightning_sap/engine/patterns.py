"""PATTERN: of every m consecutive weights along the inputs n are kept, as sparse tensor cores want it with 2:4."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sap.engine.decision import Decision
from lightning_sap.engine.groups import PrunableTensor, scores_of
from lightning_sap.engine.masks import MaskSet
from lightning_sap.engine.measure import check_finite, summary, sums_of
from lightning_sap.engine.weights import PrunableWeight
from lightning_sap.functional.select import smallest_of_rows
from lightning_sap.sharding import shard_like

FORM = re.compile(r"([1-9]\d*):([1-9]\d*)")


class Pattern(NamedTuple):
    """``kept`` of every ``of`` consecutive weights along the inputs survive.

    The inputs of a weight lie on axis 1, those of a convolution at one position of its kernel; of transposed
    convolutions and transformers' ``Conv1D`` they lie on axis 0.

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
        """Whether the number of inputs of each unit is a multiple of ``of``."""
        shape, groups = weight.parameter.shape, weight.transposed_groups
        return (shape[0] // groups if groups else shape[1]) % self.of == 0

    def blocks(self, tensor: Tensor, axis: int) -> Tensor:
        """A tensor of a weight's shape as ``(blocks, of)``, its inputs on that axis."""
        return tensor.movedim(axis, -1).reshape(-1, self.of)


def decide_pattern(tensors: Mapping[str, PrunableTensor], pattern: Pattern, p: float, q: float) -> Decision:
    """Measure, and pick in each block the smallest scores until the pattern holds; nothing is changed.

    Blocks that have lost more already stay as they are. Ties go to the lower position.

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
    picked = {name: _picked(tensor.local(), scores[name], pattern) for name, tensor in tensors.items()}
    masks = MaskSet({name: shard_like(mask, tensors[name].weight) for name, mask in picked.items()})
    dropped = {name: count - masks.survivors[name] for name, count in before.survivors.items()}
    return Decision(before, dropped, dict.fromkeys(dropped, 0), masks)


def _picked(tensor: PrunableTensor, scores: Tensor, pattern: Pattern) -> Tensor:
    """Where the weights held by this process are pruned from now on."""
    axis = 1 if tensor.units is None else 0
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
