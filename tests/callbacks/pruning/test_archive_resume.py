"""Resumed runs whose rounds are saved."""

from pathlib import Path

import pytest
import torch
from archiving import Decaying, archived, archiving_half
from helpers import Watch, loader, same
from lightning.pytorch.callbacks import ModelCheckpoint

pytestmark = pytest.mark.slow  # whole fits, many of them


class TestResume:
    def through(self, folder, **options):
        saver = ModelCheckpoint(folder / "files", "{epoch}", save_top_k=-1)
        found = archived(
            folder, Decaying(), archiving_half(**options), saver, val=loader(seed=3), enable_checkpointing=True
        )
        return (*found, folder / "files")

    @pytest.mark.parametrize("epoch", range(5))
    def test_resume_goes_on_in_the_same_folder_of_rounds(self, tmp_path, epoch):
        _, whole, rounds, _, files = self.through(tmp_path / "whole")
        module, pruner, _, _trainer = archived(
            tmp_path / "other", val=loader(seed=3), ckpt_path=files / f"epoch={epoch}.ckpt"
        )
        assert [record.path for record in pruner.history] == [record.path for record in whole.history]
        assert not (tmp_path / "other" / "rounds").exists()
        assert [Path(r.path).parent for r in pruner.history] == [tmp_path / "whole" / "rounds"] * 3
        for round in range(3):
            pruner.restore_round(round)
            assert same(module.state_dict(), rounds.states[round])

    @pytest.mark.parametrize("round", [0, 1])
    def test_resume_from_a_saved_round_equals_unbroken_run(self, tmp_path, round):
        module, whole, _, _, _ = self.through(tmp_path / "whole")
        again, pruner, _, trainer = archived(
            tmp_path / "other", val=loader(seed=3), ckpt_path=whole.history[round].path
        )
        assert trainer.global_step == 18
        assert same(again.state_dict(), module.state_dict())
        assert same(pruner.masks, whole.masks)
        rows, others = ([{**row, "seconds": None} for row in p.history.rows()] for p in (pruner, whole))
        assert rows == others

    def test_resume_from_the_round_after_which_training_stopped_equals_unbroken_run(self, tmp_path):
        module, whole, _, _, _ = self.through(tmp_path / "whole")
        stop = Watch(on_train_epoch_end=lambda t, m: setattr(t, "should_stop", t.current_epoch == 3))
        with pytest.warns(UserWarning, match="not all prunings came"):
            _, stopped, _, _ = archived(tmp_path / "stopped", Decaying(), archiving_half(), stop, val=loader(seed=3))
        assert [record.round for record in stopped.history] == [0, 1]
        again, pruner, _, _ = archived(tmp_path / "other", val=loader(seed=3), ckpt_path=stopped.history[1].path)
        assert same(again.state_dict(), module.state_dict())
        assert same(pruner.masks, whole.masks)

    def test_saved_round_is_numbered_as_the_checkpoint_of_its_last_epoch(self, tmp_path):
        _, pruner, _, _, files = self.through(tmp_path)
        for record in pruner.history:
            ours, theirs = (
                torch.load(path, weights_only=True) for path in (record.path, files / f"epoch={record.last_epoch}.ckpt")
            )
            assert (ours["epoch"], ours["global_step"]) == (theirs["epoch"], theirs["global_step"])
            assert ours["loops"]["fit_loop"]["epoch_progress"] == theirs["loops"]["fit_loop"]["epoch_progress"]

    def test_resume_from_the_last_saved_round_trains_nothing(self, tmp_path):
        module, whole, _, _, _ = self.through(tmp_path / "whole")
        again, pruner, _, trainer = archived(tmp_path / "other", ckpt_path=whole.history[2].path)
        assert trainer.global_step == 18
        assert same(again.state_dict(), module.state_dict())
        assert same(pruner.masks, whole.masks)

    def test_resume_with_save_rounds_false_saves_none_from_then_on(self, tmp_path):
        _, whole, _, _, files = self.through(tmp_path)
        before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "rounds").iterdir()}
        _, pruner, _, _ = archived(tmp_path, pruner=archiving_half(save_rounds=False), ckpt_path=files / "epoch=2.ckpt")
        assert [record.path for record in pruner.history] == [whole.history[0].path, None, None]
        assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "rounds").iterdir()} == before

    def test_resume_with_another_dirpath_saves_there_from_then_on(self, tmp_path):
        _, whole, _, _, files = self.through(tmp_path)
        new = str(tmp_path / "new")
        _, pruner, _, _ = archived(tmp_path, pruner=archiving_half(dirpath=new), ckpt_path=files / "epoch=2.ckpt")
        assert [record.path for record in pruner.history] == [
            whole.history[0].path, f"{new}/sap-round-001.ckpt", f"{new}/sap-round-002.ckpt",
        ]  # fmt: skip

    def test_resume_with_save_rounds_true_saves_from_then_on(self, tmp_path):
        *_, files = self.through(tmp_path, save_rounds=None)
        _, pruner, _, _ = archived(tmp_path, ckpt_path=files / "epoch=3.ckpt")
        assert [record.path and Path(record.path).name for record in pruner.history] == [
            None, "sap-round-001.ckpt", "sap-round-002.ckpt",
        ]  # fmt: skip
