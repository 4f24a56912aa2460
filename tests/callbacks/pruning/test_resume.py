"""Killed and resumed, compared bit for bit with the run that never stopped."""

import functools
import signal
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import torch
from helpers import Net, Watch, fit, loader
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR
from torch.utils.data import DataLoader, Dataset

from lightning_sap import PQIMonitor, SAPCallback

pytestmark = pytest.mark.slow

EPOCHS, STEPS = 6, 18  # two prunings in three rounds of two epochs, three batches each


class Alike(Dataset):
    """Batches that are all alike: Lightning restarts a plain DataLoader when it resumes in mid-epoch."""

    def __init__(self):
        self.data = helpers.data(8)

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return self.data[index % 8]


class Scheduled(Net):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def configure_optimizers(self):
        if self.kind == "SGD-cosine":
            optimizer = SGD(self.parameters(), lr=0.1, momentum=0.9)
            return {"optimizer": optimizer, "lr_scheduler": CosineAnnealingLR(optimizer, EPOCHS)}
        optimizer = AdamW(self.parameters(), lr=0.01)
        schedule = OneCycleLR(optimizer, 0.05, total_steps=STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Saves(ModelCheckpoint):
    """Several of them in one Trainer."""

    @property
    def state_key(self):
        return f"{type(self).__name__}/{self.dirpath}"


class Remembers(DummyLogger):
    """Keeps what is logged, by step."""

    def __init__(self):
        super().__init__()
        self.logged = []

    def log_metrics(self, metrics, step=None):
        self.logged.append((step, dict(metrics)))


def savers(folder):
    every = {"save_top_k": -1, "every_n_epochs": 1, "filename": "{epoch}"}
    return [
        Saves(folder / "validation-end", **every, save_on_train_epoch_end=False),
        Saves(folder / "train-epoch-end", **every, save_on_train_epoch_end=True, save_last=True),
        Saves(folder / "step", save_top_k=-1, every_n_train_steps=1, filename="{step}"),
    ]


def run(folder, kind, rewind, alike, ckpt_path=None, extra=()):
    """Train from a seed (a wrong one when resuming), and say everything that came of it."""
    seed_everything(1 if ckpt_path is None else 99)
    sap = SAPCallback(rounds=2, every_n_epochs=2, rewind_weights=rewind, scope="global", eta_r=0.1)
    monitor, logger, rates = PQIMonitor(stop_on=None, monitor="val_loss", mode="min"), Remembers(), {}
    watch = Watch(
        on_before_optimizer_step=lambda t, _: rates.update({t.global_step: t.optimizers[0].param_groups[0]["lr"]})
    )
    module = Scheduled(kind)
    trainer = fit(
        module,
        *(sap, monitor, watch, *savers(folder), *extra),
        max_epochs=EPOCHS,
        train=DataLoader(Alike(), 8) if alike else loader(),
        val=loader(seed=3),
        ckpt_path=ckpt_path,
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=True,
        num_sanity_val_steps=0,
    )
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in sap.history.rows()]
    return {
        "weights": helpers.copied(module.state_dict()),
        "masks": sap.masks,
        "optimizer": trainer.optimizers[0].state_dict(),
        "rates": rates,
        "rounds": rows,
        "monitor": monitor.rows(),
        "logged": logger.logged,
    }


@functools.cache
def unbroken(root, kind, rewind, alike):
    """The run that never stops, and the folder with all its files."""
    folder = Path(root) / f"{kind}-{rewind}-{alike}"
    return run(folder, kind, rewind, alike), folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    yield str(tmp_path_factory.mktemp("unbroken"))
    unbroken.cache_clear()


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def differences(whole, resumed, leave_out=()):
    """What of a resumed run is not as in the run that never stopped."""
    after = len(resumed["logged"])
    expected = {
        **whole,
        "rates": {step: whole["rates"][step] for step in resumed["rates"]},
        "logged": whole["logged"][-after:] if after else [],
    }
    return [key for key in whole if key not in leave_out and not equal(expected[key], resumed[key])]


KINDS = [(kind, rewind) for kind in ("SGD-cosine", "AdamW-OneCycle") for rewind in (None, "init", 1)]
FILES = [f"{hook}/epoch={epoch}" for hook in ("validation-end", "train-epoch-end") for epoch in range(EPOCHS - 1)]
FILES += [f"step/step={step}" for step in range(1, STEPS)]


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
    # from a file of an epoch's last batch Lightning goes on with the next epoch: its validation is never run
    skipped = alike and int(file.split("=")[1]) % 3 == 0
    assert differences(whole, resumed, ("rounds", "monitor") if skipped else ()) == []


def test_resume_from_the_last_of_a_run_that_is_over(root, tmp_path):
    whole, folder = unbroken(root, "SGD-cosine", "init", alike=False)
    resumed = run(tmp_path, "SGD-cosine", "init", alike=False, ckpt_path=folder / "train-epoch-end" / "last.ckpt")
    assert resumed["rates"] == {}
    assert differences(whole, resumed, ("rounds", "monitor", "logged")) == []


STEPS_OF_A_PRUNING = [
    "lightning_sap.callbacks.pruning.callback.prune_step",
    "lightning_sap.callbacks.pruning.callback.summary",
    "lightning_sap.callbacks.pruning.callback.restore_weights_",
    "lightning_sap.masks.MaskSet.apply_",
    "lightning_sap.rewind.schedules.Replay.rewind_",
    "lightning_sap.callbacks.pruning.messages.warn_of_dead",
]


class Crash(Exception):
    pass


@pytest.mark.parametrize("where", STEPS_OF_A_PRUNING)
@pytest.mark.parametrize("when", [2, 4])
def test_a_crash_inside_a_pruning(root, tmp_path, monkeypatch, where, when):
    whole, _ = unbroken(root, "SGD-cosine", "init", alike=False)

    def arm(trainer, module):
        if trainer.current_epoch == when - 1:
            monkeypatch.setattr(where, crash)

    def crash(*args, **kwargs):
        raise Crash

    late = Watch(on_train_epoch_end=arm)  # the savers write their file in the same hook, after it
    with pytest.raises(Crash):
        run(tmp_path / "first", "SGD-cosine", "init", alike=False, extra=[late])
    monkeypatch.undo()
    last = tmp_path / "first" / "train-epoch-end" / "last.ckpt"
    resumed = run(tmp_path / "second", "SGD-cosine", "init", alike=False, ckpt_path=last)
    assert min(resumed["rates"]) == 3 * when
    assert differences(whole, resumed) == []


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 10])
def test_a_process_that_is_killed(root, tmp_path, step):
    whole, _ = unbroken(root, "AdamW-OneCycle", "init", alike=True)
    script = f"""
import os, signal, sys
sys.path[:0] = {[str(Path(__file__).parents[3]), str(Path(__file__).parents[2]), str(Path(__file__).parent)]!r}
from pathlib import Path
import torch
from test_resume import Watch, run
torch.set_num_threads(1)  # as in all tests: sums differ in the last bit
def kill(trainer, module):
    if trainer.global_step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
run(Path({str(tmp_path / "first")!r}), "AdamW-OneCycle", "init", True, extra=[Watch(on_train_batch_start=kill)])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=100, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    file = tmp_path / "first" / "step" / f"step={step}.ckpt"
    resumed = run(tmp_path / "second", "AdamW-OneCycle", "init", alike=True, ckpt_path=file)
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
