"""What a Trainer trains of a module: the parameters that its optimizers hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerStatus
from torch import nn
from torch.optim import Optimizer

from lightning_sap.engine.copies import parameters_of_averages
from lightning_sap.engine.weights import is_frozen, parameter_names
from lightning_sap.rewind import base_optimizers, fires_hooks, innermost_optimizers, parameters_of

AVERAGE = "it is an average of others"
NO_OPTIMIZER = "it is in no optimizer"


@dataclass(frozen=True)
class Training:
    """Which parameters can be trained at all.

    Attributes:
        held: Ids of those that an optimizer holds; None where no optimizer holds anything.
        averages: Ids of those that are averages of others.
        manual: Whether the module takes the steps itself: then it may freeze and unfreeze parameters for each of them.
        unheard: For each optimizer that does not tell of its steps the ids of what it holds; gradients may be missed.
    """

    held: frozenset[int] | None = None
    averages: frozenset[int] = frozenset()
    manual: bool = False
    unheard: tuple[frozenset[int], ...] = ()

    @classmethod
    def of(cls, trainer: Trainer | None, module: nn.Module) -> Training:
        """The training of a module, as its optimizers and layers are now; without a Trainer, its flags tell."""
        return cls.by([] if trainer is None else trainer.optimizers, module)

    @classmethod
    def by(cls, optimizers: Sequence[Optimizer], module: nn.Module) -> Training:
        """The training of a module by these optimizers; without any, its flags tell."""
        names = parameter_names(module)
        averages = frozenset(id(names[name]) for name in parameters_of_averages(module) if name in names)
        held = _ids_in(each for optimizer in optimizers for each in base_optimizers(optimizer))
        silent = [each for each in innermost_optimizers(optimizers) if not fires_hooks(each)]
        manual = isinstance(module, LightningModule) and not module.automatic_optimization
        return cls(held or None, averages, manual, tuple(_ids_in([each]) for each in silent))

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether an optimizer holds it."""
        return self.held is None or id(parameter) in self.held

    def untrained(self, parameter: nn.Parameter) -> str | None:
        """Why a parameter is not trained; None if it may be."""
        if id(parameter) in self.averages:
            return AVERAGE
        if not (self.manual and self.held is not None and self.holds(parameter)) and (reason := is_frozen(parameter)):
            return reason
        return None if self.holds(parameter) else NO_OPTIMIZER


def is_in_another_fit(reference: Callable[[], Trainer | None] | None, trainer: Trainer) -> bool:
    """Whether a fit of the Trainer that is referred to weakly goes on, and this is another one."""
    own = reference and reference()
    return own is not None and own is not trainer and own.state.status == TrainerStatus.RUNNING


def of_a_run_in_a_fit(name: str) -> str:
    """That a callback of a fit that goes on cannot be in another run."""
    return (
        f"{name}: the callback is in the middle of a fit, and another Trainer begins a run with the same object. What "
        "it knows of the first would be lost. Give the inner Trainer a callback of its own, such as "
        "copy.deepcopy(callback)."
    )


def _ids_in(optimizers: Iterable[Optimizer]) -> frozenset[int]:
    """Of the parameters that these hold."""
    return frozenset(id(parameter) for optimizer in optimizers for parameter in parameters_of(optimizer))
