"""Snapshots and restores: weights, learning-rate schedules, optimizer state."""

from lightning_sap.rewind.schedules import Replay, Ticks, restore_groups_, take_groups
from lightning_sap.rewind.weights import place_weights, restore_weights_, take_weights

__all__ = ["Replay", "Ticks", "place_weights", "restore_groups_", "restore_weights_", "take_groups", "take_weights"]
