"""Snapshots and restores: weights, learning-rate schedules, optimizer state."""

from lightning_sap.rewind.gradients import GradientHooks
from lightning_sap.rewind.kept import base_optimizers, parameters_of
from lightning_sap.rewind.optimizer import OptimizerMemory, cannot_reset, cannot_zero, zero_pruned_
from lightning_sap.rewind.replay import HORIZON, Mode, Obstacle, Replay
from lightning_sap.rewind.steps import fires_hooks, hook_gradients, hook_steps, innermost_optimizers
from lightning_sap.rewind.ticks import Moment, Ticks
from lightning_sap.rewind.weights import copy_of, live_tensors, place_weights, restore_weights_, take_weights

__all__ = [
    "HORIZON",
    "GradientHooks",
    "Mode",
    "Moment",
    "Obstacle",
    "OptimizerMemory",
    "Replay",
    "Ticks",
    "base_optimizers",
    "cannot_reset",
    "cannot_zero",
    "copy_of",
    "fires_hooks",
    "hook_gradients",
    "hook_steps",
    "innermost_optimizers",
    "live_tensors",
    "parameters_of",
    "place_weights",
    "restore_weights_",
    "take_weights",
    "zero_pruned_",
]
