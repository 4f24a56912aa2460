"""ROLES: words for parts of a network: its output, its input, its heads, its routers, its embeddings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_sap.engine.ends import ends_of
from lightning_sap.engine.matrices import EMBEDDINGS, holds_experts, why_no_matrix

HEAD = re.compile(r"(^|.*_)(heads?|classifier)$")  # a part of the path to a head
ROUTER = re.compile(r"(^|.*_)(gate|router|switch)$")


@dataclass(frozen=True)
class Role:
    """The parameters that a word stands for; it is a predicate on them."""

    word: str
    ids: frozenset[int] = field(repr=False)

    def __call__(self, name: str, module: nn.Module, parameter: nn.Parameter) -> bool:  # noqa: ARG002
        """Whether a parameter is one of them."""
        return id(parameter) in self.ids


def role(word: str, module: nn.Module) -> Role | None:
    """What a word stands for in a module; None if it is no such word.

    ``"output"`` and ``"input"`` are read off the graph where the module has an ``example_input_array``; else they are
    what the module says (``get_output_embeddings``, ``get_classifier``, ``get_input_embeddings``), or what is called a
    head, or the last and the first matrix in the order of the parameters. ``"heads"`` are the output, and what is
    called a head or classifier. ``"routers"`` choose between experts. ``"embeddings"`` are tables of vectors.

    Raises:
        ValueError: If there is none in the module.

    Example:
        >>> net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        >>> role("output", net)(None, None, net[2].weight), role("embeddings", net)(None, None, net[2].weight)
        (True, False)
    """
    if word not in WORDS:
        return None
    found = frozenset(id(parameter) for parameter in WORDS[word](module))
    if not found:
        raise ValueError(
            f"{word!r} in include or exclude stands for nothing in this module. Leave it out, or give globs on "
            "parameter names."
        )
    return Role(word, found)


def _output(module: nn.Module) -> list[nn.Parameter]:
    if found := _at_the_ends(module, "outputs"):
        return found
    if said := _said(module, "get_output_embeddings", "get_classifier"):
        return said
    return _named(module, HEAD) or [parameter for _, parameter in _matrices(module)][-1:]


def _input(module: nn.Module) -> list[nn.Parameter]:
    if found := _at_the_ends(module, "inputs"):
        return found
    return _said(module, "get_input_embeddings") or [parameter for _, parameter in _matrices(module)][:1]


def _heads(module: nn.Module) -> list[nn.Parameter]:
    return _output(module) + _named(module, HEAD)


def _routers(module: nn.Module) -> list[nn.Parameter]:
    """What is called a gate or router beside experts, with an output for each, or a single one."""
    found = []
    for block in module.modules():
        numbers = {number for name, child in block.named_children() if (number := _number_of_experts(name, child))}
        for path, part in block.named_modules() if numbers else ():
            if "experts" not in path.split(".") and ROUTER.match(path.rpartition(".")[2]):
                own = part.parameters(recurse=False)
                found += [p for p in own if p.dim() > 1 and p.shape[0] in {*numbers, 1}]
    return found


def _number_of_experts(name: str, part: nn.Module) -> int:
    own = [parameter for parameter in part.parameters(recurse=False) if holds_experts(part, parameter)]
    if own:
        return int(own[0].shape[0])
    return len(part) if name == "experts" and isinstance(part, nn.ModuleList) else 0


def _embeddings(module: nn.Module) -> list[nn.Parameter]:
    return [p for part in module.modules() if isinstance(part, EMBEDDINGS) for p in part.parameters(recurse=False)]


def _at_the_ends(module: nn.Module, end: str) -> list[nn.Parameter]:
    """What the graph of a forward on the module's example tells; nothing where it has none."""
    example = getattr(module, "example_input_array", None)
    if example is None:
        return []
    layers = [(part, p) for part in module.modules() for p in part.parameters(recurse=False) if p.dim() > 1]
    ends = ends_of(module, example, {id(parameter): id(part) for part, parameter in layers})
    return [] if ends is None else [parameter for _, parameter in layers if id(parameter) in getattr(ends, end)]


def _said(module: nn.Module, *methods: str) -> list[nn.Parameter]:
    """The matrices of the layers that parts of a module name by these methods, as transformers and timm have them."""
    found: list[Any] = []
    for part in module.modules():
        for name in methods:
            method = getattr(type(part), name, None)
            try:
                found.append(method(part) if callable(method) else None)
            except Exception:  # a model without them, or a method of another kind
                continue
    layers = [layer for each in found for layer in (each if isinstance(each, list | tuple) else [each])]
    return [p for layer in layers if isinstance(layer, nn.Module) for p in layer.parameters() if p.dim() > 1]


def _named(module: nn.Module, pattern: re.Pattern[str]) -> list[nn.Parameter]:
    """The matrices in parts whose path has a part of such a name."""
    return [p for path, p in _matrices(module) if any(pattern.match(part) for part in path.split("."))]


def _matrices(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for path, part in module.named_modules():
        for name, parameter in part.named_parameters(recurse=False):
            own_name = path.rpartition(".")[2] if isinstance(part, ParametrizationList) else name
            lazy = isinstance(parameter, nn.UninitializedParameter)
            if not lazy and parameter.dim() > 1 and why_no_matrix(part, own_name, parameter) is None:
                yield path, parameter


WORDS: dict[str, Callable[[nn.Module], list[nn.Parameter]]] = {
    "output": _output,
    "input": _input,
    "heads": _heads,
    "routers": _routers,
    "embeddings": _embeddings,
}
