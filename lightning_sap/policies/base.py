"""The two things to subclass: a policy says how many weights go and come back, an importance scores the weights."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_sap.functional.amount import check_at_least_zero, floor
from lightning_sap.functional.pqi import PowerSums

LARGEST_SCALED = 0.9  # fraction of a group that a policy may be scaled up to, as beta is by default


class Amounts(NamedTuple):
    """What a step does to each group; a policy that returns a tensor alone returns ``drop``.

    Attributes:
        drop: Number of kept weights that the step prunes: int64, the shape of the groups.
        grow: Number of pruned weights that come back: int64, the same shape; more than are pruned means all of them.
    """

    drop: Tensor
    grow: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Standing:
    """Where a run stands when its policy is asked.

    Attributes:
        round: Number of the pruning that is decided, from 1.
        pruned: Number of pruned weights of each group: int64, the shape of the groups.
        names: For each group the parameters that it belongs to.
        history: Records of the rounds before this one.
        metrics: What was logged in the round that ends now.
    """

    round: int
    pruned: Tensor
    names: tuple[tuple[str, ...], ...] = ()
    history: Sequence[Any] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)


class Closing(NamedTuple):
    """Parameters that a step prunes by themselves, as if there were no others.

    Attributes:
        names: The parameters.
        least: Fewest of their weights that are kept.
        most: Most of their weights that are kept; as ``least``: exactly so many.
    """

    names: tuple[str, ...]
    least: int
    most: int


class Turn(NamedTuple):
    """What a step does to which parameters, where that is not the same for all; what it does not name stays as it is.

    Attributes:
        close: What is pruned: the policy is asked for each of these alone.
        open: Parameters of which all pruned weights come back.
    """

    close: tuple[Closing, ...] = ()
    open: tuple[str, ...] = ()


class Policy(ABC):
    """How many weights each group loses: called with the power sums of the groups and the number of the round.

    A policy that also takes an argument ``standing`` (by that name, or as its third without a default) is given a
    :class:`Standing`.

    Attributes:
        p: Order of the smaller norm of the power sums it is called with.
        q: Order of the larger norm.
        regrows: Whether it ever lets pruned weights come back. Only such a policy may return ``grow`` above 0.

    Example:
        >>> import torch
        >>> from lightning_sap import prune_masks
        >>> class AllButTwo(Policy):
        ...     def __call__(self, sums, round):
        ...         return (sums.count - 2).clamp(min=0)
        >>> prune_masks({"w": torch.tensor([3.0, 1.0, -2.0, 0.5])}, policy=AllButTwo())
        {'w': tensor([ True, False,  True, False])}
    """

    p: float = 0.5
    q: float = 1.0
    regrows: bool = False

    def __repr__(self) -> str:
        """Its class; what it was made with, a subclass says by its own (a dataclass does)."""
        return f"{type(self).__name__}()"

    @abstractmethod
    def __call__(self, sums: PowerSums, round: int) -> Tensor | Amounts:
        """Number of weights to prune from each group: int64, the shape of the groups; or :class:`Amounts`."""

    def turn(
        self,
        sizes: Mapping[str, int],
        kept: Mapping[str, int],
        *,
        round: int,
        rounds: int | None = None,
        history: Sequence[Any] = (),
        floors: Mapping[str, int] | None = None,
    ) -> Turn | None:
        """Which parameters a step prunes and which it opens; None, as here: it prunes all.

        Args:
            sizes: By parameter, in the module's order, how many weights it has.
            kept: And how many of them are kept.
            round: Number of the pruning; 0: before training begins.
            rounds: How many prunings are planned; None: not known.
            history: Records of the rounds before this one.
            floors: By parameter how many of its weights stay, whatever is asked for; None, or a name left out: none.
        """
        del sizes, kept, round, rounds, history, floors
        return None

    def scaled(self, scale: float) -> Policy:
        """The same policy, pruning ``scale`` times as many weights: ``floor(scale · c)``, and what grows as before.

        A scale above 1 takes no group beyond nine tenths of its kept weights, or beyond what the policy itself prunes.

        Args:
            scale: What the counts are multiplied by, at least 0.

        Raises:
            ValueError: If the scale is negative or not finite.

        Example:
            >>> from lightning_sap import FixedFraction
            >>> FixedFraction(0.2).scaled(0.5)
            FixedFraction(fraction=0.1)
        """
        check_at_least_zero("scale", scale)
        return self if scale == 1 else self._times(scale)

    def _times(self, scale: float) -> Policy:
        """The policy times a scale that is valid; for subclasses that have an argument to multiply."""
        return Scaled(self, scale)


class Scaled(Policy):
    """A policy whose drops are multiplied, made by :meth:`Policy.scaled`."""

    def __init__(self, policy: Policy, scale: float) -> None:
        self.policy, self.scale = policy, scale
        self.p, self.q, self.regrows = policy.p, policy.q, policy.regrows

    def __repr__(self) -> str:
        """As it is made."""
        return f"{self.policy!r}.scaled({self.scale})"

    def __call__(self, sums: PowerSums, round: int, standing: Standing) -> Amounts:  # type: ignore[override]  # noqa: ARG002
        """The counts of the policy, its drops multiplied."""
        drop, grow = ask(self.policy, sums, standing)
        most = torch.maximum(drop, floor(LARGEST_SCALED * sums.count.to(torch.float64)))
        return Amounts(torch.minimum(floor(self.scale * drop.to(torch.float64)), most), grow)

    def _times(self, scale: float) -> Policy:
        return self.policy.scaled(self.scale * scale)


class Importance(ABC):
    """What a weight is worth: of the kept weights of a group, those with the smallest scores are pruned first."""

    def __repr__(self) -> str:
        """Its class; what it was made with, a subclass says by its own (a dataclass does)."""
        return f"{type(self).__name__}()"

    @abstractmethod
    def scores(self, name: str, weight: Tensor) -> Tensor:
        """One score for each weight; index, amounts and picks use the magnitudes of the scores of kept weights.

        Args:
            name: The parameter.
            weight: Its values, detached and live: not to be written to. Of a sharded parameter, the rows that this
                process holds.

        Returns:
            Tensor of the weight's shape, of dtype float16, bfloat16, float32 or float64. Scores of pruned weights may
            be anything; those of kept weights must be finite.
        """

    def of_units(self, rows: Tensor) -> Tensor:
        """The score of each unit for ``structure="unit"``: the L2 norm of the scores of its kept weights.

        Args:
            rows: ``(units, weights of a unit)``, float64, zero where weights are pruned.
        """
        norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
        return norms


def check_policy(policy: object) -> None:
    """Raise unless it is a policy."""
    if not isinstance(policy, Policy):
        raise TypeError(f"policy must be a Policy such as SparsityInformed() or FixedFraction(0.2), got {policy!r}.")


def ask(policy: Policy, sums: PowerSums, standing: Standing) -> Amounts:
    """What a policy wants of each group, checked; where it returns one tensor, nothing comes back.

    Raises:
        ValueError: If it does not return numbers of weights, or lets weights come back without ``regrows``.
    """
    found: Any = _call(policy, sums, standing)
    amounts = found if isinstance(found, Amounts) else Amounts(found, torch.zeros_like(sums.count))
    if not all(_counts(part, sums.count.shape) for part in amounts):
        raise ValueError(
            f"{policy!r} must return how many weights each group loses: int64 of at least 0, of shape "
            f"{tuple(sums.count.shape)}, or Amounts(drop, grow) of two such tensors; got {found}. "
            "Convert with `.floor().long()`."
        )
    if not policy.regrows and amounts.grow.any():
        raise ValueError(
            f"{policy!r} lets {int(amounts.grow.sum())} pruned weights come back, but its `regrows` is False. "
            "Set `regrows = True` in its class, or return no `grow`."
        )
    return amounts


def _call(policy: Policy, sums: PowerSums, standing: Standing) -> object:
    """Call a policy with what it takes."""
    parameters = inspect.signature(policy.__call__).parameters
    needed = [p for p in parameters.values() if p.kind <= p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    if len(needed) > 2:
        return policy(sums, standing.round, standing)  # type: ignore[call-arg]
    if "standing" in parameters:
        return policy(sums, standing.round, standing=standing)  # type: ignore[call-arg]
    return policy(sums, standing.round)


def _counts(numbers: Any, shape: torch.Size) -> bool:
    kind = (getattr(numbers, "dtype", None), getattr(numbers, "shape", None))
    return kind == (torch.int64, shape) and not bool((numbers < 0).any())
