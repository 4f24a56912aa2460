"""What the state of a pruning callback holds: every key, which values are right, and how they go together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_sap.callbacks.pruning.lengths import EpochLengths
from lightning_sap.callbacks.round_metrics import METRICS
from lightning_sap.engine.masks import PACKED
from lightning_sap.rounds.history import RoundRecord
from lightning_sap.rounds.plan import RoundPlan
from lightning_sap.rounds.protocol import GoOn, Stop, TakeBack
from lightning_sap.rounds.search import LARGEST_SCALE, Search
from lightning_sap.schema import (
    AMOUNT,
    ANY_NUMBER,
    ANYTHING,
    FLAG,
    INDEX,
    SHARE,
    TENSOR,
    TEXT,
    Fields,
    Kind,
    Maybe,
    Number,
    OneOf,
    Row,
    Schema,
    Series,
    Table,
    Whole,
    inside,
    must,
)

VERSION = 1  # to be raised whenever a key comes, goes or changes its meaning
ANSWERS = {kind.__name__: kind for kind in (GoOn, Stop, TakeBack)}

TENSORS = Table(TENSOR)
SUMS = Table(TENSORS)
SIZE = Whole(1)  # of what cannot be nothing
OF_RECORDS: dict[str, Kind] = {
    "remaining": SHARE,
    "layers_remaining": Table(SHARE),
    "pqi": INDEX,
    "layers_pqi": Table(INDEX),
    "pqi_pruned": Maybe(INDEX),
    "layers_pqi_pruned": Table(INDEX),
    "seconds": Maybe(AMOUNT),
}
OF_LENGTHS: dict[str, Kind] = {
    "planned": Maybe(SIZE),
    "mean": Maybe(AMOUNT),
    "epoch": Whole(-1),
    "wrong": Maybe(Row((SIZE, SIZE))),
}
OF_SEARCH: dict[str, Kind] = {
    "scale": Number(0, LARGEST_SCALE),
    "failed": Maybe(SIZE),
    "yardstick": Maybe(Number()),
    "metric": Maybe(Number()),
}
SCHEDULE = Fields.needing(
    first=Table(ANYTHING),
    groups=Series(Table(ANYTHING)),
    calls=Whole(),
    mode=OneOf(("restart", "squeeze", "keep")),
    lengths=Fields.of(EpochLengths, OF_LENGTHS),
)
NUMBERS = ("round", "first_epoch", "first_step", "steps", "epoch", "epoch_steps", "count", "finest", "others")
RECORD = Fields.of(RoundRecord, OF_RECORDS)
PRUNING = Fields.needing(
    masks=PACKED, companions=PACKED, count=Whole(), finest=Whole(), pqi=INDEX, record=RECORD, rewinds=FLAG, last=FLAG
)
KEPT: dict[str, Kind] = {"round": Whole(), "weights": TENSORS, "masks": PACKED, "averages": Series(TENSORS)}
NOTE = Fields.of(RoundRecord, OF_RECORDS, partial=True)


@dataclass(frozen=True)
class _Answer:
    """An answer as :meth:`PruningState.pack` writes it: its fields, and its kind by name."""

    def check(self, value: Any, *, strict: bool = True) -> None:
        """Raise for another value."""
        name = value.get("kind") if isinstance(value, Mapping) else None
        known = isinstance(name, str) and name in ANSWERS
        must(known, ".kind", name, f"one of {sorted(ANSWERS)}")
        declared = Fields.of(ANSWERS[str(name)], {"scale": AMOUNT, "notes": Fields({})})
        Fields({**declared.kinds, "kind": TEXT}).check(value, strict=strict)


def check_answer(answer: GoOn | Stop | TakeBack) -> None:
    """Raise for an answer, or for what it notes of rounds, that no state could hold."""
    _Answer().check({**vars(answer), "kind": type(answer).__name__, "notes": {}})
    for round, note in answer.notes.items():
        inside(f".notes[{round!r}]", NOTE, note)


def _rules(state: Mapping[str, Any]) -> None:
    """What its values must be to one another."""
    records, round = state["history"], state["round"]
    for i, record in enumerate(records):
        must(record["round"] == i, f".history[{i}].round", record["round"], f"{i}, its place in the history")
    must(round <= len(records), ".round", round, f"at most {len(records)}, the number of rounds in the history")
    if state["plan"]["rounds"] != 0:  # else it may hold an earlier round
        least = len(records) - 1
        must(round >= least, ".round", round, f"at least {least}, by the number of rounds in the history")
    total = sum(math.prod(entry["shape"]) for entry in state["masks"].values())
    must(state.get("count", 0) <= total, ".count", state.get("count"), f"at most {total}, the number of weights")
    for key, field in {"kept": "round", "search": "best", "stop": "restore"}.items():
        number = (state.get(key) or {}).get(field)
        latest = len(records) if key == "search" else max(round, len(records) - 1)
        must(number is None or number <= latest, f".{key}.{field}", number, f"at most {latest}")


SCHEMA = Schema(
    "The pruning state of the checkpoint",
    VERSION,
    Fields(
        {
            "masks": PACKED,
            "companions": PACKED,
            "plan": Fields.of(RoundPlan, {"length": SIZE, "dense": Maybe(SIZE)}),
            **dict.fromkeys(
                ("round", "first_epoch", "first_step", "steps", "epoch", "epoch_steps", "count", "finest", "others"),
                Whole(),
            ),
            "trained": Series(TEXT),
            "replaced": Series(TEXT),
            "first_bits": Table(Whole(-(2**63), 2**63 - 1)),
            "copies": Table(TEXT),
            "pqi_after_pruning": Maybe(INDEX),
            "gathered": SUMS,
            "first_weights": Maybe(TENSORS),
            "kept": Maybe(Fields({**KEPT, "companions": PACKED, "gathered": SUMS}, frozenset(KEPT))),
            "search": Maybe(Fields.of(Search, OF_SEARCH)),
            "answer": Maybe(_Answer()),
            "undone": Maybe(RECORD),
            "pruning": Maybe(PRUNING),
            "stop": Maybe(_Answer()),
            "history": Series(RECORD),
            "lr": Maybe(ANY_NUMBER),
            "metrics": METRICS,
            "run": TEXT,
            "parent": Maybe(TEXT),
            "folder": Maybe(TEXT),
            "note": NOTE,
            "schedules": Series(SCHEDULE),
            "options": Table(TEXT),
            "waiting": FLAG,
        },
        frozenset({"masks", "plan", "round", "history"}),
    ),
    _rules,
)


def check_tensors(key: str, tensors: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> None:
    """Raise if tensors of a state are not of the shapes, or of the kinds of numbers, of the live ones of their names.

    Raises:
        ValueError: It names the tensor.
    """
    for name, tensor in tensors.items():
        if name in live:
            own = live[name]
            # a buffer of an observer has nothing, or one number, until its first batch
            grows = tensor.numel() <= 1 and not isinstance(own, nn.Parameter)
            fits = (grows or tensor.shape == own.shape) and tensor.is_floating_point() == own.is_floating_point()
            words = f"a tensor like that of the module, of {own.dtype} and shape {tuple(own.shape)}"
            SCHEMA.must(fits, f"{key}[{name!r}]", tensor, words)
