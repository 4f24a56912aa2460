"""`PQIndex` as a torchmetrics Metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_sap.functional.pqi import (
    HIGHEST_EXPONENT,
    LOWEST_EXPONENT,
    PowerSums,
    check_orders,
    index_of,
    power_sums,
    total,
)
from lightning_sap.functional.scalars import as_plain
from lightning_sap.schema import MismatchError, Number, Row, Whole, must


class PQIndex(Metric):
    r"""PQ Index of everything it is updated with, taken as one vector.

    .. math:: I_{p,q}(w) = 1 - d^{1/q - 1/p} \frac{\|w\|_p}{\|w\|_q}

    The state is the power sums, which add over updates and over ranks. ``update`` takes weights (or gradients, or
    activations) of any shape and floating dtype and, if given, a bool mask of the same shape (True: counts);
    ``compute`` returns a float64 scalar.

    Args:
        p: Order of the smaller norm, ``0 < p < q``.
        q: Order of the larger norm.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If not ``0 < p < q``.

    Source: Diao et al., ICLR 2023, Definition 1.

    Example:
        >>> import torch
        >>> metric = PQIndex(p=0.5, q=1.0)
        >>> metric.update(torch.zeros(3))
        >>> metric.update(torch.tensor([2.0]))
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    sums: Tensor

    def __init__(self, p: float = 0.5, q: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_orders(p, q)
        self.p, self.q = as_plain(p), as_plain(q)
        empty = torch.tensor([0.0, LOWEST_EXPONENT, 0.0, 0.0], dtype=torch.float64)
        self.add_state("sums", empty, dist_reduce_fx=_Add(self.p, self.q))

    def update(self, weights: Tensor, mask: Tensor | None = None) -> None:
        """Add the entries of a tensor, those under a True of the mask if one is given."""
        new = _pack(power_sums(weights, self.p, self.q, mask=mask)).to(self.sums.device)
        self.sums = _Add(self.p, self.q)(torch.stack([self.sums, new]))

    def compute(self) -> Tensor:
        """PQ Index of all entries so far, float64 scalar."""
        return index_of(_unpack(self.sums), self.p, self.q)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> Any:
        """Move the sums where the module goes, but not to another dtype: counts must stay exact."""
        place = fn(self.sums.new_zeros(())).device
        super()._apply(fn, [*exclude_state, "sums"])
        self.sums = self.sums.to(place)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take up sums that can be sums.

        Raises:
            ValueError: If they cannot; it says which value is wrong.
        """
        if (sums := state_dict.get(f"{prefix}sums")) is not None:
            _check_sums(sums, f"{prefix}sums")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Draw one value, or several over steps; see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)


class _Add:
    """Add stacked states of shape (states, 4); a class because a metric is pickled with it."""

    def __init__(self, p: float, q: float) -> None:
        self.p, self.q = p, q

    def __call__(self, stacked: Tensor) -> Tensor:
        return _pack(total(_unpack(stacked), self.p, self.q))


def _check_sums(sums: object, name: str) -> None:
    """Raise for what :func:`_pack` cannot have made."""
    amount = Number(0, nan=True)
    fits = isinstance(sums, Tensor) and sums.dtype == torch.float64 and sums.shape == (4,)
    try:
        must(fits, "", sums, "a tensor of torch.float64 and shape (4,)")
        values = sums.tolist() if isinstance(sums, Tensor) else []
        whole = [int(value) if value == value and value.is_integer() else value for value in values[:2]]
        Row((Whole(), Whole(LOWEST_EXPONENT, HIGHEST_EXPONENT), amount, amount)).check([*whole, *values[2:]])
    except MismatchError as mismatch:
        raise ValueError(f"{name}{mismatch.path} of a PQIndex {mismatch.text}.") from None


def _pack(sums: PowerSums) -> Tensor:
    """As one float64 tensor, fields last; counts are exact up to 2^53."""
    return torch.stack([field.to(torch.float64) for field in sums], dim=-1)


def _unpack(state: Tensor) -> PowerSums:
    count, exponent, sum_p, sum_q = state.unbind(-1)
    return PowerSums(count.to(torch.int64), exponent.to(torch.int64), sum_p, sum_q)
