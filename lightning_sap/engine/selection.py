"""SELECT: what a user names: globs, module types and predicates, and whether they match a parameter."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_sap.engine.roles import Role, role

Predicate: TypeAlias = Callable[[str, nn.Module, nn.Parameter], bool]
Selector: TypeAlias = str | type[nn.Module] | Predicate
Selection: TypeAlias = Sequence[Selector] | Selector | None  # lists first: jsonargparse writes the first kind that fits


@dataclass(frozen=True)
class Owner:
    """One place where a parameter stands in a module."""

    name: str
    own_name: str
    module: nn.Module
    ancestors: tuple[nn.Module, ...] = field(repr=False)


def check_selection(name: str, selection: Selection) -> None:
    """Raise unless it is made of globs, module types and predicates."""
    for selector in as_list(selection):
        is_type = isinstance(selector, type) and issubclass(selector, nn.Module)
        is_predicate = callable(selector) and not isinstance(selector, type | nn.Module)
        if not (isinstance(selector, str) or is_type or is_predicate):
            raise TypeError(
                f"{name} must be one or a list of parameter-name globs such as 'encoder.*', words such as 'output', "
                "module types such as nn.Linear, and predicates (name, module, parameter) -> bool; got "
                f"{selector!r}."
            )


def as_list(selection: Selection) -> list[Selector]:
    """The selectors of a selection."""
    if selection is None:
        return []
    if isinstance(selection, str | type) or callable(selection) or not isinstance(selection, Iterable):
        return [selection]
    return list(selection)


def resolved(selection: Selection, names: Sequence[str], module: nn.Module) -> list[Selector]:
    """The selectors; what is no pattern of a name may be a word, or the dotted path of a module type."""
    return [
        role(selector, module) or _module_type(selector) or selector
        if isinstance(selector, str) and not any(fnmatchcase(name, selector) for name in names)
        else selector
        for selector in as_list(selection)
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


def told(selector: Selector) -> str:
    """A selector in words."""
    if isinstance(selector, str | Role):
        return repr(selector.word if isinstance(selector, Role) else selector)
    return getattr(selector, "__name__", repr(selector))


def matches(owner: Owner, parameter: nn.Parameter, selectors: Sequence[Selector]) -> bool:
    """Whether one of the selectors matches a parameter in one of its places."""
    for selector in selectors:
        if isinstance(selector, str):
            if any(fnmatchcase(name, selector) for name in names_of(owner)):
                return True
        elif isinstance(selector, type):
            if any(isinstance(m, selector) for m in owner.ancestors):
                return True
        elif selector(owner.name, owner.module, parameter):
            return True
    return False


def names_of(owner: Owner) -> list[str]:
    """The parameter's name, and for a parametrized tensor also the name it had before."""
    if isinstance(owner.module, ParametrizationList):
        host = owner.name.rpartition("parametrizations.")[0]
        return [owner.name, host + owner.own_name]
    return [owner.name]
