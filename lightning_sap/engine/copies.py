"""COPIES: parts of a module that average another part, or may, and are not trained themselves."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Container, Iterable, Mapping
from typing import TypeAlias

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_sap.engine.weights import COMPILE_PREFIX
from lightning_sap.sharding import whole

Parameters: TypeAlias = dict[str, nn.Parameter]  # of a part, by the names that they have in it


def averaged_copies(module: nn.Module, trained: Container[str] = ()) -> dict[str, str]:
    """Parameters that are averages of others: by name the name of what they average.

    They are what an ``AveragedModel``, or timm's ``ModelEmaV2`` or ``ModelEmaV3``, holds of a part of the module; where
    several parts have parameters of the same names and shapes, of one that is trained, and of these of the one with the
    nearest values; a collective where they are sharded.

    Args:
        module: The module.
        trained: Names of the weights that are trained, as far as that is known.

    Example:
        >>> net = nn.Linear(4, 2)
        >>> averaged_copies(nn.ModuleDict({"net": net, "average": AveragedModel(net)}))
        {'average.module.weight': 'net.weight', 'average.module.bias': 'net.bias'}
    """
    averages = _averages(module)
    ids = {id(parameter) for path in averages for parameter in module.get_submodule(path).parameters()}
    parts = _parts(module)
    sources = {path: part for path, part in parts.items() if not all(id(p) in ids for p in part.values())}
    learning = {at: part for at, part in sources.items() if any(_named(at, name) in trained for name in part)}
    copies = {path: parts[path] for path in averages if path in parts}
    return {**_matched(copies, sources), **_matched(copies, learning)}


def parameters_of_averages(module: nn.Module) -> list[str]:
    """The names of all parameters that an ``AveragedModel``, or timm's ``ModelEmaV2`` or ``ModelEmaV3``, holds.

    Example:
        >>> parameters_of_averages(nn.ModuleDict({"average": AveragedModel(nn.Linear(4, 2))}))
        ['average.module.weight', 'average.module.bias']
    """
    return [
        _named(path, name) for path in _averages(module) for name, _ in module.get_submodule(path).named_parameters()
    ]


def followers(
    tensors: Mapping[str, Tensor], moved: Iterable[str], trained: Iterable[str], first: Mapping[str, int]
) -> dict[str, str]:
    """Weights that follow trained ones, as those of a momentum encoder do: by name the name of what they follow.

    A weight that is not trained, and that training changes all the same, follows the trained one whose values it had
    before training; of several, the one whose name ends most alike. A teacher that stays as it is, is none.

    Args:
        tensors: All weights by name, in the order of the module, and what may follow them.
        moved: Names of those that are not trained, and that training changed.
        trained: Names of those that are trained.
        first: The fingerprint of each before training.

    Example:
        >>> net = nn.ModuleDict({"encoder": nn.Linear(4, 2), "momentum": nn.Linear(4, 2)})
        >>> tensors = dict(net.named_parameters())
        >>> followers(tensors, ["momentum.weight"], ["encoder.weight"], dict.fromkeys(tensors, 7))
        {'momentum.weight': 'encoder.weight'}
    """
    sources, found = [name for name in trained if name in first], {}
    for copy in moved:
        shape = tensors[copy].shape
        equal = [n for n in sources if first[n] == first[copy] and tensors[n].shape == shape]
        if equal:
            found[copy] = max(equal, key=lambda name: _common_ending(name.split("."), copy.split(".")))
    return found


def _common_ending(one: list[str], other: list[str]) -> int:
    """How many parts of two paths are equal, counted from their ends."""
    equal = (a == b for a, b in zip(reversed(one), reversed(other), strict=False))
    return sum(1 for _ in itertools.takewhile(bool, equal))


def _matched(copies: dict[str, Parameters], sources: dict[str, Parameters]) -> dict[str, str]:
    """The names in the copies, a whole before its parts, by those in the nearest source that is alike."""
    found: dict[str, str] = {}
    for path, copy in copies.items():
        if all(_named(path, name) in found for name in copy):
            continue
        alike = [at for at, part in sources.items() if _is_alike(copy, part)]
        if alike:
            at = alike[0] if len(alike) == 1 else min(alike, key=lambda at: _distance(copy, sources[at]))
            found |= {_named(path, name): _named(at, name) for name in copy}
    return found


def _averages(module: nn.Module) -> list[str]:
    return [f"{path}.module".lstrip(".") for path, part in module.named_modules() if _keeps_average(part)]


def _parts(module: nn.Module) -> dict[str, Parameters]:
    """The parts of a module that have parameters whose values can be compared."""
    return {path: parameters for path, part in module.named_modules() if (parameters := _parameters(part))}


def _keeps_average(part: nn.Module) -> bool:
    timm = sys.modules.get("timm.utils.model_ema")  # a model that holds one has imported it
    return isinstance(part, AveragedModel if timm is None else (AveragedModel, timm.ModelEmaV2, timm.ModelEmaV3))


def _parameters(part: nn.Module) -> Parameters:
    """Those of a part, if their values can be compared."""
    found = {name.replace(COMPILE_PREFIX, ""): parameter for name, parameter in part.named_parameters()}
    plain = all(not (isinstance(p, nn.UninitializedParameter) or p.is_meta) for p in found.values())
    return found if plain else {}


def _named(path: str, name: str) -> str:
    return f"{path}.{name}".lstrip(".").replace(COMPILE_PREFIX, "")


def _is_alike(copy: Parameters, source: Parameters) -> bool:
    """Whether the source has all of these names, for tensors of the same shapes."""
    return all(name in source and source[name].shape == parameter.shape for name, parameter in copy.items())


def _distance(copy: Parameters, source: Parameters) -> float:
    """A collective where they are sharded; only one parameter is ever whole."""
    total = 0.0
    for name, parameter in copy.items():
        other = whole(source[name].detach())
        total += float((whole(parameter.detach()).to(other) - other).abs().double().square().sum())
    return total
