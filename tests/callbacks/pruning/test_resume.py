"""Killed and resumed, compared bit for bit with the run that never stopped."""

import functools
import re
from pathlib import Path

import pytest
import torch
from distributed.resumes import Case
from helpers import fit, loader
from launch import run_ranks
from resuming import (
    FILES,
    KINDS,
    STEPS_OF_A_PRUNING,
    Saves,
    Scheduled,
    broken,
    differences,
    last_file,
    run,
    without_validation,
)

from lightning_sap import SAPCallback

pytestmark = pytest.mark.slow


@functools.cache
def unbroken(root, kind, rewind, alike):
    """The run that never stops, and the folder with all its files."""
    folder = Path(root) / f"{kind}-{rewind}-{alike}"
    return run(folder, kind, rewind, alike), folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    yield str(tmp_path_factory.mktemp("unbroken"))
    unbroken.cache_clear()


def pairwise(matrix, every):
    """Mark all but one in `every` for the full run, so that still each value meets each other."""
    for i, point in enumerate(matrix):
        for j, (kind, rewind) in enumerate(KINDS):
            marks = [] if (i + j) % every == 0 else [pytest.mark.full]
            yield pytest.param(point, kind, rewind, marks=marks)


@pytest.mark.parametrize(("file", "kind", "rewind"), list(pairwise(FILES, 3)))
def test_resume(root, tmp_path, file, kind, rewind):
    alike = file.startswith("step")
    whole, folder = unbroken(root, kind, rewind, alike)
    resumed = run(tmp_path, kind, rewind, alike, ckpt_path=folder / f"{file}.ckpt")
    assert resumed["rates"].keys() != whole["rates"].keys(), "nothing was left out"
    assert differences(whole, resumed, without_validation(file)) == []


def test_resume_from_the_last_of_a_run_that_is_over(root, tmp_path):
    whole, folder = unbroken(root, "SGD-cosine", "init", alike=False)
    resumed = run(tmp_path, "SGD-cosine", "init", alike=False, ckpt_path=folder / "train-epoch-end" / "last.ckpt")
    assert resumed["rates"] == {}
    assert differences(whole, resumed, ("rounds", "monitor", "logged")) == []


@pytest.mark.parametrize("where", STEPS_OF_A_PRUNING)
@pytest.mark.parametrize("when", [2, 4])
def test_a_crash_inside_a_pruning(root, tmp_path, where, when):
    whole, _ = unbroken(root, "SGD-cosine", "init", alike=False)
    last = broken(tmp_path / "first", where, when, "SGD-cosine", "init")
    resumed = run(tmp_path / "second", "SGD-cosine", "init", alike=False, ckpt_path=last)
    assert min(resumed["rates"]) == 3 * when
    assert differences(whole, resumed) == []


@pytest.mark.parametrize("epoch", [1, 3, 4])
def test_a_crash_between_training_and_validation(root, tmp_path, epoch):
    whole, _ = unbroken(root, "AdamW-OneCycle", 1, alike=False)
    last = broken(tmp_path / "first", "validation", epoch, "AdamW-OneCycle", 1)
    resumed = run(tmp_path / "second", "AdamW-OneCycle", 1, alike=False, ckpt_path=last)
    assert min(resumed["rates"]) == 3 * epoch
    assert differences(whole, resumed) == []


@pytest.mark.parametrize(("at", "when"), [("batch", 4), ("validation", 3)])
def test_a_process_that_is_killed(root, tmp_path, at, when):
    kind, rewind = "AdamW-OneCycle", "init"
    whole, _ = unbroken(root, kind, rewind, alike=at == "batch")
    torch.save(Case("one process", kind, rewind, at, when, (0,), "SIGKILL"), tmp_path / "case.pt")
    with pytest.raises(AssertionError, match=re.escape("exit codes by rank, within 90 s: [-9]")):
        run_ranks("distributed.resumes:die", tmp_path, world=1)
    resumed = run(tmp_path / "b", kind, rewind, at == "batch", ckpt_path=last_file(tmp_path, at, when))
    assert differences(whole, resumed) == []


def test_files_load_with_weights_only(root):
    _, folder = unbroken(root, "SGD-cosine", "init", alike=False)
    checkpoint = torch.load(folder / "train-epoch-end" / "epoch=3.ckpt", weights_only=True)
    state = checkpoint["callbacks"]["lightning_sap/sap"]
    assert state["masks"]["net.0.weight"]["bits"].numel() == 48 // 8
    assert torch.equal(checkpoint["state_dict"]["net.0.weight"] != 0, unpacked(state)["net.0.weight"])


def unpacked(state):
    sap = SAPCallback()
    sap.load_state_dict(state)
    return sap.masks


def test_a_checkpoint_without_pruning_state_starts_dense(tmp_path):
    fit(Scheduled("SGD-cosine"), Saves(tmp_path, filename="plain"), max_epochs=2, enable_checkpointing=True)
    sap = SAPCallback(rounds=1)
    fit(Scheduled("SGD-cosine"), sap, max_epochs=6, ckpt_path=tmp_path / "plain.ckpt")
    assert [(record.first_epoch, record.last_epoch) for record in sap.history] == [(2, 3), (4, 5)]
    assert 0 < sap.remaining < 1


def test_another_max_epochs_does_not_move_the_rounds(root, tmp_path):
    _, folder = unbroken(root, "SGD-cosine", "init", alike=False)
    sap = SAPCallback(rewind_weights="init", scope="global", eta_r=0.1)
    file = folder / "train-epoch-end" / "epoch=2.ckpt"
    fit(Scheduled("SGD-cosine"), sap, max_epochs=10, ckpt_path=file, val=loader(seed=3))
    assert [(record.first_epoch, record.last_epoch) for record in sap.history] == [(0, 1), (2, 3), (4, 9)]
