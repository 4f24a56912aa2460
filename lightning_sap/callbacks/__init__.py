"""WHEN and WHO: the only rooms that know Lightning."""

from lightning_sap.callbacks.monitor import PQIMonitor
from lightning_sap.callbacks.pruning import PruningCallback, SAPCallback

__all__ = ["PQIMonitor", "PruningCallback", "SAPCallback"]
