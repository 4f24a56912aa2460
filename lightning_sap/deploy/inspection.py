"""What a file of weights holds: of each tensor zeros, indices, and how many weights SAP would prune."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sap.deploy.quantize import is_weight
from lightning_sap.deploy.reading import Named
from lightning_sap.deploy.sources import opened
from lightning_sap.functional.amount import prune_count
from lightning_sap.functional.pqi import DTYPES, PowerSums, index_of, power_sums, total

BLOCK = 1 << 20  # magnitudes that are weighted at a time


@dataclass(frozen=True)
class Orders:
    """The options of SAP: orders of the index, slack, scale and cap of the amount."""

    p: float = 0.5
    q: float = 1.0
    eta_r: float = 0.0
    gamma: float = 1.0
    beta: float = 0.9

    def count(self, sums: PowerSums) -> int | None:
        """How many weights SAP would prune; None where a weight is not finite."""
        index = index_of(sums, self.p, self.q)
        if not math.isfinite(float(index)):
            return None
        return int(prune_count(index, sums.count, self.p, self.q, eta_r=self.eta_r, gamma=self.gamma, beta=self.beta))


@dataclass(frozen=True)
class Row:
    """One tensor: ``pqi`` and ``gini`` of its survivors, None unless it is real and finite.

    ``would_prune`` is None of what SAP leaves alone by its name, dtype or shape. ``tied_to`` names the tensor that
    this one is.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    weights: int
    zeros: int
    pqi: float | None
    gini: float | None
    would_prune: int | None
    tied_to: str | None = None


@dataclass(frozen=True)
class Inspection:
    """All tensors of a file and their totals; tied ones count once."""

    file: str
    orders: Orders
    rows: Sequence[Row]
    total: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "file": self.file,
            **asdict(self.orders),
            "tensors": [{**asdict(row), "shape": list(row.shape)} for row in self.rows],
            "total": self.total,
        }


def inspect(path: str | Path, orders: Orders | None = None) -> Inspection:
    """Measure every tensor of a file, reading one at a time.

    Args:
        path: A checkpoint of Lightning, a ``state_dict`` saved by PyTorch, or a safetensors file, packed or not.
        orders: The options of SAP; None: its defaults.

    Raises:
        ValueError: If the file is damaged or holds no weights; a pickle of anything else is refused unexecuted.
    """
    orders = orders or Orders()
    rows: list[Row] = []
    sums: list[PowerSums] = []
    first: dict[Any, str] = {}
    with opened(path) as tensors:
        for named in tensors:
            tied_to = None if named.key is None else first.setdefault(named.key, named.name)
            row, of_row = _measure(named, orders, None if tied_to == named.name else tied_to)
            rows.append(row)
            if of_row is not None and row.tied_to is None:
                sums.append(of_row)
    return Inspection(str(path), orders, rows, _total(rows, sums, orders))


def _measure(named: Named, orders: Orders, tied_to: str | None) -> tuple[Row, PowerSums | None]:
    """A row, and the sums of what SAP would prune."""
    tensor = named.load()
    told = named.name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.numel()
    if not tensor.is_floating_point():
        return Row(*told, int((tensor == 0).sum()), None, None, None, tied_to), None
    values = tensor if tensor.dtype in DTYPES else tensor.float()
    kept = values != 0
    sums = power_sums(values, orders.p, orders.q, mask=kept)
    index, zeros = float(index_of(sums, orders.p, orders.q)), tensor.numel() - int(sums.count)
    prunable = is_weight(named.name, tensor)
    would_prune = orders.count(sums) if prunable else None
    if not math.isfinite(index):
        return Row(*told, zeros, None, None, None, tied_to), None
    return Row(*told, zeros, index, _gini(values[kept]), would_prune, tied_to), sums if prunable else None


def _gini(survivors: Tensor) -> float:
    """Gini index as :func:`gini_index` has it, within the room of the survivors' magnitudes."""
    wide = survivors.double() if survivors.dtype == torch.float64 else survivors.float()
    magnitudes = np.abs(wide.numpy())
    magnitudes.sort()
    count, whole, weighted = len(magnitudes), 0.0, 0.0
    for start in range(0, count, BLOCK):
        part = magnitudes[start : start + BLOCK].astype(np.float64) / float(magnitudes[-1])
        whole += float(part.sum())
        weighted += float((2 * np.arange(start + 1, start + len(part) + 1) - count - 1) @ part)
    return weighted / (count * whole) if count else 0.0


def _total(rows: Sequence[Row], sums: Sequence[PowerSums], orders: Orders) -> dict[str, Any]:
    own = [row for row in rows if row.tied_to is None]
    prunable = [row for row in own if row.would_prune is not None]
    of_all = total(PowerSums(*map(torch.stack, zip(*sums, strict=True))), orders.p, orders.q) if sums else None
    return {
        "tensors": len(rows),
        "weights": sum(row.weights for row in own),
        "zeros": sum(row.zeros for row in own),
        "prunable": sum(row.weights for row in prunable),
        "prunable_zeros": sum(row.zeros for row in prunable),
        "pqi": None if of_all is None else float(index_of(of_all, orders.p, orders.q)),
        "would_prune": {
            "layer": sum(row.would_prune or 0 for row in prunable),
            "global": 0 if of_all is None else orders.count(of_all),
        },
    }
