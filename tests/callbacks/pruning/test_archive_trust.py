"""A state and an archive that someone else has written: nothing is executed, and nothing of others is touched."""

import os
import pickle
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from archiving import Decaying, archived, archiving_half, bytes_of, snapshot, unchanged
from helpers import Watch, copied, fit, same
from lightning.fabric.utilities.data import AttributeDict
from lightning.pytorch.callbacks import ModelCheckpoint
from resuming import STATE
from torch.distributed import checkpoint as shards

from lightning_sap.callbacks.pruning import restoring, roundfile

pytestmark = pytest.mark.slow  # whole fits, many of them

ALONE = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)", "ignore:TypedStorage is depr")


class Runs:
    """Makes a folder if it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class Unknown:
    """Remembers whether it was unpickled."""

    unpickled = False

    def __getstate__(self):
        return {"width": 3}

    def __setstate__(self, state):
        type(self).unpickled = True


@pytest.fixture
def run(tmp_path):
    """A run with a file after each epoch: the folder, its pruner, and what its rounds were."""
    saver = ModelCheckpoint(tmp_path / "files", "{epoch}", save_top_k=-1)
    module, pruner, rounds, _trainer = archived(tmp_path, None, None, saver, enable_checkpointing=True)
    return tmp_path, module, pruner, rounds, _trainer


def tampered(folder, change, epoch=3):
    """A file of that run whose pruning state is changed."""
    checkpoint = torch.load(folder / "files" / f"epoch={epoch}.ckpt", weights_only=True)
    change(checkpoint["callbacks"][STATE])
    torch.save(checkpoint, folder / "files" / "tampered.ckpt")
    return folder / "files" / "tampered.ckpt"


class TestExecution:
    @pytest.mark.parametrize("place", ["elsewhere", "in the folder"])
    def test_round_of_a_state_that_names_another_file_executes_nothing(self, run, place):
        folder, _, pruner, _, _ = run
        other = folder / "other.ckpt" if place == "elsewhere" else Path(pruner.history[0].path)
        torch.save({"callbacks": {STATE: Runs(folder / "executed")}}, other)
        digest = roundfile.digest_of(str(other))
        file = tampered(folder, lambda s: s["history"][0].update(path=str(other), **digest._asdict()))
        twin, module = archiving_half(), Decaying()
        trainer = fit(module, twin, max_epochs=6, ckpt_path=file, default_root_dir=folder)
        with pytest.raises((ValueError, FileNotFoundError)):
            twin.restore_round(0)
        assert not (folder / "executed").exists()
        assert trainer.current_epoch == 6

    def test_round_with_hyperparameters_of_any_class_is_read_without_them(self, tmp_path):
        class Configured(Decaying):
            def on_save_checkpoint(self, checkpoint):
                checkpoint["hyper_parameters"] = {"width": Path("a"), "code": Unknown()}

        module, pruner, rounds, _trainer = archived(tmp_path, Configured())
        with pytest.raises(Exception, match="Weights only load failed"):
            torch.load(pruner.history[1].path, weights_only=True)
        pruner.restore_round(1)
        assert same(module.state_dict(), rounds.states[1])
        assert not Unknown.unpickled

    @pytest.mark.parametrize("known", [[], [defaultdict, AttributeDict]], ids=["unknown", "told to be safe"])
    @pytest.mark.parametrize("value", [AttributeDict(a=AttributeDict(b=1)), defaultdict(list, a=[1])], ids=type)
    def test_round_with_hyperparameters_that_are_other_dicts_is_read(self, tmp_path, value, known):
        class Configured(Decaying):
            def on_save_checkpoint(self, checkpoint):
                checkpoint["hyper_parameters"] = {"config": value}

        module, pruner, rounds, _trainer = archived(tmp_path, Configured())
        with torch.serialization.safe_globals(known):
            before = set(torch.serialization.get_safe_globals())
            pruner.restore_round(1)
            assert set(torch.serialization.get_safe_globals()) == before
        assert same(module.state_dict(), rounds.states[1])

    def test_round_whose_hyperparameters_execute_something_is_refused(self, tmp_path):
        class Configured(Decaying):
            def on_save_checkpoint(self, checkpoint):
                checkpoint["hyper_parameters"] = {"code": Runs(tmp_path / "executed")}

        module, pruner, _, _trainer = archived(tmp_path, Configured())
        before = snapshot(module, pruner)
        with pytest.raises(ValueError, match="cannot be read without executing code"):
            pruner.restore_round(1)
        assert unchanged(before, module, pruner)
        assert not (tmp_path / "executed").exists()

    @ALONE
    @pytest.mark.parametrize("where", ["list of shards", "shard"])
    def test_shards_that_execute_something_are_refused(self, tmp_path, where):
        module = torch.nn.Linear(2, 2)
        folder = tmp_path / "round"
        state = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
        if where == "shard":
            state["weight"] = Runs(tmp_path / "executed")
        shards.save({"state_dict": state}, checkpoint_id=folder)
        torch.save({}, folder / "meta.pt")
        if where == "list of shards":
            (folder / ".metadata").write_bytes(pickle.dumps(Runs(tmp_path / "executed")))
        with pytest.raises(BaseException, match=r"A list of shards has no|is no tensor in the checkpoint"):
            roundfile.read(str(folder), module)
        assert not (tmp_path / "executed").exists()

    @ALONE
    @pytest.mark.parametrize("what", ["list of shards", "shards"])
    def test_shards_that_are_damaged_are_a_value_error(self, tmp_path, what):
        """PyTorch raises what no `except Exception` sees."""
        module, folder = torch.nn.Linear(2, 2), tmp_path / "round"
        shards.save({"state_dict": module.state_dict()}, checkpoint_id=folder)
        torch.save({}, folder / "meta.pt")
        for path in [folder / ".metadata"] if what == "list of shards" else folder.glob("*.distcp"):
            path.write_bytes(path.read_bytes()[:40])
        with pytest.raises(ValueError, match="cannot be read"):
            restoring._read(str(folder), module)

    @ALONE
    def test_shards_are_read_as_they_were_written(self, tmp_path):
        """The ground of the test above."""
        module = torch.nn.Linear(2, 2)
        shards.save({"state_dict": module.state_dict()}, checkpoint_id=tmp_path / "round")
        torch.save({"epoch": 3}, tmp_path / "round" / "meta.pt")
        live = torch.nn.Linear(2, 2)
        before = copied(live.state_dict())
        found = roundfile.read(str(tmp_path / "round"), live)
        assert same(live.state_dict(), before)
        assert same(found["state_dict"], module.state_dict())
        assert found["epoch"] == 3


class TestDeletion:
    @pytest.mark.parametrize("kind", ["folder", "file", "link"])
    def test_old_rounds_elsewhere_are_never_deleted(self, run, kind):
        folder, _, _, _, _ = run
        other = folder / "precious" / "sap-round-000.ckpt"
        other.parent.mkdir()
        if kind == "folder":
            other.mkdir()
            (other / "thesis").touch()
        elif kind == "link":
            other.symlink_to(folder / "rounds")
        else:
            other.touch()
        before = bytes_of(folder / "rounds")
        file = tampered(folder, lambda s: (s["history"][0].update(path=str(other)), s.update(folder=str(other.parent))))
        fit(
            Decaying(), archiving_half(save_rounds=1, dirpath=folder / "new"), max_epochs=6, ckpt_path=file,
            default_root_dir=folder,
        )  # fmt: skip
        assert other.exists()
        assert kind != "folder" or (other / "thesis").exists()
        assert bytes_of(folder / "rounds").keys() >= {f"sap-round-00{t}.ckpt" for t in (1, 2)}
        assert all(bytes_of(folder / "rounds").get(name, data) == data for name, data in before.items())
        assert os.listdir(folder / "new") == ["sap-round-002.ckpt"]

    def test_old_round_that_is_another_file_is_left_there(self, tmp_path):
        foreign = tmp_path / "rounds" / "sap-round-000.ckpt"
        pruner = archiving_half(save_rounds=1)

        def swap(trainer, module):
            if trainer.current_epoch == 2:
                torch.save({"mine": 1}, foreign)

        with pytest.warns(UserWarning, match="is not what was saved as round 0 of this run, and is left there"):
            archived(tmp_path, None, pruner, Watch(on_train_epoch_start=swap))
        assert torch.load(foreign, weights_only=True) == {"mine": 1}
        assert sorted(os.listdir(tmp_path / "rounds")) == ["sap-round-000.ckpt", "sap-round-002.ckpt"]


class TestFolder:
    @pytest.mark.parametrize("stored", ["/elsewhere", "../elsewhere", "a/../../elsewhere", "rounds/../../elsewhere"])
    def test_folder_of_a_state_elsewhere_is_neither_made_nor_written(self, tmp_path, stored):
        saver = ModelCheckpoint(tmp_path / "runs" / "files", "{epoch}", save_top_k=-1)
        archived(tmp_path / "runs", None, None, saver, enable_checkpointing=True)
        elsewhere = str(tmp_path / "elsewhere") if stored.startswith("/") else stored
        file = tampered(tmp_path / "runs", lambda state: state.update(folder=elsewhere), epoch=2)
        pruner = archiving_half()
        fit(Decaying(), pruner, max_epochs=6, ckpt_path=file, default_root_dir=tmp_path / "runs")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
        assert [Path(record.path).parent for record in pruner.history] == [tmp_path / "runs" / "rounds"] * 3

    def test_rounds_of_this_run_elsewhere_are_neither_used_nor_deleted(self, tmp_path):
        """They carry its identity, and the state says where they are."""
        saver = ModelCheckpoint(tmp_path / "runs" / "files", "{epoch}", save_top_k=-1)
        archived(tmp_path / "runs", None, None, saver, enable_checkpointing=True)
        (tmp_path / "runs" / "rounds").rename(tmp_path / "elsewhere")
        before = bytes_of(tmp_path / "elsewhere")
        file = tampered(tmp_path / "runs", lambda state: state.update(folder="../elsewhere"), epoch=2)
        pruner = archiving_half(save_rounds=1)
        fit(Decaying(), pruner, max_epochs=6, ckpt_path=file, default_root_dir=tmp_path / "runs")
        assert bytes_of(tmp_path / "elsewhere") == before
        assert Path(pruner.history[2].path).parent == tmp_path / "runs" / "rounds"
        with pytest.raises((ValueError, FileNotFoundError)):
            pruner.restore_round(0)

    def test_state_holds_no_path_of_this_machine(self, run):
        folder = run[0]
        state = torch.load(folder / "files" / "epoch=3.ckpt", weights_only=True)["callbacks"][STATE]
        assert state["folder"] == "rounds"
        assert state["history"][0]["path"] == "sap-round-000.ckpt"
        assert state["note"]["path"] == "sap-round-001.ckpt"
        assert str(folder) not in repr({key: value for key, value in state.items() if key != "options"})

    def test_dirpath_may_begin_with_the_home_folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        _, pruner, _, _ = archived(tmp_path, pruner=archiving_half(dirpath="~/rounds"))
        assert Path(pruner.history[0].path).parent == tmp_path / "home" / "rounds"
        assert not Path("~").exists()

    @pytest.mark.parametrize("name", ["a" * 300, "ä" * 76, "sap\0"])
    def test_name_that_no_file_can_have_is_refused_at_once(self, name):
        message = f"name must be a text of at most 150 bytes without NUL, as files are named after it, got {name!r}."
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            archiving_half(name=name)

    def test_dirpath_with_nul_is_refused_at_once(self):
        with pytest.raises(ValueError, match="dirpath must be a path without NUL"):
            archiving_half(dirpath="rounds\0")

    def test_longest_name_has_files(self, tmp_path):
        _, pruner, _, _ = archived(tmp_path, pruner=archiving_half(name="ä" * 75))
        assert all(Path(record.path).is_file() for record in pruner.history)
