"""COPIES: parts of a module that average another part, or may, and are not trained themselves."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_sap.engine.weights import COMPILE_PREFIX
from lightning_sap.sharding import is_sharded

Parameters: TypeAlias = dict[str, nn.Parameter]  # of a part, by the names that they have in it


def averaged_copies(module: nn.Module) -> dict[str, str]:
    """Parameters that are averages of others: by name the name of what they average.

    They are what an ``AveragedModel``, or timm's ``ModelEmaV2`` or ``ModelEmaV3``, holds of a part of the module; where
    several parts have parameters of the same names and shapes, of the one with the nearest values.

    Example:
        >>> net = nn.Linear(4, 2)
        >>> averaged_copies(nn.ModuleDict({"net": net, "average": AveragedModel(net)}))
        {'average.module.weight': 'net.weight', 'average.module.bias': 'net.bias'}
    """
    averages = _averages(module)
    ids = {id(parameter) for path in averages for parameter in module.get_submodule(path).parameters()}
    parts = _parts(module)
    sources = {path: part for path, part in parts.items() if not all(id(p) in ids for p in part.values())}
    return _matched({path: parts[path] for path in averages if path in parts}, sources)


def possible_copies(module: nn.Module, trained: Iterable[Tensor] | None = None) -> dict[str, str]:
    """Parameters that may be averages of others, or a teacher: by name the name of what has their values now.

    A part counts if it is not trained, and a trained one has parameters of the same names, shapes and values. Only
    training tells a momentum encoder, which follows the trained one, from a copy that stays as it is.

    Args:
        module: The model, before training starts.
        trained: The parameters that are trained, such as those of the optimizers. None: those that require gradients.

    Example:
        >>> encoder, momentum = nn.Linear(4, 2), nn.Linear(4, 2).requires_grad_(False)
        >>> module = nn.ModuleDict({"encoder": encoder, "momentum": momentum})
        >>> possible_copies(module)
        {}
        >>> _ = momentum.load_state_dict(encoder.state_dict())
        >>> possible_copies(module)
        {'momentum.weight': 'encoder.weight', 'momentum.bias': 'encoder.bias'}
    """
    ids = {id(p) for p in (trained if trained is not None else (p for p in module.parameters() if p.requires_grad))}
    ids -= {id(p) for path in _averages(module) for p in module.get_submodule(path).parameters()}
    parts, sure = _parts(module), averaged_copies(module)
    copies = {
        path: part
        for path, part in parts.items()
        if not any(id(p) in ids or _named(path, name) in sure for name, p in part.items())
    }
    sources = {path: part for path, part in parts.items() if any(id(p) in ids for p in part.values())}
    return _matched(copies, sources, equal=True)


def _matched(copies: dict[str, Parameters], sources: dict[str, Parameters], *, equal: bool = False) -> dict[str, str]:
    """The names in the copies, a whole before its parts, by those in the nearest source that is alike, or equal."""
    found: dict[str, str] = {}
    for path, copy in copies.items():
        if all(_named(path, name) in found for name in copy):
            continue
        alike = [at for at, part in sources.items() if _is_alike(copy, part) and (not equal or _is_equal(copy, part))]
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
    plain = all(not (isinstance(p, nn.UninitializedParameter) or p.is_meta or is_sharded(p)) for p in found.values())
    return found if plain else {}


def _named(path: str, name: str) -> str:
    return f"{path}.{name}".lstrip(".").replace(COMPILE_PREFIX, "")


def _is_alike(copy: Parameters, source: Parameters) -> bool:
    """Whether the source has all of these names, for tensors of the same shapes."""
    return all(name in source and source[name].shape == parameter.shape for name, parameter in copy.items())


def _is_equal(copy: Parameters, source: Parameters) -> bool:
    """Whether the values are equal, and not just those that every part starts from, such as zeros and ones."""
    return any(p.dim() > 1 and bool((p != p.flatten()[0]).any()) for p in copy.values() if p.numel()) and all(
        torch.equal(parameter.detach().to(source[name]), source[name]) for name, parameter in copy.items()
    )


def _distance(copy: Parameters, source: Parameters) -> float:
    differences = (parameter.detach().to(source[name]) - source[name].detach() for name, parameter in copy.items())
    return float(sum(difference.abs().double().square().sum().cpu() for difference in differences))
