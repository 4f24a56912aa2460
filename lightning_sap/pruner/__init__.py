"""Prunes in a training loop of one's own, with Lightning Fabric or without."""

from lightning_sap.pruner.pruner import Pruner

__all__ = ["Pruner"]
