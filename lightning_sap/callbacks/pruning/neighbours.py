"""Callbacks of Lightning that keep weights, schedules or frozen parts of their own."""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.callbacks.weight_averaging import WeightAveraging


def check_averaging(trainer: Trainer) -> None:
    """Raise for StochasticWeightAveraging, which takes the schedules away and averages over prunings."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks):
        raise ValueError(
            "StochasticWeightAveraging replaces the learning-rate schedule and averages dense weights with pruned "
            "ones; use EMAWeightAveraging or WeightAveraging, or rounds=0 to hold the masks of a pruned model."
        )


def in_averages_(trainer: Trainer, module: LightningModule, change_: Callable[[], None]) -> None:
    """Change the averaged copies of the module; once they are sparse, averaging sparse weights keeps them so.

    The averaging callbacks put their copy into the module for validation, and take it out again: so they are asked.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging):
            callback.on_validation_epoch_start(trainer, module)
            change_()
            callback.on_validation_epoch_end(trainer, module)


def accumulation_varies(trainer: Trainer) -> bool:
    """Whether the number of batches to an optimizer step changes during training."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    schedulings = [c.scheduling for c in callbacks if isinstance(c, GradientAccumulationScheduler)]
    return any(len(set(scheduling.values())) > 1 for scheduling in schedulings)
