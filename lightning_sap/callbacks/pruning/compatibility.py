"""Callbacks of Lightning that keep weights, schedules or frozen parts of their own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks
from lightning.pytorch import LightningModule, Trainer


def check_callbacks(trainer: Trainer) -> None:
    """Raise for callbacks beside which pruning never works."""
    if of_kind(trainer, "ModelPruning"):
        raise ValueError(
            "ModelPruning renames the weights that it prunes and keeps masks of its own; use either callback. What "
            "it does, PruningCallback(FixedFraction(amount), include=...) does too."
        )
    sharding = any(kind.__name__ == "ModelParallelStrategy" for kind in type(trainer.strategy).__mro__)
    if sharding and (averaging := of_kind(trainer, "WeightAveraging")):
        raise ValueError(
            f"{type(averaging[0]).__name__} averages a deep copy of the module, and a module sharded by `fully_shard` "
            "cannot be copied. Use strategy='ddp' to average, or leave the averaging out under ModelParallelStrategy."
        )


def check_averaging(trainer: Trainer) -> None:
    """Raise for StochasticWeightAveraging, which takes the schedules away and averages over prunings."""
    if of_kind(trainer, "StochasticWeightAveraging"):
        raise ValueError(
            "StochasticWeightAveraging replaces the learning-rate schedule and averages dense weights with pruned "
            "ones; use EMAWeightAveraging or WeightAveraging, or rounds=0 to hold the masks of a pruned model."
        )


def in_averages_(trainer: Trainer, module: LightningModule, change_: Callable[[], None]) -> None:
    """Change the averaged copies of the module; once they are sparse, averaging sparse weights keeps them so.

    The averaging callbacks put their copy into the module for validation, and take it out again: so they are asked.
    """
    for callback in of_kind(trainer, "WeightAveraging"):
        callback.on_validation_epoch_start(trainer, module)
        change_()
        callback.on_validation_epoch_end(trainer, module)


def save_last_again(trainer: Trainer) -> None:
    """Write the latest file of each ModelCheckpoint anew: the module holds another round now; a collective.

    That is its ``last.ckpt``, and without a ``monitor`` its latest file. What it chose by a metric stays.
    """
    for callback in of_kind(trainer, "ModelCheckpoint"):
        latest = "" if callback.monitor else callback.best_model_path
        for path in dict.fromkeys(filter(None, (callback.last_model_path, latest))):
            if os.path.islink(path) and trainer.is_global_zero:
                os.unlink(path)  # it points to a file that was chosen
            trainer.save_checkpoint(path, callback.save_weights_only)


def saves_beside(trainer: Trainer, folder: str) -> bool:
    """Whether a ModelCheckpoint writes to the disk that a folder is on."""
    places = [str(callback.dirpath) for callback in of_kind(trainer, "ModelCheckpoint") if callback.dirpath]
    local = [Path(os.path.abspath(place)) for place in places if "://" not in place]
    there = [next(path for path in (place, *place.parents) if path.exists()) for place in local]
    return any(path.stat().st_dev == os.stat(folder).st_dev for path in there)


def accumulation(trainer: Trainer) -> int | None:
    """Batches to an optimizer step; None where their number changes during training."""
    schedulings = [callback.scheduling for callback in of_kind(trainer, "GradientAccumulationScheduler")]
    factors = {factor for scheduling in schedulings for factor in scheduling.values()}
    factors = factors or {trainer.accumulate_grad_batches}
    return int(factors.pop()) if len(factors) == 1 else None


def of_kind(trainer: Trainer, name: str) -> list[Any]:
    """The Trainer's callbacks of that class of Lightning, or of the same one of `pytorch_lightning` where in use."""
    packages = (lightning.pytorch.callbacks, sys.modules.get("pytorch_lightning.callbacks"))
    kinds = tuple(getattr(package, name) for package in packages if hasattr(package, name))
    return [callback for callback in trainer.callbacks if isinstance(callback, kinds)]  # type: ignore[attr-defined]
