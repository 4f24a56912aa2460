"""Killed and resumed, compared bit for bit with the run that never stopped."""

import functools
import math
import re
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from distributed.resumes import Case
from helpers import Crash, Net, Watch, crash, fit, half, is_masked, loader
from launch import run_ranks
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from resuming import (
    FILES,
    KINDS,
    STEPS_OF_A_PRUNING,
    Resumable,
    Saves,
    broken,
    differences,
    equal,
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
def test_resume_from_every_file_equals_unbroken_run(root, tmp_path, file, kind, rewind):
    alike = file.startswith("step")
    whole, folder = unbroken(root, kind, rewind, alike)
    resumed = run(tmp_path, kind, rewind, alike, ckpt_path=folder / f"{file}.ckpt")
    assert resumed["rates"].keys() != whole["rates"].keys(), "nothing was left out"
    assert differences(whole, resumed, without_validation(file)) == []


def test_resume_from_the_last_file_of_a_finished_run_trains_nothing(root, tmp_path):
    whole, folder = unbroken(root, "SGD-cosine", "init", alike=False)
    resumed = run(tmp_path, "SGD-cosine", "init", alike=False, ckpt_path=folder / "train-epoch-end" / "last.ckpt")
    assert resumed["rates"] == {}
    assert differences(whole, resumed, ("rounds", "monitor", "logged")) == []


@pytest.mark.parametrize("where", STEPS_OF_A_PRUNING)
@pytest.mark.parametrize("when", [2, 4])
def test_resume_after_a_crash_inside_a_pruning_equals_unbroken_run(root, tmp_path, where, when):
    whole, _ = unbroken(root, "SGD-cosine", "init", alike=False)
    last = broken(tmp_path / "first", where, when, "SGD-cosine", "init")
    resumed = run(tmp_path / "second", "SGD-cosine", "init", alike=False, ckpt_path=last)
    assert min(resumed["rates"]) == 3 * when
    assert differences(whole, resumed) == []


@pytest.mark.parametrize("epoch", [1, 3, 4])
def test_resume_after_a_crash_before_validation_equals_unbroken_run(root, tmp_path, epoch):
    whole, _ = unbroken(root, "AdamW-OneCycle", 1, alike=False)
    last = broken(tmp_path / "first", "validation", epoch, "AdamW-OneCycle", 1)
    resumed = run(tmp_path / "second", "AdamW-OneCycle", 1, alike=False, ckpt_path=last)
    assert min(resumed["rates"]) == 3 * epoch
    assert differences(whole, resumed) == []


DYING = 16  # a step of the last round, in mid-epoch: steps 15 to 17 are of epoch 5

SAVING_MODES = {  # of ModelCheckpoint: options, the file, the step that it holds
    "the best two": ({"monitor": "val_loss", "save_top_k": 2}, "best", None),
    "the best of a value that the pruner logs": ({"monitor": "sap/remaining", "save_top_k": 1}, "best", 15),
    "the latest": ({"monitor": None, "save_top_k": 1}, "best", 15),
    "save_last": ({"save_top_k": 1, "save_last": True, "every_n_epochs": 2}, "last", 12),
    "save_last, linked": ({"save_last": "link", "save_top_k": -1, "every_n_epochs": 3}, "last", 9),
    "every_n_epochs": ({"every_n_epochs": 2, "save_top_k": -1}, "best", 12),
    "every_n_train_steps": ({"every_n_train_steps": 7, "save_top_k": -1}, "best", 14),
    "train_time_interval": ({"train_time_interval": timedelta(0), "save_top_k": -1}, "best", 16),
    "at validation end": ({"save_on_train_epoch_end": False}, "best", 15),
    "at train epoch end": ({"save_on_train_epoch_end": True}, "best", 15),
}


@pytest.mark.parametrize("mode", SAVING_MODES)
def test_resume_with_every_mode_of_saving_equals_unbroken_run(root, tmp_path, mode):
    options, which, step = SAVING_MODES[mode]
    whole, _ = unbroken(root, "SGD-cosine", "init", alike=True)
    saver = Saves(tmp_path, **{"filename": "{step}", **options})
    die = Watch(on_train_batch_start=lambda t, _: crash() if t.global_step == DYING else None)
    with pytest.raises(Crash):
        run(tmp_path / "first", "SGD-cosine", "init", alike=True, extra=[saver, die])
    file = saver.best_model_path if which == "best" else saver.last_model_path
    held = torch.load(file, weights_only=True)["global_step"]
    assert held == step if step else held < DYING
    resumed = run(tmp_path / "second", "SGD-cosine", "init", alike=True, ckpt_path=file)
    assert min(resumed["rates"]) == held
    assert differences(whole, resumed) == []


# with OnExceptionCheckpoint Lightning looks for a file to resume from, unasked
@pytest.mark.filterwarnings("ignore:`?.fit.ckpt_path=")
@pytest.mark.parametrize(("hook", "step"), [("on_train_batch_start", 16), ("on_validation_start", 12)])
@pytest.mark.parametrize("on_exception", [True, False], ids=["save_on_exception", "OnExceptionCheckpoint"])
def test_resume_from_a_file_that_an_exception_wrote_equals_unbroken_run(root, tmp_path, on_exception, hook, step):
    whole, _ = unbroken(root, "SGD-cosine", "init", alike=True)
    saver = OnExceptionCheckpoint(tmp_path, "end")
    if on_exception:
        saver = Saves(tmp_path, "end", save_on_exception=True, every_n_epochs=100)
    die = Watch(**{hook: lambda t, _: crash() if t.global_step == step else None})
    with pytest.raises(Crash):
        run(tmp_path / "first", "SGD-cosine", "init", alike=True, extra=[saver, die])
    resumed = run(tmp_path / "second", "SGD-cosine", "init", alike=True, ckpt_path=tmp_path / "end.ckpt")
    assert min(resumed["rates"]) == step
    # Lightning numbers what is logged as after a file of a batch's end, and never runs a validation that was cut short
    left_out = ("logged",) if hook == "on_train_batch_start" else ("rounds", "monitor")
    assert differences(whole, resumed, left_out) == []
    assert [values for _, values in resumed["logged"]] == [
        values for _, values in whole["logged"][-len(resumed["logged"]) :]
    ]


def test_file_of_weights_only_stays_sparse_with_keep_zeros(tmp_path):
    saver = Saves(tmp_path, filename="weights", save_weights_only=True)
    whole = run(tmp_path / "first", "SGD-cosine", None, alike=False, extra=[saver])
    file = torch.load(tmp_path / "weights.ckpt", weights_only=True)
    assert "callbacks" not in file
    module, sap = Resumable("SGD-cosine"), SAPCallback(rounds=0, keep_zeros=True)
    module.load_state_dict(file["state_dict"])
    fit(module, sap, max_epochs=2)
    assert 0 < sap.remaining < 0.9
    assert equal(sap.masks, whole["masks"])
    assert is_masked(module.state_dict(), sap.masks)
    assert not equal(module.state_dict(), whole["weights"])


@pytest.mark.parametrize(("at", "when"), [("batch", 4), ("validation", 3)])
def test_resume_after_sigkill_equals_unbroken_run(root, tmp_path, at, when):
    kind, rewind = "AdamW-OneCycle", "init"
    whole, _ = unbroken(root, kind, rewind, alike=at == "batch")
    torch.save(Case("one process", kind, rewind, at, when, (0,), "SIGKILL"), tmp_path / "case.pt")
    with pytest.raises(AssertionError, match=re.escape("exit codes by rank, within 90 s: [-9]")):
        run_ranks("distributed.resumes:die", tmp_path, world=1)
    resumed = run(tmp_path / "b", kind, rewind, at == "batch", ckpt_path=last_file(tmp_path, at, when))
    assert differences(whole, resumed) == []


def test_checkpoint_of_sap_loads_with_weights_only(root):
    _, folder = unbroken(root, "SGD-cosine", "init", alike=False)
    checkpoint = torch.load(folder / "train-epoch-end" / "epoch=3.ckpt", weights_only=True)
    state = checkpoint["callbacks"]["lightning_sap/sap"]
    assert state["masks"]["net.0.weight"]["bits"].numel() == 48 // 8
    assert torch.equal(checkpoint["state_dict"]["net.0.weight"] != 0, unpacked(state)["net.0.weight"])


def unpacked(state):
    sap = SAPCallback()
    sap.load_state_dict(state)
    return sap.masks


def test_resume_from_a_checkpoint_without_pruning_state_starts_dense(tmp_path):
    fit(Resumable("SGD-cosine"), Saves(tmp_path, filename="plain"), max_epochs=2, enable_checkpointing=True)
    sap = SAPCallback(rounds=1)
    fit(Resumable("SGD-cosine"), sap, max_epochs=6, ckpt_path=tmp_path / "plain.ckpt")
    assert [(record.first_epoch, record.last_epoch) for record in sap.history] == [(2, 3), (4, 5)]
    assert 0 < sap.remaining < 1


@pytest.mark.parametrize(("schedule", "ends"), [("auto", 3), ("restart", 1), ("keep", None)])
def test_rounds_after_a_dense_checkpoint_replay_the_whole_schedule(tmp_path, schedule, ends):
    fit(Resumable("SGD-cosine"), Saves(tmp_path, filename="plain"), max_epochs=2, enable_checkpointing=True)
    sap, rates = SAPCallback(rounds=1, lr_schedule=schedule), []
    look = Watch(on_train_batch_start=lambda trainer, _: rates.append(trainer.optimizers[0].param_groups[0]["lr"]))
    fit(Resumable("SGD-cosine"), sap, look, max_epochs=6, ckpt_path=tmp_path / "plain.ckpt")
    # of the schedule's six epochs, at the start of each epoch; a squeezed one walks through them in six steps
    places = [2, 3, 4, 5] if ends is None else [0, ends, 0, ends]
    cosine = [0.05 * (1 + math.cos(math.pi * place / 6)) for place in places]
    assert rates[::3] == pytest.approx(cosine)
    if schedule == "auto":
        assert [rates[5], rates[11]] == pytest.approx([0.05 * (1 + math.cos(math.pi * 5 / 6))] * 2)


def test_a_second_fit_from_a_dense_checkpoint_replays_the_whole_schedule_too(tmp_path):
    fit(Resumable("SGD-cosine"), Saves(tmp_path, filename="plain"), max_epochs=2, enable_checkpointing=True)
    module, sap = Resumable("SGD-cosine"), SAPCallback(rounds=1)
    trainer = fit(module, sap, max_epochs=4)
    trainer.fit_loop.max_epochs = 6
    with pytest.warns(UserWarning, match="starting afresh"):
        trainer.fit(module, loader(), ckpt_path=tmp_path / "plain.ckpt")
    assert sap.state_dict()["plan"]["schedules_from"] == 0


def test_a_run_limited_by_steps_that_began_at_a_dense_checkpoint_ends_with_them_when_resumed(tmp_path):
    fit(Resumable("SGD-cosine"), Saves(tmp_path, filename="plain"), max_epochs=2, enable_checkpointing=True)
    steps, file = {"max_epochs": 100, "max_steps": 15}, tmp_path / "plain.ckpt"
    saver = Saves(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    fit(Resumable("SGD-cosine"), SAPCallback(rounds=2), saver, **steps, enable_checkpointing=True, ckpt_path=file)
    sap = SAPCallback(rounds=2)
    fit(Resumable("SGD-cosine"), sap, **steps, ckpt_path=tmp_path / "step=10.ckpt")
    assert sap.state_dict()["plan"]["end"] == 5  # of three steps each


def test_resume_with_another_max_epochs_keeps_the_rounds(root, tmp_path):
    _, folder = unbroken(root, "SGD-cosine", "init", alike=False)
    sap = SAPCallback(rewind_weights="init", scope="global", eta_r=0.1)
    file = folder / "train-epoch-end" / "epoch=2.ckpt"
    fit(Resumable("SGD-cosine"), sap, max_epochs=10, ckpt_path=file, val=loader(seed=3))
    assert [(record.first_epoch, record.last_epoch) for record in sap.history] == [(0, 1), (2, 3), (4, 9)]


@pytest.mark.parametrize(
    ("target", "end"),
    [(None, "planned"), (0.5, "planned, and misses target_remaining=0.5")],
    ids=["no target", "target"],
)
def test_resume_with_an_earlier_end_warns_of_lost_prunings(root, tmp_path, target, end):
    _, folder = unbroken(root, "SGD-cosine", "init", alike=False)
    file, network = folder / "train-epoch-end" / "epoch=2.ckpt", Resumable("SGD-cosine")
    sap = SAPCallback(rewind_weights="init", scope="global", eta_r=0.1, target_remaining=target)
    said = f"sap: training now ends before 1 of the 2 prunings {end}. For all of them it takes max_epochs=5"
    with pytest.warns(UserWarning, match=re.escape(said)):
        fit(network, sap, max_epochs=4, ckpt_path=file, val=loader(seed=3))
    assert [record.last_epoch for record in sap.history] == [1, 3]


@pytest.mark.filterwarnings("ignore:`?.fit.ckpt_path=")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"exclude": "net.0.*"}, ValueError, "surplus \\[.net.0.weight.\\]"),
        ({"lr_schedule": "keep"}, ValueError, "lr_schedule='keep' cannot take the place of 'squeeze'"),
        ({}, Crash, None),
    ],
    ids=["another selection", "another schedule", "a crash of another callback"],
)
def test_resume_that_fails_before_training_keeps_the_state_in_its_file(tmp_path, options, error, message):
    def begin(*callbacks, **options):
        saver, sap = OnExceptionCheckpoint(tmp_path, "end"), SAPCallback(scope="global", eta_r=0.1, **options)
        going_on = {"max_epochs": 6, "enable_checkpointing": True, "ckpt_path": file if file.exists() else None}
        fit(Resumable("SGD-cosine"), *callbacks, sap, saver, **going_on)

    def saved():
        return torch.load(file, weights_only=True)["callbacks"]["lightning_sap/sap"]

    file = tmp_path / "end.ckpt"
    with pytest.raises(Crash):
        begin(Watch(on_train_batch_end=lambda trainer, _: crash() if trainer.global_step == 10 else None))
    before, bits = saved(), saved()["masks"]["net.0.weight"]["bits"]
    assert before["round"] == 3
    forget = Watch(on_exception=lambda *_: file.unlink())  # what is there afterwards is new
    with pytest.raises(error, match=message):
        begin(forget, *([] if options else [Watch(on_train_start=lambda *_: crash())]), **options)
    after = saved()
    assert torch.equal(after["masks"]["net.0.weight"]["bits"], bits)
    assert [after[key] for key in ("round", "plan", "history", "metrics", "options")] == [
        before[key] for key in ("round", "plan", "history", "metrics", "options")
    ]
    assert after["schedules"][0]["mode"] == before["schedules"][0]["mode"]
    begin()


@pytest.mark.filterwarnings("ignore:`?.fit.ckpt_path=")
def test_fit_that_fails_before_training_begins_again_from_its_file(tmp_path):
    saver, sap = OnExceptionCheckpoint(tmp_path, "end"), SAPCallback(scope="global", eta_r=0.1)
    die = Watch(on_train_start=lambda *_: crash())
    with pytest.raises(Crash):
        fit(Resumable("SGD-cosine"), die, sap, saver, max_epochs=6, enable_checkpointing=True)
    sap = SAPCallback(scope="global", eta_r=0.1)
    fit(Resumable("SGD-cosine"), sap, max_epochs=6, ckpt_path=tmp_path / "end.ckpt")
    assert len(sap.history) == 5
    assert 0 < sap.remaining < 0.9


@pytest.mark.filterwarnings("ignore:`?.fit.ckpt_path=")
def test_second_fit_that_fails_before_training_keeps_the_masks(tmp_path):
    module, sap, file = Resumable("SGD-cosine"), SAPCallback(scope="global", eta_r=0.1), tmp_path / "end.ckpt"
    fit(module, sap, max_epochs=6)
    saver, die = OnExceptionCheckpoint(tmp_path, "end"), Watch(on_train_start=lambda *_: crash())
    with pytest.raises(Crash):
        fit(module, die, sap, saver, max_epochs=6, enable_checkpointing=True)
    again = SAPCallback(scope="global", eta_r=0.1)
    fit(Resumable("SGD-cosine"), again, max_epochs=6, ckpt_path=file)
    assert again.history[0].remaining == sap.remaining < 0.9


def test_resume_of_a_run_that_only_holds_masks_keeps_one_record(tmp_path):
    sap, file = SAPCallback(rounds=0, keep_zeros=True), tmp_path / "ended.ckpt"
    fit(Resumable("SGD-cosine"), sap, max_epochs=2).save_checkpoint(file)
    sap = SAPCallback(rounds=0, keep_zeros=True)
    fit(Resumable("SGD-cosine"), sap, max_epochs=4, ckpt_path=file)
    assert [(record.round, record.first_epoch, record.last_epoch) for record in sap.history] == [(0, 0, 3)]


def test_history_of_a_run_that_goes_on_behind_an_epochs_last_batch_has_every_epoch(tmp_path):
    """Lightning begins the next epoch without its hook then."""
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=6, filename="{step}")  # of two batches an epoch
    options = {"train": loader(16), "max_epochs": 4, "enable_checkpointing": True}
    first, again = half(rounds=2), half(rounds=2)
    fit(Net(), first, saver, **options)
    fit(Net(), again, ckpt_path=tmp_path / "step=6.ckpt", **options)
    for pruner in (first, again):
        assert [(record.first_epoch, record.last_epoch) for record in pruner.history] == [(0, 0), (1, 1), (2, 3)]
