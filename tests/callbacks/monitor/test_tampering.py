"""A changed state of a monitor is an error that names the key, and the monitor stays as it is."""

import re
from fnmatch import fnmatch

import pytest
from helpers import half
from searching import search
from tampering import ANY_NUMBER, MISSING, taken

from lightning_sap import PQIMonitor

# What is right all the same, by place.
RIGHT = {
    "writer": {"text"},
    "rows.0.round": {"None"},
    "rows.0.pqi": {"fraction", "NaN"},
    "rows.0.layer_mean": {"fraction", "NaN"},
    "rows.0.remaining": {"fraction"},
    "rows.0.metric": ANY_NUMBER | {"None"},
    "rows.0.phase": {"None"},
    "rows.0.layers.*": {"fraction", "NaN", MISSING},
    "rows.0.layers_remaining.*": {"fraction", MISSING},
    "metrics.*": ANY_NUMBER | {MISSING},
    "validated": {"None"},
    "validation_keys.0": {"text"},
    "logged.0": {"text"},
    "rule.detector.reason": {"text"},
    "rule.detector._curve.0": {"fraction", "NaN", "infinite"},  # after a collapse, such as this
    "rule.detector._series.*": {MISSING},
    "rule.detector._names.0": {"text"},
    "rule.detector._spared.*": {"fraction", MISSING},
    "rule.detector._best": {"negative", "fraction", "None"},
    "rule.verdict": {"None"},
    "rule.verdict.reason": {"text"},
    "rule.verdict.restore": {"None"},
    "dense": {"None"},
    "dense.0.1": ANY_NUMBER,
}


def monitor_and_state():
    """Beside a pruner, after the run of a network that collapses."""
    monitor = PQIMonitor(monitor="val_acc", restore=False, verbose=False, patience=1)
    search(monitor, scores=[0.9, 0.9, 0.5, 0.1, 0.1], pruner=half(rounds=4))
    return monitor, monitor.state_dict()


@pytest.mark.filterwarnings("ignore:sap")
def test_every_fault_is_a_clear_error_at_once_and_touches_nothing():
    monitor, state = monitor_and_state()
    assert state["rule"]["verdict"]["phase"] == "collapse"

    def load(twin):
        try:
            monitor.load_state_dict(twin)
        except ValueError:
            assert str(monitor.state_dict()) == str(state)
            raise
        monitor.load_state_dict(state)

    found = taken(load, state)
    right = {path: next((faults for place, faults in RIGHT.items() if fnmatch(path, place)), set()) for path in found}
    assert {path: faults for path, faults in found.items() if not faults <= right[path]} == {}


@pytest.mark.filterwarnings("ignore:sap")
def test_rounds_and_indices_of_the_detector_must_go_together():
    monitor, state = monitor_and_state()
    for key, value, text in (
        ("_rounds", [0], "rule.detector._rounds must be a list of"),
        ("since", 99, "rule.detector._rounds must be of at most"),
    ):
        detector = {**state["rule"]["detector"], key: value}
        with pytest.raises(ValueError, match=re.escape(text)):
            monitor.load_state_dict({**state, "rule": {**state["rule"], "detector": detector}})


@pytest.mark.filterwarnings("ignore:sap")
def test_state_of_a_newer_version_says_who_wrote_it_and_an_older_one_reads_on():
    monitor, state = monitor_and_state()
    with pytest.raises(ValueError, match=re.escape("was written by lightning-sap 9.8.7 (its version is 2)")):
        monitor.load_state_dict({**state, "version": 2, "writer": "9.8.7"})
    older = {key: value for key, value in state.items() if key not in ("version", "writer", "dense", "validated")}
    fresh = PQIMonitor(monitor="val_acc")
    fresh.load_state_dict({**older, "gone_since": 1})
    assert fresh.rows() == monitor.rows()
    assert fresh.verdict == monitor.verdict
