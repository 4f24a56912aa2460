"""States of a checkpoint that someone, or something, changed: each key left out or added, each value replaced."""

import copy
import math
import time

import torch

FAULTS = {
    "text": "text",
    "list": ["text", {}],
    "object": {"surplus": object},
    "negative": -(10**9),
    "huge": 10**30,
    "NaN": math.nan,
    "infinite": math.inf,
    "fraction": 0.5,
    "None": None,
    "tensor": torch.zeros(3, 5, 7),
}
MISSING, SURPLUS = "missing", "surplus"
ANY_NUMBER = {"negative", "NaN", "infinite", "fraction"}


def paths(value, path=()):
    """Every place in dictionaries and lists; of a list its first entry stands for all."""
    if path:
        yield path
    if isinstance(value, dict):
        entries = value.items()
    else:
        entries = list(enumerate(value))[:1] if isinstance(value, list | tuple) else ()
    for key, entry in entries:
        yield from paths(entry, (*path, key))


def at(state, path):
    for key in path:
        state = state[key]
    return state


def _lists(value):
    """A copy without tuples, which could not be changed."""
    if isinstance(value, dict):
        return {key: _lists(entry) for key, entry in value.items()}
    return [_lists(entry) for entry in value] if isinstance(value, list | tuple) else copy.deepcopy(value)


def faulty(state):
    """Path, name of the fault, and the state with it."""
    for path in paths(state):
        *above, key = path
        for fault, value in FAULTS.items():
            twin = _lists(state)
            at(twin, above)[key] = value
            yield path, fault, twin
        if isinstance(at(state, above), dict):
            twin = _lists(state)
            del at(twin, above)[key]
            yield path, MISSING, twin
        if isinstance(at(state, path), dict):
            twin = _lists(state)
            at(twin, path)["surplus key"] = object()
            yield path, SURPLUS, twin


def taken(load, state):
    """By path (names of layers and metrics as ``*``) the faults that a load takes; every other is a clear ValueError.

    Clear is what names the key, and, of a value, what it must be; each comes within a second.
    """
    found = {}
    for path, fault, twin in faulty(state):
        start = time.perf_counter()
        try:
            load(twin)
        except ValueError as error:
            key = next(key for key in reversed(path) if isinstance(key, str))
            text = str(error)
            assert key in text or "surplus key" in text, (path, fault, text)
            assert "must be" in text or "does not know" in text or "do not belong" in text, (path, fault, text)
            assert len(text) < 1000, (path, fault, text)
        else:
            found.setdefault(".".join(map(str, path)), set()).add(fault)
        assert time.perf_counter() - start < 1, (path, fault)
    return found
