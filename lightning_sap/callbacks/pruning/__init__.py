"""WHEN and WHO: rounds, schedules, checkpoint state, logging."""

from lightning_sap.callbacks.pruning.callback import PruningCallback
from lightning_sap.callbacks.pruning.sap import SAPCallback

__all__ = ["PruningCallback", "SAPCallback"]
