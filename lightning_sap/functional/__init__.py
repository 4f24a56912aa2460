"""The mathematics, tensors only: MEASURE (pqi), DECIDE (amount), PICK (select)."""

from lightning_sap.functional.amount import prune_count, retained_lower_bound
from lightning_sap.functional.pqi import (
    PowerSums,
    concatenate,
    gini_index,
    index_of,
    merge,
    power_sums,
    pq_index,
    total,
)
from lightning_sap.functional.select import smallest, smallest_of_rows

__all__ = [
    "PowerSums",
    "concatenate",
    "gini_index",
    "index_of",
    "merge",
    "power_sums",
    "pq_index",
    "prune_count",
    "retained_lower_bound",
    "smallest",
    "smallest_of_rows",
    "total",
]
