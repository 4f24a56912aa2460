"""Snapshots and restores: weights, learning-rate schedules, optimizer state."""

from lightning_sap.rewind.schedules import Replay, Ticks
from lightning_sap.rewind.weights import place_weights, restore_weights_, take_weights

__all__ = ["Replay", "Ticks", "place_weights", "restore_weights_", "take_weights"]
