"""Prune a network while it trains in PyTorch Lightning, by a number that says how far it can go: the PQ Index.

Imports point inward only; from the inside out::

    version.py             the version of the package
    schema/                what a state from a file may hold, checked before anything of it is used
    sharding.py            collectives over weights of which every process holds some rows
    functional/            the mathematics, tensors only: pqi, amount, select, fingerprint, scratch
    policies/              what an algorithm is: how many weights go and come back, and by which score
    engine/                one step without a trainer: which weights, measure, decide, mask
    rounds/                when, and what came of it: plan, search, history, phases, the protocol between callbacks
    rewind/                snapshots and replays: weights, schedules
    metric.py              PQIndex as a torchmetrics Metric
    plot.py, report.py     figures and tables of the rounds
    callbacks/pruning/     prunes while Lightning trains
    callbacks/monitor/     watches, logs, judges the rounds and stops
    pruner/                prunes in a loop of one's own, without a Trainer
    deploy/                after training: packed files, smaller networks, faster linears
"""

from typing import TYPE_CHECKING, Any

from lightning_sap.callbacks.monitor import PQIMonitor
from lightning_sap.callbacks.pruning import PruningCallback, SAPCallback
from lightning_sap.engine.decision import prune_masks
from lightning_sap.functional.amount import prune_count, retained_lower_bound
from lightning_sap.functional.pqi import gini_index, pq_index
from lightning_sap.metric import PQIndex
from lightning_sap.policies.amounts import FixedFraction, SparsityInformed
from lightning_sap.policies.base import Amounts, Importance, Policy, Standing
from lightning_sap.policies.gathered import FisherRatio, Taylor, Wanda
from lightning_sap.policies.importance import Magnitude
from lightning_sap.policies.regrowth import GrowAndPrune
from lightning_sap.rounds.history import History, RoundRecord
from lightning_sap.rounds.phases import Phase, PhaseDetector
from lightning_sap.rounds.protocol import GoOn, RoundEnd, RoundListener, Stop, TakeBack
from lightning_sap.rounds.search import Tolerance
from lightning_sap.version import __version__

if TYPE_CHECKING:
    from lightning_sap.deploy import load_sparse, quantize_survivors, save_sparse, shrink, sparse_linears
    from lightning_sap.engine.used import effective_weights
    from lightning_sap.pruner import Pruner

__all__ = [
    "Amounts",
    "FisherRatio",
    "FixedFraction",
    "GoOn",
    "GrowAndPrune",
    "History",
    "Importance",
    "Magnitude",
    "PQIMonitor",
    "PQIndex",
    "Phase",
    "PhaseDetector",
    "Policy",
    "Pruner",
    "PruningCallback",
    "RoundEnd",
    "RoundListener",
    "RoundRecord",
    "SAPCallback",
    "SparsityInformed",
    "Standing",
    "Stop",
    "TakeBack",
    "Taylor",
    "Tolerance",
    "Wanda",
    "__version__",
    "effective_weights",
    "gini_index",
    "load_sparse",
    "pq_index",
    "prune_count",
    "prune_masks",
    "quantize_survivors",
    "retained_lower_bound",
    "save_sparse",
    "shrink",
    "sparse_linears",
]


def __getattr__(name: str) -> Any:
    """What is needed after training only, or without a Trainer, is imported when it is asked for."""
    if name == "effective_weights":
        from lightning_sap.engine.used import effective_weights

        return effective_weights
    if name == "Pruner":
        from lightning_sap.pruner import Pruner

        return Pruner
    if name in __all__:
        from lightning_sap import deploy

        return getattr(deploy, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
