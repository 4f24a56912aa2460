"""Weights that come back: a network that is pruned and opened again, one part after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_sap.functional.amount import ceil
from lightning_sap.functional.pqi import PowerSums
from lightning_sap.functional.scalars import is_real, is_whole, make_plain_
from lightning_sap.policies.base import Closing, Policy, Standing, Turn, ask, check_policy

Names = tuple[str, ...]


@dataclass(frozen=True)
class GrowAndPrune(Policy):
    r"""Scheduled grow-and-prune: one part of the network after the other is opened, trained dense, and pruned again.

    Training begins with random weights. The first part is dense; of each layer of the others only a share ``remaining``
    is kept, the largest first weights. After every round the open part is pruned to its share and the next one is
    opened: its weights come back as zeros. After the last cycle all parts are pruned, and the last round, of at least
    15 % of training, trains them so. At the end exactly ``remaining`` of the prunable weights are kept.

    Args:
        remaining: Fraction of the prunable weights that is kept at the end, in (0, 1).
        partitions: How many parts: of consecutive parameters in the module's order, of nearly as many weights each. Or
            one list of parameter-name globs for each part.
        cycles: How often each part is opened; with a single part once. None: twice, or once where two cycles of rounds
            of at least one epoch do not fit; or as often as ``rounds`` or ``every_n_epochs`` of the callback allows.
        close: Another policy that says how many weights of a part stay when it is pruned, though never fewer than
            ``remaining`` of them. In the last cycle it decides what share each part has of all that remain: parts of
            which it kept more in the cycle before have more. None: each part keeps ``remaining`` of its weights.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If ``close`` is no policy.

    Source: Ma et al., *Effective Model Sparsification by Scheduled Grow-and-Prune Methods*, ICLR 2022, cyclic GaP.

    Example:
        >>> import torch
        >>> from lightning_sap import prune_masks
        >>> weights = {"a": torch.tensor([3.0, 1.0, 2.0, 4.0]), "b": torch.tensor([1.0, 4.0, 3.0, 2.0])}
        >>> policy = GrowAndPrune(0.25, partitions=2)
        >>> first = prune_masks(weights, policy=policy, round=0)
        >>> [mask.tolist() for mask in first.values()]
        [[True, True, True, True], [False, True, False, False]]
        >>> [mask.tolist() for mask in prune_masks(weights, first, policy=policy, round=1).values()]
        [[False, False, False, True], [True, True, True, True]]
    """

    remaining: float = 0.1
    partitions: int | Sequence[Sequence[str]] = 4
    cycles: int | None = None
    close: Policy | None = None

    regrows = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        make_plain_(self)
        if not (is_real(self.remaining) and 0 < self.remaining < 1):
            raise ValueError(f"remaining must be a fraction in (0, 1), got {self.remaining!r}; 0.1 keeps a tenth.")
        object.__setattr__(self, "partitions", _checked(self.partitions))
        if self.cycles is not None and not is_whole(self.cycles, 1):
            raise ValueError(f"cycles must be None or a whole number of at least 1, got {self.cycles!r}.")
        if self.parts == 1 and (self.cycles or 1) > 1:
            raise ValueError(
                f"cycles={self.cycles} with a single part would open what was pruned at once. Give cycles=1, which is "
                "one pruning and fine-tuning, or more partitions."
            )
        if self.close is not None:
            check_policy(self.close)
            if self.close.regrows:
                raise ValueError(f"close={self.close!r} lets weights come back itself. Give a policy that only prunes.")
            object.__setattr__(self, "p", self.close.p)
            object.__setattr__(self, "q", self.close.q)

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return self.partitions if isinstance(self.partitions, int) else len(self.partitions)

    def split(self, sizes: Mapping[str, int]) -> list[Names]:
        """The names of each part; where there are fewer parameters than parts, the last ones are empty.

        Args:
            sizes: By parameter, in the module's order, how many weights it has.

        Example:
            >>> GrowAndPrune(partitions=2).split({"a": 9, "b": 1, "c": 3, "d": 4})
            [('a',), ('b', 'c', 'd')]
            >>> GrowAndPrune(partitions=[["*.bias"], ["a.*"]]).split({"a.bias": 1, "a.weight": 2, "b.weight": 3})
            [('a.bias',), ('a.weight',)]
        """
        if isinstance(self.partitions, int):
            return _balanced(sizes, self.partitions)
        found: list[list[str]] = [[] for _ in self.partitions]
        for name in sizes:
            for part, patterns in zip(found, self.partitions, strict=True):
                if any(fnmatchcase(name, pattern) for pattern in patterns):
                    part.append(name)
                    break
        return [tuple(part) for part in found]

    def turn(
        self,
        sizes: Mapping[str, int],
        kept: Mapping[str, int],
        *,
        round: int,
        rounds: int | None = None,
        history: Sequence[Any] = (),
        floors: Mapping[str, int] | None = None,
    ) -> Turn:
        """Close the part that is open and open the next; after the last cycle none."""
        parts = self.split(sizes)
        named = {name for part in parts for name in part}
        rest = tuple(name for name in sizes if name not in named)  # of layers that no glob matches
        last = self.cycles and self.cycles * self.parts if rounds is None else rounds
        opened = () if last is not None and round >= last else parts[round % len(parts)]
        weights, exactly = sizes, self.close is None or round == 0
        if not exactly and last is not None and round > last - len(parts):
            weights, exactly = self._kept_before(parts, sizes, kept, last, history), True
        shares = _shares(weights, nearest(self.remaining * sum(sizes.values())), floors or {})
        closing = []
        closed = [part for part in (*parts, rest) if part != opened]
        if round == 0:  # first weights are as large as their layer has few inputs: layers cannot be compared by them
            closed = [(name,) for part in closed for name in part]
        for part in closed:
            size, count, share = (sum(of[name] for name in part) for of in (sizes, kept, shares))
            is_open = count == size or part == parts[(round - 1) % len(parts)]
            if count > share and (exactly or is_open):
                closing.append(Closing(part, share, share if exactly else count))
        return Turn(tuple(closing), opened)

    def _kept_before(
        self, parts: list[Names], sizes: Mapping[str, int], kept: Mapping[str, int], last: int, history: Sequence[Any]
    ) -> dict[str, int]:
        """How many weights of each parameter the last cycle but one kept; without such a cycle, all that there are."""
        if last < 2 * len(parts):
            return dict(sizes)
        records, found = {record.round: record.layers_remaining for record in history}, dict(kept)
        for i, part in enumerate(parts):
            record = records.get(last - 2 * len(parts) + 1 + i, {})  # of the round that goes on there is none yet
            found |= {name: nearest(record[name] * sizes[name]) for name in part if name in record}
        return found

    def __call__(self, sums: PowerSums, round: int, standing: Standing) -> Tensor:  # type: ignore[override]
        """Number of weights to prune from each group of what is closed: int64, the shape of the groups."""
        if self.close is not None and round > 0:
            return ask(self.close, sums, standing).drop
        sizes = (sums.count + standing.pruned).to(torch.float64)
        return (sums.count - ceil(self.remaining * sizes)).clamp(min=0)

    def _times(self, scale: float) -> Policy:
        raise ValueError(
            f"{self!r} cannot be scaled by {scale}: what it keeps is fixed. Let listeners answer GoOn() or Stop()."
        )


def nearest(value: float) -> int:
    """The nearest whole number."""
    return round(value)


def _checked(partitions: Any) -> int | tuple[tuple[str, ...], ...]:
    """The partitions as a number, or as texts that can be hashed."""
    if is_whole(partitions, 1):
        return int(partitions)
    if _is_list(partitions) and all(map(_is_list, partitions)):
        found = tuple(map(tuple, partitions))
        if all(isinstance(pattern, str) for part in found for pattern in part):
            return found
    raise ValueError(
        "partitions must be a whole number of at least 1, or one list of parameter-name globs for each part, such as "
        f"[['encoder.*'], ['decoder.*', 'head.*']], got {partitions!r}."
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0


def _balanced(sizes: Mapping[str, int], count: int) -> list[Names]:
    """Consecutive names in so many parts, of which the largest is as small as can be; none is empty if it can be."""
    low, high = max(sizes.values(), default=0), sum(sizes.values())
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_packed(sizes, count, middle)) <= count else (middle + 1, high)
    parts = _packed(sizes, count, low)
    return [*parts, *[()] * (count - len(parts))]


def _packed(sizes: Mapping[str, int], count: int, capacity: int) -> list[Names]:
    """Consecutive names in parts up to a capacity, a new one early where else a later part would have no name."""
    parts: list[list[str]] = []
    used = 0
    for i, (name, size) in enumerate(sizes.items()):
        if not parts or used + size > capacity or len(sizes) - i <= count - len(parts):
            parts.append([])
            used = 0
        parts[-1].append(name)
        used += size
    return [tuple(part) for part in parts]


def _shares(weights: Mapping[str, int], total: int, floors: Mapping[str, int]) -> dict[str, int]:
    """A whole number split in proportion to weights, no share below its floor; the sum is exact if floors allow it."""
    fixed: dict[str, int] = {}
    while True:
        free = {name: weight for name, weight in weights.items() if name not in fixed}
        shares = _split(free, max(0, total - sum(fixed.values())))
        low = {name: floors[name] for name, share in shares.items() if share < floors.get(name, 0)}
        if not low:
            return shares | fixed
        fixed |= low


def _split(weights: Mapping[str, int], total: int) -> dict[str, int]:
    """A whole number split in proportion to weights, so that the sum is exact."""
    everything = max(1, sum(weights.values()))
    ends = [(total * end + everything // 2) // everything for end in accumulate(weights.values())]
    return {name: end - before for name, (before, end) in zip(weights, pairwise([0, *ends]), strict=True)}
