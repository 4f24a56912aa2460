"""By which score weights go, by name: their magnitude, or what training shows of them."""

from __future__ import annotations

from torch import Tensor

from lightning_sap.policies.base import Importance
from lightning_sap.policies.gathered import FisherRatio, Taylor, Wanda


class Magnitude(Importance):
    """The weights themselves, whose magnitudes count: ``|w|``. Nothing is copied.

    Example:
        >>> import torch
        >>> Magnitude().scores("fc.weight", torch.tensor([3.0, -1.0]))
        tensor([ 3., -1.])
    """

    def scores(self, name: str, weight: Tensor) -> Tensor:  # noqa: ARG002 (the same for every parameter)
        """The weights."""
        return weight


NAMED: dict[str, type[Importance]] = {
    "fisher": FisherRatio,
    "magnitude": Magnitude,
    "taylor": Taylor,
    "wanda": Wanda,
}


def check_importance(value: object) -> Importance:
    """The importance that was given, or the one of that name.

    Raises:
        ValueError: If there is no importance of that name.
        TypeError: If it is neither an importance nor a name.

    Example:
        >>> check_importance("magnitude")
        Magnitude()
    """
    if isinstance(value, Importance):
        return value
    allowed = f"importance must be one of {sorted(NAMED)} or an Importance such as Magnitude(), got {value!r}."
    if not isinstance(value, str):
        call = " Make one of it by calling it: add ()." if isinstance(value, type) else ""
        raise TypeError(allowed + call)
    if value not in NAMED:
        raise ValueError(allowed)
    return NAMED[value]()
