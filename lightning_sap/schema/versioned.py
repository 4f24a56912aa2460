"""A state as a whole: its version, its keys, and how they go together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_sap.schema.kinds import TEXT, Fields, Kind, Like, MismatchError, Missing, Whole, expect, inside, must
from lightning_sap.version import __version__

CURE = "Go on from another checkpoint."
STAMP: dict[str, Kind] = {"writer": TEXT, "version": Whole(1)}


@dataclass(frozen=True)
class Schema:
    """What a state holds, under a version that rises whenever that changes.

    Attributes:
        what: Whose state it is, for messages.
        version: Its version; states without one are older.
        fields: Its keys.
        rules: What its values must be to one another.
    """

    what: str
    version: int
    fields: Fields
    rules: Callable[[Mapping[str, Any]], None] = field(default=lambda _: None, repr=False)

    @property
    def stamp(self) -> dict[str, Any]:
        """What a state that is written says of itself."""
        return {"version": self.version, "writer": __version__}

    def read(self, state: Any) -> dict[str, Any]:
        """The state without its stamp, once all of it is found to be right.

        Raises:
            ValueError: If it is not, or a newer version wrote it; it names the key, the value and what was expected.
        """
        try:
            expect(isinstance(state, Mapping), state, self.fields)
            held = {key: value for key, value in state.items() if key not in self.stamp}
            if strict := self._is_stamped(state):
                self.fields.check(held)
            else:
                held = {key: value for key, value in held.items() if key in self.fields.kinds}
                self.fields.check(held, strict=strict)
            self.rules(held)
        except MismatchError as mismatch:
            raise ValueError(self._refusal(mismatch)) from None
        return held

    def must(self, fits: bool, path: str, value: Any, words: str) -> None:
        """Raise for the value at a path unless it fits what is live.

        Raises:
            ValueError: It names the key, the value and what was expected.
        """
        try:
            must(fits, path, value, words)
        except MismatchError as mismatch:
            raise ValueError(self._refusal(mismatch)) from None

    def like(self, path: str, value: Any, live: Any) -> None:
        """Raise for the value at a path unless it has the form of a live one.

        Raises:
            ValueError: It names the key, the value and what was expected.
        """
        try:
            inside(path, Like(live), value)
        except MismatchError as mismatch:
            raise ValueError(self._refusal(mismatch)) from None

    def _refusal(self, mismatch: MismatchError) -> str:
        return f"{self.what} cannot be read: {mismatch.path.removeprefix('.') or 'it'} {mismatch.text}. {CURE}"

    def _is_stamped(self, state: Mapping[str, Any]) -> bool:
        """Whether it is a state of this version; one of an older version is not."""
        if state.keys().isdisjoint(self.stamp):
            return False
        for key, kind in STAMP.items():
            inside(f".{key}", kind if key in state else Missing(kind), state.get(key))
        if state["version"] > self.version:
            raise ValueError(
                f"{self.what} was written by lightning-sap {state['writer']} (its version is {state['version']}), and "
                f"this is lightning-sap {__version__}, which reads versions up to {self.version}. Install the "
                "newer lightning-sap from where you have this one."
            )
        return bool(state["version"] == self.version)
