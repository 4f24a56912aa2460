"""Gradients at their source: changed where autograd computes them, before anyone can look at them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle, unserializable_hook

from lightning_sap.sharding import is_sharded


class GradientHooks:
    """Changes the gradients that autograd computes of parameters, in ``backward`` and in ``torch.autograd.grad``.

    So what the user makes of them (a projection, a norm, a sum of two losses) is made of the changed ones. Of shards it
    is the gradient that FSDP2 leaves in them. Not changed is what autograd computes of something else, as in
    ``torch.func``.

    Args:
        change: What becomes of the gradient of the parameter of that name; None: it stays, or was changed in place.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> hooks = GradientHooks(lambda name, gradient: gradient * torch.tensor([[1.0, 0.0]]))
        >>> hooks.watch(dict(layer.named_parameters()))
        >>> torch.autograd.grad(layer(torch.ones(2)).sum(), layer.weight)[0]
        tensor([[1., 0.]])
    """

    def __init__(self, change: Callable[[str, Tensor], Tensor | None]) -> None:
        self._change = change
        self._hooks: dict[str, tuple[nn.Parameter, RemovableHandle]] = {}

    def watch(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Change the gradients of these parameters, and of no others."""
        for name, (parameter, hook) in list(self._hooks.items()):
            if parameters.get(name) is not parameter:
                hook.remove()
                del self._hooks[name]
        for name, parameter in parameters.items():
            if isinstance(parameter, nn.UninitializedParameter) or name in self._hooks:
                continue
            if parameter.is_floating_point() or parameter.is_complex():
                self._hooks[name] = parameter, self._hook(name, parameter)

    def remove(self) -> None:
        """Leave all gradients as they are."""
        self.watch({})

    def _hook(self, name: str, parameter: nn.Parameter) -> RemovableHandle:
        @unserializable_hook  # type: ignore[untyped-decorator]  # a module is pickled without its hooks, rightly
        def hook(gradient: Tensor) -> Tensor | None:
            return self._change(name, gradient)

        @unserializable_hook  # type: ignore[untyped-decorator]
        def hook_of_shards(parameter: Tensor) -> None:  # autograd sees the whole weight; FSDP2 calls this at its end
            if parameter.grad is not None and (changed := self._change(name, parameter.grad)) is not None:
                parameter.grad = changed

        flag = parameter.requires_grad
        parameter.requires_grad_()  # PyTorch takes no hook of what is frozen now and may be trained later
        try:
            handle: RemovableHandle = (
                parameter.register_post_accumulate_grad_hook(hook_of_shards)  # type: ignore[no-untyped-call]
                if is_sharded(parameter)
                else parameter.register_hook(hook)  # type: ignore[no-untyped-call]
            )
        finally:
            parameter.requires_grad_(flag)
        return handle
