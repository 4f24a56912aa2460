"""Which parameters are prunable, and how each divides into output units."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_sap.engine.effective import is_magnitude, keeps_zeros
from lightning_sap.engine.floors import Floor
from lightning_sap.engine.matrices import MAGNITUDE, PLAIN, Layout, layout_of, why_no_matrix
from lightning_sap.engine.normalised import normalised_axes, shared_axes
from lightning_sap.engine.selection import Owner, Selection, Selector, check_patterns, matches, names_of, resolved, told
from lightning_sap.engine.used import layer_keeps_zeros
from lightning_sap.sharding import reshard

Untrained: TypeAlias = Callable[[nn.Parameter], str | None]  # why a parameter is not trained; None if it is

COMPILE_PREFIX = "_orig_mod."  # what torch.compile puts into the names of the module it wraps
COMPLEX = "it is complex"  # why a parameter cannot be pruned
FROZEN = "it is frozen"
NOT_INCLUDED = "include does not match it"
LOSES_ZEROS = "a zero in it is none in the weight that its layer uses"
LORA = re.compile(r"(^|\.)lora_", re.IGNORECASE)


@dataclass(frozen=True)
class PrunableWeight:
    """A prunable parameter.

    Attributes:
        name: Its name.
        parameter: The live tensor.
        layout: How its matrix lies in it.
        normalised: The axes whose indices tell apart what its layer divides by a norm; None: it divides nothing.
    """

    name: str
    parameter: nn.Parameter
    layout: Layout = PLAIN
    normalised: tuple[int, ...] | None = None

    @property
    def transposed_groups(self) -> int:
        """In how many groups its units lie on axis 1; 0: they do not."""
        return self.layout.groups

    @property
    def units(self) -> Callable[[Tensor], Tensor] | None:
        """How a tensor of its shape becomes ``(output units, weights of a unit)``; None where axis 0 is the unit."""
        if self.layout.stack:
            return self._of_stack
        return self._transposed if self.transposed_groups else None

    def floors(self, min_per_unit: int) -> tuple[Floor, ...]:
        """What always stays of it: one weight of each set that is divided by its norm, and so many of each unit."""
        normalised = () if self.normalised is None else (Floor(1, self.normalised),)
        return (*normalised, *((Floor(min_per_unit),) if min_per_unit else ()))

    def _of_stack(self, tensor: Tensor) -> Tensor:
        """Units of several matrices: a matrix, and an output of it."""
        axis = self.layout.stack
        return (tensor.transpose(axis, axis + 1) if self.layout.inputs_first else tensor).flatten(0, axis)

    def _transposed(self, tensor: Tensor) -> Tensor:
        """Units of ``(in, out/groups, …)``: a group and an index on axis 1."""
        grouped = tensor.reshape(self.transposed_groups, -1, *tensor.shape[1:]).transpose(1, 2)
        return grouped.reshape(self.transposed_groups * tensor.shape[1], -1)


@dataclass
class Verdicts:
    """What is selected of a module.

    Attributes:
        found: What can be pruned.
        refused: By name why what was selected cannot be.
        others: By name why the rest was not selected.
    """

    found: dict[str, PrunableWeight] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)


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
    verdicts = verdicts_of(module, include, exclude, untrained)
    if not (verdicts.found or may_be_none):
        raise ValueError(_nothing_to_prune(module, include, exclude, verdicts.refused))
    return verdicts.found


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
    refused = verdicts_of(module, include, exclude, untrained).refused
    return {name: reason for name, reason in refused.items() if reason in (COMPLEX, LOSES_ZEROS)}


def verdicts_of(
    module: nn.Module, include: Selection = None, exclude: Selection = None, untrained: Untrained = is_frozen
) -> Verdicts:
    """What is selected of a module, and of each other parameter why it is not.

    Args:
        module: The module.
        include: As for :func:`prunable_weights`.
        exclude: As for :func:`prunable_weights`.
        untrained: As for :func:`prunable_weights`.

    Example:
        >>> verdicts_of(nn.Sequential(nn.Linear(4, 2, bias=False), nn.Embedding(3, 2)), exclude="0.*").others
        {'0.weight': "exclude='0.*'", '1.weight': 'it is an embedding'}
    """
    parameters = owners_of_parameters(module)
    names = [name for _, owners in parameters.values() for owner in owners for name in names_of(owner)]
    prunable = [
        n for p, owners in parameters.values() if not _obstacle(p, untrained) for o in owners for n in names_of(o)
    ]
    included, excluded = None if include is None else resolved(include, names, module), resolved(exclude, names, module)
    check_patterns([s for s in [*(included or []), *excluded] if isinstance(s, str)], names, prunable)
    verdicts = Verdicts()
    for parameter, places in parameters.values():
        _judge(verdicts, module, parameter, places, _obstacle(parameter, untrained), included, excluded)
    return verdicts


def _judge(
    verdicts: Verdicts,
    module: nn.Module,
    parameter: nn.Parameter,
    places: list[Owner],
    obstacle: str | None,
    included: list[Selector] | None,
    excluded: list[Selector],
) -> None:
    """Add what becomes of one parameter; an obstacle stands against it whatever its name."""
    owners = places if obstacle else [owner for owner in places if not _scales_only(owner)]
    if included is not None and obstacle not in (None, COMPLEX):
        # predicates may count on what can be pruned: floating point, two dimensions
        included = [selector for selector in included if isinstance(selector, str | type)]
    why = {owner.name: _why_not(owner, module, parameter, included) for owner in owners}
    chosen = [owner for owner in owners if why[owner.name] is None]
    out = [selector for selector in excluded if any(matches(owner, parameter, [selector]) for owner in owners)]
    if not chosen or out:
        reason = f"exclude={told(out[0])}" if out and not obstacle else next(iter(why.values()), MAGNITUDE)
        verdicts.others[places[0].name] = obstacle or reason or NOT_INCLUDED
        return
    name, host = owners[0].name, _host(chosen[0], module)
    if obstacle := obstacle or _parametrization_obstacle(owners):
        verdicts.refused[name] = obstacle
        return
    axes = shared_axes([normalised_axes(o.module, o.name.rpartition(".")[2], parameter.dim()) for o in owners])
    verdicts.found[name] = PrunableWeight(name, parameter, layout_of(host, chosen[0].own_name, parameter), axes)


def _why_not(owner: Owner, root: nn.Module, parameter: nn.Parameter, included: list[Selector] | None) -> str | None:
    """Why a parameter is not selected in one of its places; None if it is."""
    if included is not None:
        return None if matches(owner, parameter, included) else NOT_INCLUDED
    return why_no_matrix(_host(owner, root), owner.own_name, parameter)


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


def owners_of_parameters(module: nn.Module) -> dict[int, tuple[nn.Parameter, list[Owner]]]:
    """By id each parameter, and where it stands in a module."""
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


def _scales_only(owner: Owner) -> bool:
    return isinstance(owner.module, ParametrizationList) and is_magnitude(owner.module, owner.name.rpartition(".")[2])


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


def _nothing_to_prune(module: nn.Module, include: Selection, exclude: Selection, obstacles: Mapping[str, str]) -> str:
    refused = ", ".join(f"{name!r} ({reason})" for name, reason in itertools.islice(obstacles.items(), 10))
    return (
        f"The model has no prunable weight with include={include!r}, exclude={exclude!r}. Prunable are trainable "
        "parameters of two or more dimensions whose own name contains 'weight', embeddings left out; `include` lifts "
        f"the rule on names and embeddings. The first parameters of the model are {list(parameter_names(module))[:10]}."
        + (f" Selected, but not prunable: {refused}." if refused else "")
    )
