"""What an algorithm is made of: a policy says how many weights go."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from lightning_sap.functional.pqi import PowerSums


class Policy(ABC):
    """How many weights each group loses: called with the power sums of the groups and the number of the round.

    Attributes:
        p: Order of the smaller norm of the power sums it is called with.
        q: Order of the larger norm.
    """

    p: float = 0.5
    q: float = 1.0

    def __repr__(self) -> str:
        """Its class; what it was made with, a subclass says by its own (a dataclass does)."""
        return f"{type(self).__name__}()"

    @abstractmethod
    def __call__(self, sums: PowerSums, round: int) -> Tensor:
        """Number of weights to prune from each group: int64, the shape of the groups."""


def check_policy(policy: object) -> None:
    """Raise unless it is a policy."""
    if not isinstance(policy, Policy):
        raise TypeError(f"policy must be a Policy such as SparsityInformed() or FixedFraction(0.2), got {policy!r}.")
