"""A run in which parts are opened and closed, resumed from every file that it can be resumed from."""

import functools
from pathlib import Path

import pytest
from resuming import FILES, GROWS, differences, run, without_validation

pytestmark = pytest.mark.slow

KIND = GROWS + "SGD-cosine"


@functools.cache
def unbroken(root, alike):
    """The run that never stops, and the folder of its files."""
    folder = Path(root) / f"alike-{alike}"
    return run(folder, KIND, None, alike), folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    yield str(tmp_path_factory.mktemp("unbroken"))
    unbroken.cache_clear()


def test_two_parts_are_opened_and_closed(root):
    whole, _ = unbroken(root, False)
    assert [(row["weights"], row["regrown"], row["opened"]) for row in whole["rounds"]] == [
        (54, 18, "net.0.weight"),
        (36, 0, "net.3.weight"),
        (18, None, ""),
    ]


@pytest.mark.parametrize("file", [pytest.param(f, marks=[pytest.mark.full] * bool(i % 4)) for i, f in enumerate(FILES)])
def test_resume_in_a_cycle_equals_unbroken_run(root, tmp_path, file):
    whole, folder = unbroken(root, file.startswith("step/"))
    resumed = run(tmp_path, KIND, None, file.startswith("step/"), folder / f"{file}.ckpt")
    assert resumed["rates"].keys() != whole["rates"].keys(), "nothing was left out"
    assert differences(whole, resumed, without_validation(file)) == []
