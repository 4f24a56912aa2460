"""What the state of a monitor holds: every key, and which values are right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_sap.callbacks.monitor.stopping import Verdict
from lightning_sap.callbacks.round_metrics import METRICS
from lightning_sap.rounds.phases import DETECTOR, Phase, check_detector
from lightning_sap.schema import (
    ANY_NUMBER,
    INDEX,
    SHARE,
    Fields,
    Maybe,
    MismatchError,
    OneOf,
    Row,
    Schema,
    Series,
    Table,
    Whole,
    must,
)

VERSION = 1  # to be raised whenever a key comes, goes or changes its meaning

PHASE = OneOf(tuple(phase.value for phase in Phase))
ROW = Fields.needing(
    epoch=Whole(),
    round=Maybe(Whole()),
    pqi=INDEX,
    layer_mean=INDEX,
    remaining=SHARE,
    metric=Maybe(ANY_NUMBER),
    phase=Maybe(PHASE),
    layers=Table(INDEX),
    layers_remaining=Table(SHARE),
)
VERDICT = Fields.of(Verdict, {"phase": PHASE})
SEEN = Series(Row((Whole(), ANY_NUMBER)))  # an epoch, and the metric in it


def _rules(state: Mapping[str, Any]) -> None:
    """What its values must be to one another."""
    detector = state["rule"]["detector"]
    try:
        check_detector(detector)
    except MismatchError as mismatch:
        mismatch.path = f".rule.detector{mismatch.path}"
        raise
    verdict, last = state["rule"]["verdict"], detector.get("round", -1)
    if verdict is not None:
        must(verdict["round"] <= last, ".rule.verdict.round", verdict["round"], f"at most {last}, the latest round")
        restore = verdict["restore"]
        must(restore is None or restore <= last, ".rule.verdict.restore", restore, f"at most {last}, the latest round")


SCHEMA = Schema(
    "The monitor's state of the checkpoint",
    VERSION,
    Fields(
        {
            "rows": Series(ROW),
            **METRICS.kinds,
            "rule": Fields.needing(detector=DETECTOR, verdict=Maybe(VERDICT)),
            "dense": Maybe(SEEN),
        },
        frozenset({"rows", "rule"}),
    ),
    _rules,
)
