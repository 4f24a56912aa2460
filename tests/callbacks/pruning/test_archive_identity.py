"""Whose a round is: runs that branch off, share a folder, crash, or are moved, keep to their own rounds."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from archiving import Decaying, archived, archiving_half, bytes_of
from helpers import OPTIMIZERS, Crash, Watch, crash_in, fit, same
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from resuming import STATE

from lightning_sap.callbacks.pruning import carrying
from lightning_sap.callbacks.pruning.roundfile import file_name

pytestmark = pytest.mark.slow  # whole fits, many of them

BRANCHES = r"has another round 1 of the run that this one was resumed from\. It stays"


def through(folder, **options):
    """A run with a file after each epoch."""
    saver = ModelCheckpoint(folder / "files", "{epoch}", save_top_k=-1)
    return archived(folder, None, archiving_half(), saver, **{"enable_checkpointing": True, **options})


class WithRate(Decaying):
    """With another learning rate once it is resumed."""

    def on_train_start(self):
        self.trainer.optimizers[0].param_groups[0]["lr"] *= 2


class TestBranches:
    @pytest.mark.parametrize("save_rounds", [True, 1])
    def test_branch_gets_a_folder_of_its_own(self, tmp_path, save_rounds):
        module, first, rounds, _trainer = through(tmp_path)
        before = bytes_of(tmp_path / "rounds")
        second = archiving_half(save_rounds=save_rounds)
        branched, file = WithRate(), tmp_path / "files" / "epoch=2.ckpt"
        with pytest.warns(UserWarning, match=BRANCHES):
            again = fit(branched, second, max_epochs=6, ckpt_path=file, default_root_dir=tmp_path)
        assert bytes_of(tmp_path / "rounds") == before
        first.restore_round(2)
        assert same(module.state_dict(), rounds.states[2])
        assert not same(branched.state_dict(), rounds.states[2])
        runs = [record.run for record in second.history]
        assert runs[0] == first.history[0].run != runs[1] == runs[2]
        assert [record.parent for record in second.history] == [None, runs[0], runs[0]]
        own = [1, 2] if save_rounds is True else [2]
        assert sorted(os.listdir(tmp_path / "rounds-v1")) == [f"sap-round-00{t}.ckpt" for t in own]
        assert again.current_epoch == 6
        second.restore_round(0, restored := Decaying())
        assert same(restored.state_dict(), rounds.states[0])
        second.restore_round(2)
        assert not same(branched.state_dict(), rounds.states[2])

    def test_resumed_branch_goes_on_in_its_folder_and_finds_the_rounds_of_both(self, tmp_path):
        through(tmp_path)
        saver = ModelCheckpoint(tmp_path / "branch", "{epoch}", save_top_k=-1)
        file = tmp_path / "files" / "epoch=2.ckpt"
        options = {"max_epochs": 6, "enable_checkpointing": True, "default_root_dir": tmp_path}
        with pytest.warns(UserWarning, match=BRANCHES):
            fit(WithRate(), archiving_half(), saver, ckpt_path=file, **options)
        again = archiving_half()
        fit(Decaying(), again, ckpt_path=tmp_path / "branch" / "epoch=4.ckpt", **options)
        assert [Path(record.path).parent.name for record in again.history] == ["rounds", "rounds-v1", "rounds-v1"]
        assert again.restore_round(0).parent is None
        assert again.restore_round(1).parent == again.history[0].run

    def test_run_that_goes_on_keeps_its_identity_and_files(self, tmp_path):
        _, first, _, _trainer = through(tmp_path)
        before = bytes_of(tmp_path / "rounds")
        again = archiving_half()
        fit(Decaying(), again, max_epochs=6, ckpt_path=tmp_path / "files" / "epoch=2.ckpt", default_root_dir=tmp_path)
        assert {record.run for record in (*first.history, *again.history)} == {first.history[0].run}
        assert bytes_of(tmp_path / "rounds") == before
        assert [record.sha256 for record in again.history] == [record.sha256 for record in first.history]

    def test_two_runs_differ_in_identity(self, tmp_path):
        runs = {archived(tmp_path)[1].history[0].run for _ in range(3)}
        assert len(runs) == 3
        assert {len(run) for run in runs} == {32}

    def test_second_fit_of_a_callback_is_another_run(self, tmp_path):
        module, pruner, _, _trainer = archived(tmp_path)
        first = pruner.history[0].run
        archived(tmp_path, module, pruner)
        assert pruner.history[0].run != first

    def test_every_file_says_run_parent_and_round(self, tmp_path):
        _, pruner, _, _trainer = archived(tmp_path)
        for record in pruner.history:
            state = torch.load(record.path, weights_only=True)["callbacks"][STATE]
            assert (state["run"], state["parent"], state["round"]) == (record.run, None, record.round)


class TestCrashes:
    def test_folder_of_a_crashed_run_that_another_took_is_left_to_it(self, tmp_path):
        """It crashed before it had a round, and gave its folder up."""
        saver = ModelCheckpoint(tmp_path / "files", "{epoch}", save_top_k=-1)
        with pytest.raises(Crash):
            archived(tmp_path, None, None, saver, crash_in("on_train_batch_start", 1), enable_checkpointing=True)
        _, other, _, _trainer = archived(tmp_path, Decaying(optimizer=OPTIMIZERS["Adam"]))
        before = bytes_of(tmp_path / "rounds")
        _, first, _, _trainer2 = archived(tmp_path, ckpt_path=tmp_path / "files" / "epoch=0.ckpt")
        assert bytes_of(tmp_path / "rounds") == before
        assert {Path(record.path).parent.name for record in other.history} == {"rounds"}
        assert {Path(record.path).parent.name for record in first.history} == {"rounds-v1"}

    def test_killed_run_goes_on_in_the_folder_that_it_marked(self, tmp_path):
        saver = ModelCheckpoint(tmp_path / "files", "{epoch}", save_top_k=-1)
        take = Watch(
            on_train_batch_start=lambda t, m: shutil.copytree(
                tmp_path / "rounds", tmp_path / "kept", dirs_exist_ok=True
            )
        )
        with pytest.raises(Crash):
            archived(tmp_path, None, None, saver, take, crash_in("on_train_batch_start", 1), enable_checkpointing=True)
        shutil.move(tmp_path / "kept", tmp_path / "rounds")  # as SIGKILL leaves it
        assert os.listdir(tmp_path / "rounds") == [".taken"]
        _, pruner, _, _trainer = archived(tmp_path, ckpt_path=tmp_path / "files" / "epoch=0.ckpt")
        assert {Path(record.path).parent.name for record in pruner.history} == {"rounds"}
        assert sorted(os.listdir(tmp_path / "rounds")) == [f"sap-round-00{t}.ckpt" for t in range(3)]

    def test_temporary_files_of_killed_saves_are_cleared_at_the_next_start(self, tmp_path):
        _, pruner, _, _trainer = through(tmp_path)
        run, other = pruner.history[0].run, "0" * 32
        rounds = tmp_path / "rounds"
        mine = [f".sap-round-001.ckpt.{run}.0a1b2c3d.tmp", f".sap-round-1000.ckpt.{run}.00.tmp"]
        theirs = [f".sap-round-001.ckpt.{other}.0a1b2c3d.tmp", f".big-round-001.ckpt.{run}.00.tmp", ".sap.tmp", "notes"]
        for name in (*mine, *theirs):
            (rounds / name).touch()
        (rounds / f".sap-round-002.ckpt.{run}.ff.tmp").mkdir()  # of a sharded one
        fit(
            Decaying(), archiving_half(), max_epochs=6, ckpt_path=tmp_path / "files" / "epoch=4.ckpt",
            default_root_dir=tmp_path,
        )  # fmt: skip
        assert sorted(os.listdir(rounds)) == sorted([*theirs, *(f"sap-round-00{t}.ckpt" for t in range(3))])


class TestInterrupts:
    def test_record_of_a_pruning_that_was_noted_finds_its_file_where_the_folder_was_moved(self, tmp_path):
        """It waits in the state until the pruning is carried out."""
        old, new = tmp_path / "old", tmp_path / "new"
        pruner, noted = archiving_half(), old / "noted.ckpt"

        def interrupt(session, trainer, *_):
            trainer.save_checkpoint(noted)
            raise Crash

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(carrying, "_carry_out_", interrupt)
            with pytest.raises(Crash):
                archived(old, None, pruner)
        state = torch.load(noted, weights_only=True)["callbacks"][STATE]
        assert state["pruning"]["record"]["path"] == "sap-round-000.ckpt"
        shutil.move(old, new)
        module, again, _, _trainer2 = archived(new, ckpt_path=new / "noted.ckpt")
        assert [Path(record.path).parent for record in again.history] == [new / "rounds"] * 3
        again.restore_round(0)
        saved = torch.load(new / "rounds" / "sap-round-000.ckpt", weights_only=True)
        assert same(module.state_dict(), saved["state_dict"])


class TestMoves:
    @pytest.mark.parametrize("given", ["default_root_dir", "dirpath"])
    def test_moved_folder_has_its_rounds_and_goes_on(self, tmp_path, given):
        old, new = tmp_path / "old", tmp_path / "new"
        saver = ModelCheckpoint(old / "files", "{epoch}", save_top_k=-1)
        how = {"dirpath": old / "mine"} if given == "dirpath" else {}
        _, _, rounds, _trainer = archived(old, None, archiving_half(**how), saver, enable_checkpointing=True)
        shutil.move(old, new)
        how = {"dirpath": new / "mine"} if given == "dirpath" else {}
        module, pruner, _, _trainer2 = archived(
            new, None, archiving_half(**how), ckpt_path=new / "files" / "epoch=3.ckpt"
        )
        folder = new / ("mine" if given == "dirpath" else "rounds")
        assert [Path(record.path).parent for record in pruner.history] == [folder] * 3
        assert sorted(path.name for path in new.iterdir()) == sorted(["files", folder.name])
        assert not old.exists()
        for round in range(3):
            pruner.restore_round(round)
            assert same(module.state_dict(), rounds.states[round])

    def test_run_of_another_version_folder_of_the_logger_goes_on_in_its_own(self, tmp_path):
        """Lightning gives a resumed run new logs, and its checkpoints may lie anywhere."""
        saver = ModelCheckpoint(tmp_path / "files", "{epoch}", save_top_k=-1)
        archived(tmp_path / "a", None, None, saver, enable_checkpointing=True, logger=CSVLogger(tmp_path / "logs"))
        _, pruner, _, _trainer = archived(
            tmp_path / "b", logger=CSVLogger(tmp_path / "logs"), ckpt_path=tmp_path / "files" / "epoch=3.ckpt"
        )
        own = tmp_path / "logs" / "lightning_logs" / "version_0" / "rounds"
        assert [Path(record.path).parent for record in pruner.history] == [own] * 3
        assert not (tmp_path / "logs" / "lightning_logs" / "version_1" / "rounds").exists()


class TestNames:
    def test_files_sort_as_their_rounds_do(self):
        names = [file_name("sap", round) for round in range(999)]
        assert names == sorted(names)
        assert (names[0], file_name("sap", 1234)) == ("sap-round-000.ckpt", "sap-round-1234.ckpt")

    def test_rounds_of_an_older_version_are_still_restored(self, tmp_path):
        """Two digits, whole paths, no identity and no digest."""
        module, pruner, rounds, _trainer = through(tmp_path)
        for round in range(3):
            (tmp_path / "rounds" / f"sap-round-00{round}.ckpt").rename(tmp_path / "rounds" / f"sap-round-0{round}.ckpt")
        for path in (*(tmp_path / "files").iterdir(), *(tmp_path / "rounds").iterdir()):
            older(path, tmp_path / "rounds")
        before = bytes_of(tmp_path / "rounds")
        module, pruner, _, _trainer2 = archived(
            tmp_path, None, archiving_half(save_rounds=1), ckpt_path=tmp_path / "files" / "epoch=4.ckpt"
        )
        assert [record.path and Path(record.path).name for record in pruner.history] == [
            "sap-round-00.ckpt", "sap-round-01.ckpt", "sap-round-002.ckpt",
        ]  # fmt: skip
        assert bytes_of(tmp_path / "rounds") == before
        for round in range(3):
            pruner.restore_round(round)
            assert same(module.state_dict(), rounds.states[round])


def older(path, folder):
    """Write a file as the version before did."""
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["callbacks"][STATE]
    for key in ("run", "parent", "version", "writer"):
        del state[key]
    state["folder"] = str(folder)
    for record in (*state["history"], state["note"]):
        for key in ("run", "parent", "size", "sha256"):
            record.pop(key, None)
        if record.get("path"):
            record["path"] = f"{folder}/{record['path'].replace('-00', '-0')}"
    torch.save(checkpoint, path)
