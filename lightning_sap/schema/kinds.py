"""Which values are right: whole numbers, tables, the fields of a dataclass.

The ``check`` of a kind raises :class:`MismatchError` for a wrong value, and containers add where it is. A state of this
version must have every key and no other; what an older version did not store has its default.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from types import NoneType, UnionType
from typing import Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints

import torch

from lightning_sap.version import __version__

LARGEST = 2**53  # up to here counts are exact as float64 too


class MismatchError(Exception):
    """A value that is not as its kind says.

    Attributes:
        path: Where it is in the state, outermost first.
        text: What is wrong with it.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.path, self.text = "", text


class Kind(Protocol):
    """Which values are right; printed as what is expected."""

    def check(self, value: Any, *, strict: bool = True) -> None:
        """Raise :class:`MismatchError` for another value; ``strict``: every key must be there."""


def expect(fits: bool, value: Any, kind: object) -> None:
    """Raise :class:`MismatchError` unless a value fits a kind."""
    if not fits:
        raise MismatchError(f"must be {kind}, got {shown(value)}")


def shown(value: object) -> str:
    """A value as text that is never long."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a whole number of {value.bit_length()} bits"
    return reprlib.repr(value)


@dataclass(frozen=True)
class Whole:
    """A whole number within limits.

    Example:
        >>> Whole(1).check(-3)
        Traceback (most recent call last):
        lightning_sap.schema.kinds.MismatchError: must be a whole number of at least 1, got -3
    """

    least: int = 0
    most: int = LARGEST

    def check(self, value: Any, *, strict: bool = True) -> None:
        fits = isinstance(value, int) and not isinstance(value, bool) and self.least <= value <= self.most
        expect(fits, value, self)

    def __str__(self) -> str:
        return f"a whole number of at least {self.least}" + (f" and at most {self.most}" if self.most < LARGEST else "")


@dataclass(frozen=True)
class Number:
    """A finite number within limits; ``nan``: NaN too, and infinite ones where no limit is in the way.

    Example:
        >>> Number(0, 1, nan=True).check(float("nan"))
        >>> Number(0, 1).check(float("nan"))
        Traceback (most recent call last):
        lightning_sap.schema.kinds.MismatchError: must be a finite number of at least 0 and up to 1, got nan
    """

    least: float = -math.inf
    most: float = math.inf
    nan: bool = False

    def check(self, value: Any, *, strict: bool = True) -> None:
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
        expect(real and (self.least <= value <= self.most or value != value), value, self)
        expect(abs(value) <= LARGEST if isinstance(value, int) else self.nan or math.isfinite(value), value, self)

    def __str__(self) -> str:
        limits = {"of at least": self.least, "up to": self.most}
        told = [f"{word} {limit:g}" for word, limit in limits.items() if math.isfinite(limit)]
        return " ".join(["a number" if self.nan else "a finite number", " and ".join(told)]).strip()


@dataclass(frozen=True)
class Of:
    """A value of a type."""

    type: type[Any]
    words: str

    def check(self, value: Any, *, strict: bool = True) -> None:
        expect(isinstance(value, self.type), value, self)

    def __str__(self) -> str:
        return self.words


@dataclass(frozen=True)
class OneOf:
    """One of some values."""

    values: tuple[Any, ...]

    def check(self, value: Any, *, strict: bool = True) -> None:
        expect(any(type(value) is type(other) and value == other for other in self.values), value, self)

    def __str__(self) -> str:
        return f"one of {self.values}"


@dataclass(frozen=True)
class Maybe:
    """A value of a kind, or None."""

    kind: Kind

    def check(self, value: Any, *, strict: bool = True) -> None:
        if value is not None:
            self.kind.check(value, strict=strict)

    def __str__(self) -> str:
        return f"{self.kind} or None"


@dataclass(frozen=True)
class Series:
    """A list, or another series, of values of a kind; at most so many."""

    kind: Kind
    most: int = LARGEST

    def check(self, value: Any, *, strict: bool = True) -> None:
        expect(isinstance(value, (list, tuple)) and len(value) <= self.most, value, self)
        for i, entry in enumerate(value):
            inside(f"[{i}]", self.kind, entry, strict=strict)

    def __str__(self) -> str:
        return "a list" if self.most == LARGEST else f"a list of at most {self.most} entries"


@dataclass(frozen=True)
class Row:
    """A list of so many values, each of its own kind."""

    kinds: tuple[Kind, ...]

    def check(self, value: Any, *, strict: bool = True) -> None:
        expect(isinstance(value, (list, tuple)) and len(value) == len(self.kinds), value, self)
        for i, (kind, entry) in enumerate(zip(self.kinds, value, strict=True)):
            inside(f"[{i}]", kind, entry, strict=strict)

    def __str__(self) -> str:
        return f"a list of {len(self.kinds)} entries"


@dataclass(frozen=True)
class Table:
    """Values of a kind by any name."""

    kind: Kind

    def check(self, value: Any, *, strict: bool = True) -> None:
        expect(isinstance(value, Mapping), value, self)
        for name, entry in value.items():
            expect(isinstance(name, str), value, self)
            inside(f"[{shown(name)}]", self.kind, entry, strict=strict)

    def __str__(self) -> str:
        return "a dictionary with texts as keys"


@dataclass(frozen=True)
class Fields:
    """Values by the names of fields, each of its own kind.

    Attributes:
        kinds: By name the kind.
        needed: The names that must be there also in a state that an older version wrote.
        partial: Whether the others may always be left out.
    """

    kinds: Mapping[str, Kind]
    needed: frozenset[str] = frozenset()
    partial: bool = False

    @classmethod
    def needing(cls, **kinds: Kind) -> Fields:
        """Fields of which every one must be there, whoever wrote them."""
        return cls(kinds, frozenset(kinds))

    @classmethod
    def of(
        cls,
        declared: type[Any],
        refined: Mapping[str, Kind] | None = None,
        *,
        partial: bool = False,
        without: Sequence[str] = (),
    ) -> Fields:
        """The fields of a dataclass, of the kinds that their types say, but for those given."""
        refined = refined or {}
        hints, every = get_type_hints(declared), [f for f in fields(declared) if f.name not in without]
        kinds = {f.name: refined[f.name] if f.name in refined else kind_of(hints[f.name]) for f in every}
        must = {f.name for f in every if f.default is MISSING and f.default_factory is MISSING}
        return cls(kinds, frozenset() if partial else frozenset(must), partial)

    def check(self, value: Any, *, strict: bool = True) -> None:
        expect(isinstance(value, Mapping), value, self)
        for name in sorted((self.kinds.keys() if strict and not self.partial else self.needed) - value.keys()):
            inside(f".{name}", Missing(self.kinds[name]), None)
        for name, entry in value.items():
            inside(
                f".{name}" if isinstance(name, str) else f"[{shown(name)}]",
                self.kinds.get(name, UNKNOWN),
                entry,
                strict=strict,
            )

    def __str__(self) -> str:
        return f"a dictionary with the keys {sorted(self.kinds)}"


def must(fits: bool, path: str, value: Any, words: str) -> None:
    """Raise :class:`MismatchError` for the value at a path unless it fits."""
    if not fits:
        mismatch = MismatchError(f"must be {words}, got {shown(value)}")
        mismatch.path = path
        raise mismatch


@dataclass(frozen=True)
class Missing:
    """What a key that is not there should have been."""

    kind: Kind

    def check(self, value: Any, *, strict: bool = True) -> None:
        raise MismatchError(f"is missing; it must be {self.kind}")


class Unknown:
    """A key that this version does not know."""

    def check(self, value: Any, *, strict: bool = True) -> None:
        raise MismatchError(f"is a key that lightning-sap {__version__} does not know (its value is {shown(value)})")


@dataclass(frozen=True)
class Like:
    """What has the form of a live value: the same types, finite numbers, none below 0 where the live one is not."""

    live: Any

    def check(self, value: Any, *, strict: bool = True) -> None:
        live = self.live
        if isinstance(live, Mapping):
            expect(isinstance(value, Mapping), value, "a dictionary")
            for name in live.keys() & value.keys():
                inside(f"[{shown(name)}]", Like(live[name]), value[name])
        elif isinstance(live, (list, tuple)):
            expect(isinstance(value, (list, tuple)), value, "a list")
            for i, (entry, own) in enumerate(zip(value, live, strict=False)):
                inside(f"[{i}]", Like(own), entry)
        elif isinstance(live, (bool, str)):
            expect(isinstance(value, type(live)), value, f"like {shown(live)}")
        elif isinstance(live, (int, float)) and not (isinstance(value, torch.Tensor) and value.numel() == 1):
            Number(0 if live >= 0 else -math.inf, nan=not math.isfinite(live)).check(value)


TEXT, FLAG, TENSOR = Of(str, "a text"), Of(bool, "True or False"), Of(torch.Tensor, "a tensor")
ANYTHING, UNKNOWN = Of(object, "anything"), Unknown()
ANY_NUMBER, AMOUNT = Number(nan=True), Number(0, LARGEST)
SHARE = Number(0, 1)
INDEX = Number(0, 1, nan=True)  # of weights that are not finite it is not a number
PLAIN: Mapping[Any, Kind] = {int: Whole(), float: ANY_NUMBER, str: TEXT, bool: FLAG, torch.Tensor: TENSOR}


def inside(key: str, kind: Kind, value: Any, *, strict: bool = True) -> None:
    """Check what lies under a key."""
    try:
        kind.check(value, strict=strict)
    except MismatchError as mismatch:
        mismatch.path = key + mismatch.path
        raise


def kind_of(hint: Any) -> Kind:
    """The kind that a type says.

    Example:
        >>> str(kind_of(dict[str, int])), str(kind_of(float | None))
        ('a dictionary with texts as keys', 'a number or None')
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return OneOf(arguments)
    if origin in (Union, UnionType):
        (kind,) = (kind_of(argument) for argument in arguments if argument is not NoneType)
        return Maybe(kind)
    if origin is tuple:
        return Row(tuple(map(kind_of, arguments)))
    if origin in (list, set):
        return Series(kind_of(arguments[0]))
    return Table(kind_of(arguments[1])) if origin is dict else PLAIN[hint]
