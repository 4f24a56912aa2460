"""How callbacks take the options: in their signatures and docstrings, and with an error for a name that is none."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Collection, Iterable
from typing import Any, TypeVar

from lightning_sap.callbacks.pruning.options import Options

C = TypeVar("C", bound=type[Any])

ENTRY = re.compile(r"^    \*\*options: .*\n(?:     .*\n)*", re.MULTILINE)  # stands for all that Options declares


def takes_options(callback: C) -> C:
    """Write the options that a callback takes as ``**options`` into its signature and its docstring.

    For whoever asks at run time: ``help``, notebooks, LightningCLI's ``--help`` and the documentation.
    """
    init = callback.__init__
    own = inspect.signature(init, eval_str=True)
    before = [parameter for parameter in own.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    declared = inspect.signature(Options, eval_str=True).parameters.values()
    added = [parameter for parameter in declared if parameter.kind is parameter.KEYWORD_ONLY]
    init.__signature__ = own.replace(parameters=[*before, *added])
    if callback.__doc__ and Options.__doc__:  # `python -OO` has none
        entries = inspect.cleandoc(Options.__doc__).partition("Args:\n")[2].partition("\n\n")[0] + "\n"
        callback.__doc__ = ENTRY.sub(lambda _: entries, inspect.cleandoc(callback.__doc__))
    return callback


def check_names(callback: object, given: Iterable[str]) -> None:
    """Raise if a callback is given an option that there is not, with the name that comes closest.

    Raises:
        TypeError: If one is unknown.
    """
    inits = [vars(kind)["__init__"] for kind in type(callback).__mro__ if "__init__" in vars(kind)]
    parameters = [parameter for init in inits for parameter in inspect.signature(init).parameters.values()]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = {parameter.name for parameter in parameters if parameter.kind in named} - {"self"}
    check_known(type(callback).__name__, given, known)


def check_known(kind: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raise if one of the names given to an object of that kind is none of those known.

    Raises:
        TypeError: It says which known one comes closest.
    """
    for name in given:
        if name not in known:
            closest = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)[0]
            raise TypeError(f"{kind} has no option {name!r}; the closest is {closest!r}.")
