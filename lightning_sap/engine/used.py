"""USED: the weights that layers really compute with, seen where a layer computes."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_sap.engine.effective import SCATTERING
from lightning_sap.engine.tracing import call, evaluating
from lightning_sap.sharding import is_sharded

WEIGHTED = (  # what takes a weight as its second argument
    functional.linear,
    functional.conv1d,
    functional.conv2d,
    functional.conv3d,
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
)
PRODUCTS = (torch.addmm, torch.matmul, torch.mm, torch.bmm, torch.baddbmm, torch.einsum, Tensor.matmul, Tensor.mm)
LAYERS = (nn.Linear, _ConvNd)
KNOWN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # layers that were asked: it takes a forward of each


class Uses(TorchFunctionMode):
    """Hands on each weight that a linear layer, a convolution, or a product with a parameter computes with."""

    def __init__(self, see: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Look at the arguments of a call, and make it."""
        kwargs = kwargs or {}
        if func in WEIGHTED:
            self._see(args[1] if len(args) > 1 else kwargs["weight"])
        elif func in PRODUCTS:
            for each in (*args, *kwargs.values()):
                if isinstance(each, nn.Parameter) and each.dim() > 1:
                    self._see(each)
        return func(*args, **kwargs)


def layer_keeps_zeros(layer: nn.Module, own_name: str) -> bool | None:
    """Whether a zero in the weight of a layer is a zero in what the layer computes with; None if it cannot be asked.

    Asked are layers that are a ``Linear`` or a convolution with a forward of their own, which may standardise the
    weight there: a copy computes an example of noise, with half of the places set to zero, then the other half, and the
    same with other halves. Others compute with the parameter.

    Example:
        >>> class Centred(nn.Linear):
        ...     def forward(self, inputs):
        ...         return functional.linear(inputs, self.weight - self.weight.mean(1, keepdim=True))
        >>> layer_keeps_zeros(nn.Linear(4, 3), "weight"), layer_keeps_zeros(Centred(4, 3), "weight")
        (True, False)
    """
    weight = getattr(layer, own_name, None)
    plain = isinstance(weight, nn.Parameter) and not isinstance(weight, nn.UninitializedParameter)
    if not (plain and isinstance(layer, LAYERS) and own_name == "weight") or _is_of_torch(layer):
        return True
    if weight is None or is_sharded(weight) or weight.is_meta or not weight.is_floating_point():
        return None
    if layer not in KNOWN:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                KNOWN[layer] = _ask(layer)
        except Exception:  # it takes other inputs, or cannot be copied
            return None
    return KNOWN[layer]


def _is_of_torch(layer: nn.Module) -> bool:
    return bool(type(layer).forward.__module__.startswith("torch.nn.modules."))


def _ask(layer: nn.Module) -> bool:
    twin: Any = copy.deepcopy(layer).eval()
    values = twin.weight.detach().where(twin.weight != 0, 1).clone()
    position = torch.arange(values.numel(), device=values.device).reshape(values.shape)
    seen: list[Tensor] = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        example = _example(twin, values)
        for factor, side in itertools.product(SCATTERING, (0, 1)):
            half = (position * factor >> 16) % 2 == side
            twin.weight.copy_(values.masked_fill(half, 0))
            seen.clear()
            with Uses(seen.append):
                twin.forward(example)  # not the user's hooks
            alike = [used for used in seen if used.shape == values.shape]
            if any(bool(used[half].nan_to_num(0.0).any()) for used in alike):
                return False
    return True


def _example(layer: Any, like: Tensor) -> Tensor:
    """Noise that the layer takes: one sample, as large as its kernel reaches."""
    if isinstance(layer, nn.Linear):
        return torch.randn(1, layer.in_features).to(like)
    sizes = [d * (k - 1) + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    return torch.randn(1, layer.in_channels, *sizes).to(like)


@dataclass(frozen=True)
class Effective:
    """How many of the weights that a network computes with are not zero.

    Attributes:
        layers: By the path of a layer how many of its weights are not zero, and how many it has.
    """

    layers: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def remaining(self) -> float:
        """Fraction that is not zero; 1.0 where there are none."""
        total = sum(size for _, size in self.layers.values())
        return sum(count for count, _ in self.layers.values()) / total if total else 1.0


def effective_weights(module: nn.Module, example_inputs: Any) -> Effective:
    """How sparse the weights are that a network computes with, measured while it computes an example.

    That is another number than the zeros among its parameters where layers standardise their weights, merge branches or
    add adapters. Seen are the weights of linear layers and convolutions, whatever makes them, and parameters in matrix
    products. A layer that is used several times counts as in its last use, one that is not used does not count.

    Args:
        module: The network; it is run once, in evaluation mode and without gradients.
        example_inputs: What it takes: a tensor, a tuple of arguments or a mapping of keyword arguments.

    Returns:
        An :class:`Effective`: ``remaining``, the fraction that is not zero, and ``layers``.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
        >>> _ = nn.init.zeros_(net[0].weight)
        >>> effective_weights(net, torch.ones(1, 4))
        Effective(layers={'0': (0, 8), '2': (4, 4)})
    """
    found: dict[str, list[tuple[int, int]]] = {}
    running: list[str] = [""]
    handles = [handle for path, part in module.named_modules() for handle in _followed(part, path, running, found)]

    def see(weight: Tensor) -> None:
        found.setdefault(running[-1], []).append((int(weight.count_nonzero()), weight.numel()))

    try:
        with evaluating(module), torch.no_grad(), Uses(see), torch.compiler.set_stance("force_eager"):
            # a list is what a detector takes as its one argument
            call(module, [example_inputs] if isinstance(example_inputs, list) else example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return Effective({path: _total(parts) for path, parts in found.items() if parts})


def _followed(
    part: nn.Module, path: str, running: list[str], found: dict[str, list[tuple[int, int]]]
) -> Iterable[RemovableHandle]:
    def enter(*_: Any) -> None:
        running.append(path)
        found[path] = []

    def leave(*_: Any) -> None:
        running.pop()

    return part.register_forward_pre_hook(enter, prepend=True), part.register_forward_hook(leave, always_call=True)


def _total(parts: list[tuple[int, int]]) -> tuple[int, int]:
    return sum(count for count, _ in parts), sum(size for _, size in parts)
