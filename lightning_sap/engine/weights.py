"""Which parameters are prunable, and how each divides into output units."""

from __future__ import annotations

import difflib
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_sap.engine.effective import is_full_size, keeps_zeros
from lightning_sap.engine.used import layer_keeps_zeros
from lightning_sap.sharding import reshard

Predicate: TypeAlias = Callable[[str, nn.Module, nn.Parameter], bool]
Selector: TypeAlias = str | type[nn.Module] | Predicate
Selection: TypeAlias = Selector | Sequence[Selector] | None
Untrained: TypeAlias = Callable[[nn.Parameter], str | None]  # why a parameter is not trained; None if it is

COMPILE_PREFIX = "_orig_mod."  # what torch.compile puts into the names of the module it wraps
COMPLEX = "it is complex"  # why a parameter cannot be pruned
FROZEN = "it is frozen"
LOSES_ZEROS = "a zero in it is none in the weight that its layer uses"
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
LORA = re.compile(r"(^|\.)lora_", re.IGNORECASE)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Owner:
    """One place where a parameter stands in a module."""

    name: str
    own_name: str
    module: nn.Module
    ancestors: tuple[nn.Module, ...] = field(repr=False)


@dataclass(frozen=True)
class PrunableWeight:
    """A prunable parameter: its name, the live tensor, and in how many groups its units lie on axis 1; 0: on axis 0."""

    name: str
    parameter: nn.Parameter
    transposed_groups: int = 0

    @property
    def units(self) -> Callable[[Tensor], Tensor] | None:
        """How a tensor of its shape becomes ``(output units, weights of a unit)``; None where axis 0 is the unit."""
        return self._transposed if self.transposed_groups else None

    def _transposed(self, tensor: Tensor) -> Tensor:
        """Units of ``(in, out/groups, …)``: a group and an index on axis 1."""
        grouped = tensor.reshape(self.transposed_groups, -1, *tensor.shape[1:]).transpose(1, 2)
        return grouped.reshape(self.transposed_groups * tensor.shape[1], -1)


def is_frozen(parameter: nn.Parameter) -> str | None:
    """``FROZEN`` for a parameter that requires no gradient."""
    return None if parameter.requires_grad else FROZEN


def prunable_weights(
    module: nn.Module,
    include: Selection = None,
    exclude: Selection = None,
    *,
    may_be_none: bool = False,
    untrained: Untrained = is_frozen,
) -> dict[str, PrunableWeight]:
    """Prunable parameters of a module by name, in the module's order, each tied parameter once.

    By default those are the trainable parameters of two or more dimensions whose own name contains "weight", embeddings
    and the magnitudes of weight norm left out; a parametrized tensor goes by the parametrized name, a tied one is
    prunable if any of its owners is. What is trained is told by ``requires_grad``, unless ``untrained`` is given.

    Args:
        module: The model.
        include: Parameter-name globs, module types (of the owner or a module around it) or predicates
            ``(name, module, parameter) -> bool``; if given, only what one of them matches, whatever its name or owner.
        exclude: The same; what one of them matches is left out.
        may_be_none: Whether it is fine if nothing is left to prune, as where all is frozen.
        untrained: Says why a parameter is not trained, and None of those that are.

    Raises:
        ValueError: If a pattern matches no parameter, or nothing is left to prune.

    Example:
        >>> from torch import nn
        >>> list(prunable_weights(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2), nn.LayerNorm(2))))
        ['1.weight']
    """
    found, obstacles = _select(module, include, exclude, untrained)
    if not (found or may_be_none):
        raise ValueError(_nothing_to_prune(module, include, exclude, obstacles))
    return found


def left_out(
    module: nn.Module, include: Selection = None, exclude: Selection = None, untrained: Untrained = is_frozen
) -> dict[str, str]:
    """What would be pruned by its name, and cannot be: complex parameters, and those whose zeros do not last.

    Args:
        module: The model.
        include: As for :func:`prunable_weights`.
        exclude: As for :func:`prunable_weights`.
        untrained: As for :func:`prunable_weights`.

    Returns:
        By name the reason, ``COMPLEX`` or ``LOSES_ZEROS``.

    Example:
        >>> from torch import nn
        >>> from torch.nn.utils import parametrizations
        >>> left_out(nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Linear(4, 2)))
        {'0.parametrizations.weight.original': 'a zero in it is none in the weight that its layer uses'}
    """
    _, obstacles = _select(module, include, exclude, untrained)
    return {name: reason for name, reason in obstacles.items() if reason in (COMPLEX, LOSES_ZEROS)}


def _select(
    module: nn.Module, include: Selection, exclude: Selection, untrained: Untrained
) -> tuple[dict[str, PrunableWeight], dict[str, str]]:
    """What is selected: that which can be pruned, and by name why the rest cannot."""
    parameters = _owners_of_parameters(module)
    names = [name for _, owners in parameters.values() for owner in owners for name in _names(owner)]
    prunable = [
        n for p, owners in parameters.values() if not _obstacle(p, untrained) for o in owners for n in _names(o)
    ]
    included, excluded = _resolved(include, names), _resolved(exclude, names)
    check_patterns([s for s in included + excluded if isinstance(s, str)], names, prunable)
    found, obstacles = {}, {}
    for parameter, places in parameters.values():
        obstacle = _obstacle(parameter, untrained)
        owners = places if obstacle else [owner for owner in places if _is_full_size(owner, parameter)]
        # predicates may count on what can be pruned: floating point, two dimensions
        asked = included if obstacle in (None, COMPLEX) else [s for s in included if isinstance(s, str | type)]
        chosen = [o for o in owners if _matches(o, parameter, asked) or (include is None and _is_weight(o, module))]
        if not chosen or any(_matches(owner, parameter, excluded) for owner in owners):
            continue
        name = owners[0].name
        if obstacle := obstacle or _parametrization_obstacle(owners):
            obstacles[name] = obstacle
        else:
            found[name] = PrunableWeight(name, parameter, groups_on_axis_1(_host(chosen[0], module)))
    return found, obstacles


def parameter_names(module: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by the name they have without ``torch.compile``'s prefixes, each tied parameter once."""
    reshard(module)
    return {name.replace(COMPILE_PREFIX, ""): parameter for name, parameter in module.named_parameters()}


def low_rank_adapters(module: nn.Module, weights: Mapping[str, PrunableWeight]) -> list[str]:
    """Those of these weights that are low-rank adapters, which add their product to a frozen weight.

    They are recognised by a part of their name that starts with ``lora_``, as with peft, or by their shapes: in one
    layer (a module's own parameters and those of its children) a frozen weight and two trainable ones of lower rank
    whose product has its shape.

    Example:
        >>> from torch import nn
        >>> base, down, up = nn.Linear(8, 6).requires_grad_(False), nn.Linear(8, 2), nn.Linear(2, 6)
        >>> layer = nn.ModuleList([base, down, up])
        >>> low_rank_adapters(layer, prunable_weights(layer))
        ['1.weight', '2.weight']
    """
    found = {id(p) for layer in module.modules() for pair in _low_rank_pairs(layer) for p in pair}
    return [name for name, weight in weights.items() if LORA.search(name) or id(weight.parameter) in found]


def _low_rank_pairs(layer: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """Trainable factors of the shape of a frozen weight, in either order."""
    own = [p for part in (layer, *layer.children()) for p in part.parameters(recurse=False)]
    matrices = [p for p in own if not isinstance(p, nn.UninitializedParameter) and p.dim() >= 2]
    frozen = {tuple(p.shape[:2]) for p in matrices if not p.requires_grad}
    trained = [p for p in matrices if p.requires_grad] if frozen else []
    for left, right in itertools.permutations(trained, 2):
        (rows, rank), (inner, columns) = left.shape[:2], right.shape[:2]
        if rank == inner < min(rows, columns) and {(rows, columns), (columns, rows)} & frozen:
            yield left, right


def _owners_of_parameters(module: nn.Module) -> dict[int, tuple[nn.Parameter, list[Owner]]]:
    reshard(module)
    modules = dict(module.named_modules(remove_duplicate=False))
    found: dict[int, tuple[nn.Parameter, list[Owner]]] = {}
    for path, owner in modules.items():
        for own_name, parameter in owner.named_parameters(recurse=False):
            name = f"{path}.{own_name}".lstrip(".").replace(COMPILE_PREFIX, "")
            entry = found.setdefault(id(parameter), (parameter, []))
            acts_as = path.rpartition(".")[2] if isinstance(owner, ParametrizationList) else own_name
            if all(o.name != name for o in entry[1]):
                entry[1].append(Owner(name, acts_as, owner, tuple(_around(path, modules))))
    return found


def _around(path: str, modules: dict[str, nn.Module]) -> Iterator[nn.Module]:
    """The module at a path and those that contain it."""
    while path:
        yield modules[path]
        path = path.rpartition(".")[0]
    yield modules[""]


def _host(owner: Owner, root: nn.Module) -> nn.Module:
    """The module a weight acts in: for a parametrized tensor, the one that was parametrized."""
    if not isinstance(owner.module, ParametrizationList):
        return owner.module
    return owner.ancestors[2] if len(owner.ancestors) > 2 else root


def groups_on_axis_1(host: nn.Module) -> int:
    """In how many groups the output units of a module's weight lie on axis 1; 0: they lie on axis 0."""
    if isinstance(host, TRANSPOSED):
        return int(host.groups)
    transformers = sys.modules.get("transformers.pytorch_utils")  # a model with its layers has imported it
    return int(transformers is not None and isinstance(host, transformers.Conv1D))


def _is_full_size(owner: Owner, parameter: nn.Parameter) -> bool:
    return not isinstance(owner.module, ParametrizationList) or is_full_size(owner.module, parameter)


def _obstacle(parameter: nn.Parameter, untrained: Untrained) -> str | None:
    """Why a parameter cannot be pruned, whatever its name."""
    if isinstance(parameter, nn.UninitializedParameter):
        return "it has no shape before the first forward"
    if reason := untrained(parameter):
        return reason
    found = {
        "it has fewer than two dimensions": parameter.dim() < 2,
        "it has no elements": parameter.numel() == 0,
        COMPLEX: parameter.is_complex(),
        "it holds no floating-point numbers": not parameter.is_floating_point(),
    }
    return next((reason for reason, holds in found.items() if holds), None)


def _parametrization_obstacle(owners: Sequence[Owner]) -> str | None:
    """Why a tensor of which its layer makes another cannot be pruned; of a tied one, where any layer forbids it."""
    lists = [(o.module, o.name.rpartition(".")[2]) for o in owners if isinstance(o.module, ParametrizationList)]
    others = [layer_keeps_zeros(o.module, o.own_name) for o in owners if not isinstance(o.module, ParametrizationList)]
    kept = all(keeps_zeros(parametrizations, own_name) for parametrizations, own_name in lists)
    return None if kept and False not in others else LOSES_ZEROS


def _is_weight(owner: Owner, root: nn.Module) -> bool:
    name, other = owner.own_name, owner.own_name.removesuffix("_g") + "_v"
    is_magnitude = name.endswith("_g") and hasattr(owner.module, other)  # of torch.nn.utils.weight_norm
    return "weight" in name and not is_magnitude and not isinstance(_host(owner, root), EMBEDDINGS)


def _names(owner: Owner) -> list[str]:
    """The parameter's name, and for a parametrized tensor also the name it had before."""
    if isinstance(owner.module, ParametrizationList):
        host = owner.name.rpartition("parametrizations.")[0]
        return [owner.name, host + owner.own_name]
    return [owner.name]


def _matches(owner: Owner, parameter: nn.Parameter, selectors: Sequence[Selector]) -> bool:
    for selector in selectors:
        if isinstance(selector, str):
            if any(fnmatchcase(name, selector) for name in _names(owner)):
                return True
        elif isinstance(selector, type):
            if any(isinstance(m, selector) for m in owner.ancestors):
                return True
        elif selector(owner.name, owner.module, parameter):
            return True
    return False


def check_selection(name: str, selection: Selection) -> None:
    """Raise unless it is made of globs, module types and predicates."""
    for selector in _as_list(selection):
        is_type = isinstance(selector, type) and issubclass(selector, nn.Module)
        is_predicate = callable(selector) and not isinstance(selector, type | nn.Module)
        if not (isinstance(selector, str) or is_type or is_predicate):
            raise TypeError(
                f"{name} must be one or a list of parameter-name globs such as 'encoder.*', module types such as "
                f"nn.Linear, and predicates (name, module, parameter) -> bool; got {selector!r}."
            )


def _as_list(selection: Selection) -> list[Selector]:
    if selection is None:
        return []
    if isinstance(selection, str | type) or callable(selection) or not isinstance(selection, Iterable):
        return [selection]
    return list(selection)


def _resolved(selection: Selection, names: Sequence[str]) -> list[Selector]:
    """The selectors, a dotted path of a module type as that type where it is no pattern of a name."""
    return [
        _module_type(selector) or selector
        if isinstance(selector, str) and not any(fnmatchcase(name, selector) for name in names)
        else selector
        for selector in _as_list(selection)
    ]


def _module_type(path: str) -> type[nn.Module] | None:
    """The module type of a dotted path such as ``torch.nn.Linear``, as YAML gives it; nothing is imported for it."""
    home, _, name = path.rpartition(".")
    kind = getattr(sys.modules.get(home), name, None)
    return kind if isinstance(kind, type) and issubclass(kind, nn.Module) else None


def check_patterns(patterns: Sequence[str], names: Sequence[str], offered: Sequence[str] | None = None) -> None:
    """Raise unless each glob matches one of the names; the closest of those offered (None: of the names) are told."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            closest = difflib.get_close_matches(pattern, names if offered is None else offered, n=5, cutoff=0.0)
            raise ValueError(
                f"The pattern {pattern!r} matches no parameter. Patterns are globs on whole parameter names "
                f"(say '*.fc.*'); the closest names are {closest}."
            )


def _nothing_to_prune(module: nn.Module, include: Selection, exclude: Selection, obstacles: Mapping[str, str]) -> str:
    refused = ", ".join(f"{name!r} ({reason})" for name, reason in itertools.islice(obstacles.items(), 10))
    return (
        f"The model has no prunable weight with include={include!r}, exclude={exclude!r}. Prunable are trainable "
        "parameters of two or more dimensions whose own name contains 'weight', embeddings left out; `include` lifts "
        f"the rule on names and embeddings. The first parameters of the model are {list(parameter_names(module))[:10]}."
        + (f" Selected, but not prunable: {refused}." if refused else "")
    )
