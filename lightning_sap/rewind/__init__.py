"""Snapshots and restores: weights, learning-rate schedules, optimizer state."""

from lightning_sap.rewind.replay import Mode, Replay, Ticks
from lightning_sap.rewind.weights import place_weights, restore_weights_, take_weights

__all__ = ["Mode", "Replay", "Ticks", "place_weights", "restore_weights_", "take_weights"]
