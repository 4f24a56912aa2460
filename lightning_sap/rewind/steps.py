"""The steps that optimizers take, whoever asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_sap.rewind.kept import base_optimizers


def innermost_optimizers(optimizers: Iterable[Optimizer]) -> list[Optimizer]:
    """Those that wrap no other one and so take the real steps, each once."""
    every = [each for optimizer in optimizers for each in base_optimizers(optimizer)]
    return list({id(each): each for each in every if len(base_optimizers(each)) == 1}.values())


def fires_hooks(optimizer: Any) -> bool:
    """Whether PyTorch calls step hooks of this optimizer.

    It does not for one that is no ``torch.optim.Optimizer``, nor for one that skips ``super().__init__()``, until its
    ``zero_grad`` makes up for it; and some of these cannot even take a hook.
    """
    try:
        optimizer.register_step_post_hook(lambda *_: None).remove()
    except (AttributeError, TypeError):
        return False
    return bool(getattr(type(optimizer).step, "hooked", False))


def hook_steps(optimizers: Iterable[Optimizer], hook: Callable[[Optimizer], None]) -> list[RemovableHandle]:
    """Call a function after each real step, once, whoever takes it: with the innermost optimizer that took it.

    A step of SAM or Lookahead is one of the optimizer inside, a step of LBFGS is one however often it evaluates its
    closure, a step in a step (``super().step()`` of a subclass) is one, and one that a gradient scaler skips is none.
    What does not fire hooks, see :func:`fires_hooks`, is left out.

    Example:
        >>> from torch import nn, optim
        >>> sgd, steps = optim.SGD(nn.Linear(1, 1).parameters()), []
        >>> handles = hook_steps([sgd], steps.append)
        >>> _ = sgd.step()
        >>> len(steps)
        1
    """
    handles = []
    for optimizer in filter(fires_hooks, innermost_optimizers(optimizers)):
        depths = [0]

        def enter(*_: Any, depths: list[int] = depths) -> None:
            depths[0] += 1

        def leave(optimizer: Optimizer, *_: Any, depths: list[int] = depths) -> None:
            depths[0] -= 1
            # what a fused step gets of a gradient scaler: it runs, and changes nothing
            if depths[0] == 0 and not getattr(optimizer, "found_inf", None):
                hook(optimizer)

        handles += [optimizer.register_step_pre_hook(enter), optimizer.register_step_post_hook(leave)]
    return handles


def hook_gradients(optimizers: Iterable[Optimizer], change_: Callable[[], None]) -> list[RemovableHandle]:
    """Call a function before each step, after all else that changes gradients, and after each closure within one.

    Optimizers that are wrapped have the hook too. What does not fire hooks is left out.
    """

    def before(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        me, *rest = args
        if rest and rest[0] is not None:
            return (me, changing(rest[0]), *rest[1:]), kwargs
        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": changing(kwargs["closure"])}
        change_()
        return args, kwargs

    def changing(closure: Callable[[], Any]) -> Callable[[], Any]:
        def changed() -> Any:
            loss = closure()
            change_()
            return loss

        return changed

    every = {id(each): each for optimizer in optimizers for each in base_optimizers(optimizer)}
    return [each.register_step_pre_hook(before) for each in every.values() if fires_hooks(each)]
