"""Masks that hold wherever weights are looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_sap.rewind import base_optimizers, fires_hooks, hook_gradients


class BeforeSaving:
    """Calls a function before a module gives its ``state_dict``; copies and pickles of the module hold an idle one.

    Lightning takes the weights of a file before it calls a callback, and calls none for a file of weights alone.
    """

    def __init__(self, function: Callable[[], None] | None = None) -> None:
        self._function = function

    def __call__(self, *_: Any) -> None:
        if self._function is not None:
            self._function()

    def __reduce__(self) -> tuple[type[BeforeSaving], tuple[()]]:
        return BeforeSaving, ()


def hook_masks(
    module: nn.Module,
    optimizers: Iterable[Optimizer],
    mask_weights: Callable[..., None],
    meet_gradients: Callable[[], None],
    hold: Callable[[], None],
) -> list[RemovableHandle]:
    """Meet the gradients before each step, mask the weights after each step; hold them before they are saved."""
    optimizers = list(optimizers)
    every = [each for optimizer in optimizers for each in base_optimizers(optimizer) if fires_hooks(each)]
    handles = hook_gradients(optimizers, meet_gradients)
    handles += [each.register_step_post_hook(mask_weights) for each in every]
    saving: RemovableHandle = module.register_state_dict_pre_hook(BeforeSaving(hold))  # type: ignore[no-untyped-call]
    return [*handles, saving]
