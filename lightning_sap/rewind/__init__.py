"""Snapshots and restores: weights, learning-rate schedules, optimizer state."""

from lightning_sap.rewind.replay import Mode, Obstacle, Replay
from lightning_sap.rewind.ticks import Moment, Ticks
from lightning_sap.rewind.weights import place_weights, restore_weights_, take_weights

__all__ = ["Mode", "Moment", "Obstacle", "Replay", "Ticks", "place_weights", "restore_weights_", "take_weights"]
