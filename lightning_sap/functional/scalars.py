"""NUMBERS that a user gives: NumPy's are as good as Python's own, and a bool is none."""

from __future__ import annotations

from dataclasses import fields
from numbers import Real
from typing import Any

import numpy as np


def is_real(value: Any) -> bool:
    """Whether it is a real number.

    Example:
        >>> is_real(0.5), is_real(3), is_real(True), is_real("0.5")
        (True, True, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: Any, least: int) -> bool:
    """Whether it is an integer, and not below the least one allowed.

    Example:
        >>> is_whole(3, 1), is_whole(0, 1), is_whole(3.0, 1), is_whole(True, 1)
        (True, False, False, False)
    """
    return isinstance(value, int) and is_real(value) and value >= least


def as_plain(value: Any) -> Any:
    """A NumPy number as Python's own, which prints and compares as plain text; anything else as it is.

    Example:
        >>> import numpy as np
        >>> as_plain(np.int64(3)), as_plain("init")
        (3, 'init')
    """
    return value.item() if isinstance(value, np.generic) else value


def make_plain_(settings: Any) -> None:
    """Turn the NumPy numbers among the fields of a dataclass, a frozen one too, into Python's own."""
    for field in fields(settings):
        if hasattr(settings, field.name):
            object.__setattr__(settings, field.name, as_plain(getattr(settings, field.name)))
