"""What a pruning callback holds of one fit, and leaves out of its copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_sap.callbacks.pruning.schedules import Schedules


def _nothing() -> None:
    """A weak reference to nothing."""


@dataclass
class Fit:
    """What belongs to one fit, and is neither copied nor pickled.

    Attributes:
        stage: As in ``setup``; for a fit then "train" while it trains, and "trained".
        trainer: Weak reference to the Trainer of the latest fit.
        module: Weak reference to its module.
        waits: Whether it has not begun to train yet.
        schedules_from: Epoch at which its learning-rate schedules begin.
        archives: Whether each round is saved.
        pending: What a checkpoint brought, until training starts.
        schedules: Its schedules and optimizers.
        hooks: Those on its optimizers.
        hooked: Whether every optimizer has them: Lightning takes others than PyTorch's, which may know none.
        before_validation: The metrics that were known when validation began.
    """

    stage: str | None = None
    trainer: Callable[[], Trainer | None] = _nothing
    module: Callable[[], LightningModule | None] = _nothing
    waits: bool = False
    schedules_from: int = 0
    archives: bool = False
    pending: dict[str, Any] | None = None
    schedules: Schedules = field(default_factory=Schedules)
    hooks: list[RemovableHandle] = field(default_factory=list)
    hooked: bool = True
    before_validation: dict[str, Tensor] = field(default_factory=dict)
