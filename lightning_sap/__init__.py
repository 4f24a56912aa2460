"""Prune a network while it trains in PyTorch Lightning, by a number that says how far it can go: the PQ Index.

The flow, from the inside out::

    sharding.py            weights of which every process holds some rows
    functional/scratch.py  memory for one chunk
    functional/pqi.py      MEASURE  how sparse is this vector
    functional/amount.py   DECIDE   how many weights go; the policies
    functional/select.py   PICK     exactly which: the k smallest magnitudes over many tensors
    sums.py                the numbers behind it, over devices and shards, and remembered
    weights.py             which parameters are prunable, and their units
    masks.py               MASK     masks: validated, applied, packed, counted
    pruner.py              one step in one sentence: measure, decide, pick, mask
    rewind/                snapshots and restores: weights, schedules, optimizer state
    history.py             the rounds so far
    phases.py              where the network stands: regularization, compression, collapse
    metric.py              PQIndex as a torchmetrics Metric
    callbacks/pruning/     WHEN and WHO: rounds, ranks, schedules, checkpoint state, the rounds that are kept
    callbacks/monitor/     watches, logs, judges the rounds and stops
    plot.py, report.py     pictures and tables of the rounds
"""

from lightning_sap.callbacks.monitor import PQIMonitor
from lightning_sap.callbacks.pruning import PruningCallback, SAPCallback
from lightning_sap.functional.amount import FixedFraction, Policy, SparsityInformed, prune_count, retained_lower_bound
from lightning_sap.functional.pqi import gini_index, pq_index
from lightning_sap.history import History, RoundRecord
from lightning_sap.metric import PQIndex
from lightning_sap.phases import Phase, PhaseDetector
from lightning_sap.pruner import prune_masks

__version__ = "0.1.0"

__all__ = [
    "FixedFraction",
    "History",
    "PQIMonitor",
    "PQIndex",
    "Phase",
    "PhaseDetector",
    "Policy",
    "PruningCallback",
    "RoundRecord",
    "SAPCallback",
    "SparsityInformed",
    "gini_index",
    "pq_index",
    "prune_count",
    "prune_masks",
    "retained_lower_bound",
]
