"""PQIMonitor: measuring, judging, and what it shows, each in its file."""

from lightning_sap.callbacks.monitor.callback import PQIMonitor

__all__ = ["PQIMonitor"]
