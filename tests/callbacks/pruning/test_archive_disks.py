"""Disks that are full, read-only or slow to a kill: training goes on, files are whole or not there."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from archiving import archived, archiving_half, wide
from helpers import Crash, Watch, crash_in, fit, same
from launch import ROOT
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_sap.callbacks.pruning import roundfile, saving

pytestmark = [pytest.mark.slow, pytest.mark.linux]  # whole fits, many of them; on disks of their own
FULL = "No space left on device"


@pytest.fixture
def disk(tmp_path):
    """A function that gives a disk of its own, of so many bytes."""
    made = []

    def of_size(size, *options):
        folder = tmp_path / "disk"
        folder.mkdir(exist_ok=True)
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(folder)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if mounted.returncode:
            pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
        made.append(folder)
        return folder

    try:
        of_size.again = lambda how: subprocess.run(["mount", "-o", f"remount,{how}", str(made[0])], check=True)
        yield of_size
    except FileNotFoundError as error:
        pytest.skip(str(error))
    finally:
        for folder in made:
            subprocess.run(["umount", str(folder)], check=True)


def whole(folder):
    """The names of the files, each of which must be whole."""
    for path in folder.iterdir():
        torch.load(path, weights_only=True)
    return sorted(path.name for path in folder.iterdir())


def fails(monkeypatch, at=1):
    """Have the disk full in the middle of every round's file, from the so many-th on."""
    written = []

    class Full(roundfile._Hashing):
        def write(self, data):
            written.append(None)
            if len(written) > at:
                self.error = OSError(errno.ENOSPC, FULL)
                raise self.error
            return super().write(data)

    monkeypatch.setattr(roundfile, "_Hashing", Full)


class TestFullDisks:
    def test_round_that_does_not_fit_is_told_and_training_goes_on(self, tmp_path, disk):
        folder = disk("1m")
        pruner = archiving_half(dirpath=folder / "rounds")
        with pytest.warns(UserWarning, match=rf"round [12] is not saved, and cannot be restored: .*{FULL}"):
            module, _, rounds, trainer = archived(tmp_path, wide(), pruner)
        assert trainer.current_epoch == 6
        assert [record.path is not None for record in pruner.history] == [True, False, False]
        assert os.listdir(folder / "rounds") == ["sap-round-000.ckpt"]
        pruner.restore_round(0)
        assert same(module.state_dict(), rounds.states[0])

    def test_users_checkpoint_comes_first(self, tmp_path, disk):
        """There is room for a file of either."""
        folder = disk("1m")
        saver = ModelCheckpoint(folder / "files", save_top_k=1, every_n_epochs=6)
        pruner = archiving_half(dirpath=folder / "rounds")
        with pytest.warns(UserWarning, match="and the next file of ModelCheckpoint needs room beside the"):
            archived(tmp_path, wide(), pruner, saver, enable_checkpointing=True)
        assert len(whole(folder / "files")) == 1
        assert [record.path for record in pruner.history] == [None] * 3

    def test_disk_that_is_full_in_the_middle_of_a_file_leaves_none(self, tmp_path, monkeypatch):
        fails(monkeypatch, at=20)
        with pytest.warns(UserWarning, match=rf"round [012] is not saved, and cannot be restored: \[Errno 28\] {FULL}"):
            _, pruner, _, trainer = archived(tmp_path)
        assert trainer.current_epoch == 6
        assert [record.path for record in pruner.history] == [None] * 3
        assert not (tmp_path / "rounds").exists()

    def test_full_disk_changes_nothing_in_training(self, tmp_path, monkeypatch):
        module, whole_run, _, _ = archived(tmp_path / "whole")
        fails(monkeypatch)
        with pytest.warns(UserWarning, match=FULL):
            other, pruner, _, _ = archived(tmp_path / "full")
        assert same(other.state_dict(), module.state_dict())
        assert same(pruner.masks, whole_run.masks)

    def test_resume_on_a_full_disk_goes_on(self, tmp_path, monkeypatch):
        saver = ModelCheckpoint(tmp_path / "files", "{epoch}", save_top_k=-1)
        archived(tmp_path, None, None, saver, enable_checkpointing=True)
        for path in (tmp_path / "rounds").glob("*-00[12].ckpt"):
            path.unlink()
        fails(monkeypatch)
        with pytest.warns(UserWarning, match=FULL):
            _, pruner, _, trainer = archived(tmp_path, ckpt_path=tmp_path / "files" / "epoch=2.ckpt")
        assert trainer.current_epoch == 6
        assert os.listdir(tmp_path / "rounds") == ["sap-round-000.ckpt"]
        assert [record.path is not None for record in pruner.history] == [True, False, False]

    def test_round_that_could_not_be_saved_is_not_tried_again(self, tmp_path, monkeypatch):
        """In a hook behind it, from whose files Lightning does not resume."""
        tried = []

        def count(*_, **__):
            tried.append(None)
            raise OSError(FULL)

        monkeypatch.setattr(saving, "_write", count)
        with pytest.warns(UserWarning, match=FULL):
            archived(tmp_path)
        assert len(tried) == 3

    @pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
    def test_save_that_is_cut_off_leaves_no_file(self, tmp_path, monkeypatch, error):
        def cut_off(self, data):
            raise error

        monkeypatch.setattr(roundfile._Hashing, "write", cut_off)
        pruner = archiving_half()
        with pytest.raises((error, SystemExit)):
            archived(tmp_path, pruner=pruner)
        assert not (tmp_path / "rounds").exists()
        assert "path" not in pruner.session.state.note


class TestReadOnlyDisks:
    def test_folder_that_cannot_be_made_is_told_and_training_goes_on(self, tmp_path, disk):
        folder = disk("1m", "ro")
        pruner = archiving_half(dirpath=folder / "rounds")
        with pytest.warns(UserWarning, match=r"no rounds are saved, so that none can be restored: .*Read-only"):
            _, _, _, trainer = archived(tmp_path, None, pruner)
        assert trainer.current_epoch == 6
        assert [record.path for record in pruner.history] == [None] * 3

    def test_file_in_the_place_of_the_folder_is_told(self, tmp_path):
        (tmp_path / "rounds").touch()
        with pytest.warns(UserWarning, match="no rounds are saved, so that none can be restored"):
            archived(tmp_path)
        assert (tmp_path / "rounds").read_bytes() == b""

    def test_disk_that_becomes_read_only_hides_no_error_of_the_user(self, tmp_path, disk):
        folder = disk("1m")
        freeze = Watch(on_train_epoch_start=lambda t, m: t.current_epoch == 1 and disk.again("ro"))
        with pytest.raises(Crash):
            archived(
                tmp_path, None, archiving_half(dirpath=folder / "rounds"), freeze,
                crash_in("on_train_batch_end", 1),
            )  # fmt: skip

    def test_disk_that_becomes_read_only_ends_no_training(self, tmp_path, disk):
        folder = disk("1m")
        freeze = Watch(on_train_epoch_start=lambda t, m: t.current_epoch == 2 and disk.again("ro"))
        with pytest.warns(UserWarning, match=r"round [12] is not saved, and cannot be restored: .*Read-only"):
            _, pruner, _, trainer = archived(tmp_path, None, archiving_half(dirpath=folder / "rounds"), freeze)
        assert trainer.current_epoch == 6
        assert pruner.restore_round(0).round == 0


class TestPlugins:
    def test_rounds_are_whole_beside_asynchronous_checkpoints(self, tmp_path):
        module, pruner, rounds, trainer = archived(tmp_path, plugins=[AsyncCheckpointIO()])
        assert isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO)
        for round in (0, 1, 2):
            pruner.restore_round(round)
            assert same(module.state_dict(), rounds.states[round])

    def test_file_is_on_the_disk_before_it_gets_its_name(self, tmp_path, monkeypatch):
        events, fsync, replace = [], os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", lambda d: (events.append("flush"), fsync(d))[1])
        monkeypatch.setattr(os, "replace", lambda a, b: (events.append(Path(b).name), replace(a, b))[1])
        archived(tmp_path)
        mine = [event for event in events if event == "flush" or "round" in event]
        assert mine[:3] == ["flush", "sap-round-000.ckpt", "flush"]
        assert mine.count("flush") == 6


@pytest.mark.filterwarnings("ignore:sap")  # of prunings that do not come, and of layers that end up empty
class TestKills:
    @pytest.mark.parametrize("kill", [*range(3), *(pytest.param(i, marks=pytest.mark.full) for i in range(3, 50))])
    def test_killed_save_leaves_whole_files_and_is_cleared(self, tmp_path, kill):
        """A process that saves all the time is killed at some moment."""
        child = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("saving_forever.py")), str(tmp_path)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True, text=True,
        )  # fmt: skip
        assert child.stdout.readline() == "saving\n"
        time.sleep(0.3 + 0.037 * kill)
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
        rounds = tmp_path / "rounds"
        left = [path for path in rounds.iterdir() if path.suffix == ".tmp"]
        for path in rounds.glob("*.ckpt"):
            torch.load(path, weights_only=True)
        assert len(left) <= 1
        newest = max((tmp_path / "files").glob("*.ckpt"), key=os.path.getmtime)
        last = torch.load(newest, weights_only=True)["epoch"]
        pruner = archiving_half(rounds=99, every_n_epochs=1)
        options = {"max_epochs": last + 3, "limit_train_batches": 1, "default_root_dir": tmp_path}
        fit(wide(), pruner, ckpt_path=newest, **options)
        assert [path.name for path in rounds.iterdir() if path.suffix == ".tmp"] == []
        assert all(re.fullmatch(r"sap-round-\d{3}\.ckpt", name) for name in whole(rounds))
