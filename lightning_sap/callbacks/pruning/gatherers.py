"""What an importance is made of, taken while a batch is trained on: the gradients of weights, or the inputs of layers.

What is seen before an optimizer step joins the run's state with the step: until then a restart loses it, as it does the
gradients.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_sap.engine.inputs import input_layers, layout, sum_type, sums_of_squares
from lightning_sap.engine.weights import PrunableWeight
from lightning_sap.policies.gathered import Gathered, Taylor, Wanda
from lightning_sap.rewind import hook_gradients, hook_steps, innermost_optimizers, parameters_of
from lightning_sap.sharding import is_sharded, local, placed_like, shard_like, shards_of

if TYPE_CHECKING:
    from lightning_sap.callbacks.pruning.session import PruningSession

G = TypeVar("G", bound=Gathered)
Sums: TypeAlias = dict[str, Tensor]  # of one parameter, or of one layer that reads units
Shapes: TypeAlias = dict[str, tuple[int | None, ...]]  # None: any length
Layers: TypeAlias = tuple[dict[str, list[nn.Module]], dict[str, str]]  # by weight; and why others have none


class Gatherer(ABC, Generic[G]):
    """Takes what an importance needs of the weights of a run.

    Attributes:
        only_eager: Whether it must see layers at work: a compiled module calls no hook that is newer than itself.
    """

    only_eager = True

    def __init__(self, importance: G) -> None:
        self.importance = importance

    def missing(self, session: PruningSession, module: nn.Module) -> dict[str, str]:
        """The weights that it cannot score, and why."""
        return {}

    def check_batch(self, batch: Any) -> None:
        """Raise for a batch that does not hold what it needs."""

    @abstractmethod
    def shapes(
        self, session: PruningSession, module: nn.Module, weights: Mapping[str, PrunableWeight]
    ) -> dict[str, Shapes]:
        """What it keeps of these weights in the state: by key the sums and their shapes; ``count`` is of what."""

    @abstractmethod
    def watch(
        self, session: PruningSession, trainer: Trainer, module: LightningModule, batch: Any
    ) -> Iterator[RemovableHandle]:
        """Hooks that take it, for one batch."""

    @abstractmethod
    def scores(self, session: PruningSession, module: nn.Module, sums: Mapping[str, Sums]) -> dict[str, Tensor]:
        """The scores of the weights that this process holds, by parameter, where there are some; a collective."""


class OfGradients(Gatherer[Taylor]):
    """For each weight the sum over the steps of what it and its gradient say."""

    only_eager = False

    def shapes(
        self, session: PruningSession, module: nn.Module, weights: Mapping[str, PrunableWeight]
    ) -> dict[str, Shapes]:
        return {n: {"sum": tuple(w.parameter.shape), "count": ()} for n, w in weights.items()}

    def watch(
        self, session: PruningSession, trainer: Trainer, module: LightningModule, batch: Any
    ) -> Iterator[RemovableHandle]:
        for optimizer in innermost_optimizers(trainer.optimizers):
            yield from hook_gradients([optimizer], within(trainer, module, partial(self._take, session, optimizer)))

    def _take(self, session: PruningSession, optimizer: Optimizer) -> None:
        """Before a step: the gradients are what the optimizer is going to use."""
        scale, skips = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        if skips is not None and bool(skips):
            return
        held = {id(parameter) for parameter in parameters_of(optimizer)}
        for name, weight in session.weights.items():
            parameter = weight.parameter
            if id(parameter) not in held or parameter.grad is None:
                continue
            gradient = local(parameter.grad.detach())
            gradient = wide(gradient.to_dense() if gradient.is_sparse else gradient)
            if scale is not None:  # a fused step divides by it itself
                gradient = gradient / scale.to(gradient.device)
            term = self.importance.term(wide(local(parameter.detach())), gradient)
            one = torch.ones((), dtype=torch.int64)
            add_(session.state.gathered, name, {"sum": shard_like(term, parameter.detach()), "count": one})

    def scores(self, session: PruningSession, module: nn.Module, sums: Mapping[str, Sums]) -> dict[str, Tensor]:
        found = {}
        for name, entry in sums.items():
            rows = local(placed_like(entry["sum"], session.weights[name].parameter.detach()))
            found[name] = self.importance.score({**entry, "sum": rows})
        return found


class OfInputs(Gatherer[Wanda]):
    """For each weight the sums of the squares of what its layers read."""

    def __init__(self, importance: Wanda) -> None:
        super().__init__(importance)
        self._seen: dict[str, list[Tensor]] = {}
        self._known: tuple[object, Layers] = (None, ({}, {}))

    def _layers(self, module: nn.Module, weights: Mapping[str, PrunableWeight]) -> Layers:
        if self._known[0] is not weights:
            self._known = weights, input_layers(module, weights)
        return self._known[1]

    def missing(self, session: PruningSession, module: nn.Module) -> dict[str, str]:
        return self._layers(module, session.weights)[1]

    def shapes(
        self, session: PruningSession, module: nn.Module, weights: Mapping[str, PrunableWeight]
    ) -> dict[str, Shapes]:
        return {name: {"square": shape, "count": ()} for name, shape in self._layouts(module, weights).items()}

    def _layouts(self, module: nn.Module, weights: Mapping[str, PrunableWeight]) -> dict[str, tuple[int, ...]]:
        layers = self._layers(module, weights)[0]
        return {name: layout(of[0], weights[name].parameter.shape) for name, of in layers.items()}

    def watch(
        self, session: PruningSession, trainer: Trainer, module: LightningModule, batch: Any
    ) -> Iterator[RemovableHandle]:
        for name, layers in self._layers(module, session.weights)[0].items():
            for layer in layers:
                see = within(trainer, module, partial(self._see, name))
                yield layer.register_forward_hook(AfterLayer(see), with_kwargs=True)
        keep = within(trainer, module, lambda _: self._keep(session, trainer, module))
        yield from hook_steps(trainer.optimizers, keep)

    def _see(self, name: str, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        x = input_of(args, kwargs)
        if x is not None and isinstance(output, Tensor) and output.requires_grad:
            squares, count = sums_of_squares(layer, x)
            seen = torch.cat([squares.reshape(-1), count.reshape(1)])
            hook_gradient(output, lambda: self._seen.setdefault(name, []).append(seen))

    def _keep(self, session: PruningSession, trainer: Trainer, module: nn.Module) -> None:
        """After a step: add up what all ranks saw before it."""
        seen, self._seen = self._seen, {}
        shapes, totals = self._layouts(module, session.weights), []
        for name, shape in shapes.items():
            like = session.weights[name].parameter
            total = torch.zeros(math.prod(shape) + 1, dtype=sum_type(like), device=like.device)
            for part in seen.get(name, ()):
                total += part.to(total.device)
            totals.append(finite(total))
        for (name, shape), total in zip(shapes.items(), over_ranks(trainer, totals), strict=True):
            add_(session.state.gathered, name, {"square": total[:-1].reshape(shape), "count": total[-1].long()})

    def scores(self, session: PruningSession, module: nn.Module, sums: Mapping[str, Sums]) -> dict[str, Tensor]:
        found = {}
        for name, entry in sums.items():
            weight = session.weights[name].parameter.detach()
            rows, norms = wide(local(weight)), entry["square"].sqrt()
            if len(norms) > 1 and is_sharded(weight):
                norms = shards_of([weight]).own(norms, len(rows))
            found[name] = self.importance.score_of(rows, norms.to(rows.device, rows.dtype))
        return found


class AfterLayer:
    """Calls a function after a layer; copies and pickles of the layer hold an idle one."""

    def __init__(self, function: Callable[..., None] | None = None) -> None:
        self._function = function

    def __call__(self, *seen: Any) -> None:
        if self._function is not None:
            self._function(*seen)

    def __reduce__(self) -> tuple[type[AfterLayer], tuple[()]]:
        return AfterLayer, ()


def within(trainer: Trainer, module: LightningModule, function: Callable[..., None]) -> Callable[..., None]:
    """The function, idle in later fits: where another callback's ``on_exception`` fails, hooks are left behind."""
    return lambda *seen: function(*seen) if module.trainer is trainer else None


def add_(gathered: dict[str, Sums], key: str, more: Sums) -> None:
    """Add sums to those under a key; those of another form, as before a layer was replaced, make way."""
    known = gathered.get(key)
    if known is None or any(name not in known or known[name].shape != new.shape for name, new in more.items()):
        gathered[key] = more
        return
    for name, new in more.items():
        known[name] = placed_like(known[name], new)
        local(known[name]).add_(local(new))


def over_ranks(trainer: Trainer, tensors: list[Tensor]) -> list[Tensor]:
    """The sums of these tensors over all ranks, in one message; a collective."""
    if trainer.world_size == 1 or not tensors:
        return tensors
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    total = trainer.strategy.reduce(flat, reduce_op="sum")
    parts = total.split([tensor.numel() for tensor in tensors])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def finite(sums: Tensor) -> Tensor:
    """The same, or zeros: where activations overflow, a gradient scaler skips the step, or else training diverges."""
    return torch.where(sums.isfinite().all(), sums, torch.zeros_like(sums))


def wide(tensor: Tensor) -> Tensor:
    """In float32, or float64 where it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a layer reads: its first argument."""
    first = args[0] if args else next(iter(kwargs.values()), None)
    return first if isinstance(first, Tensor) else None


def hook_gradient(output: Tensor, function: Callable[[], Any]) -> None:
    """Call a function when a layer's output gets its gradient, the first time only.

    So each forward that a gradient flows back through counts once: not what gradient checkpointing computes again,
    whose outputs get no gradient, and not twice where a second backward, as of a gradient penalty, goes the same way.
    """
    calls = [function]

    def hook(_: Tensor) -> None:
        if calls:
            calls.pop()()

    output.register_hook(hook)  # type: ignore[no-untyped-call]
