"""What a pruning callback holds of one fit, and leaves out of its copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.utils.hooks import RemovableHandle

from lightning_sap.callbacks.pruning.course import Course
from lightning_sap.callbacks.pruning.lifecycle import Event, Stage, after
from lightning_sap.callbacks.training import is_in_another_fit

IN_FIT = (Stage.WAITING, Stage.TRAINING, Stage.TRAINED)


def _nothing() -> None:
    """A weak reference to nothing."""


@dataclass
class Fit:
    """What belongs to one fit, and is neither copied nor pickled.

    Attributes:
        trainer: Weak reference to the Trainer of the latest fit.
        module: Weak reference to its module.
        stage: Where it stands.
        waits: Whether it has not begun to train: a file that an exception writes then has nothing of it.
        schedules_from: Epoch at which its learning-rate schedules begin.
        pending: What a checkpoint brought, until training starts.
        hooks: Those on its optimizers.
        hooked: Whether every optimizer has them: Lightning takes others than PyTorch's, which may know none.
        global_step: The Trainer's, where not every optimizer has hooks.
        course: What is seen of it, and said at its end.
    """

    trainer: Callable[[], Trainer | None] = _nothing
    module: Callable[[], LightningModule | None] = _nothing
    stage: Stage = Stage.IDLE
    waits: bool = False
    schedules_from: int = 0
    pending: dict[str, Any] | None = None
    hooks: list[RemovableHandle] = field(default_factory=list)
    hooked: bool = True
    global_step: int = 0
    course: Course = field(default_factory=Course)

    def is_of_another(self, trainer: Trainer) -> bool:
        """Whether another Trainer is in the middle of it; one that an exception ended is not."""
        return self.stage in IN_FIT and is_in_another_fit(self.trainer, trainer)

    def enter(self, event: Event) -> None:
        """Go to the stage that follows an event."""
        self.stage = after(self.stage, event)
