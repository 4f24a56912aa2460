"""Resuming from files that are saved when training is over."""

import pytest
import torch
from helpers import Net, Scheduled, Watch, fit, half, loader, same
from lightning.pytorch.callbacks import ModelCheckpoint
from resuming import records_of

from lightning_sap import PQIMonitor


class TestFilesOfAnEnd:
    """Files that are saved when training is over: what goes on from there is as if it had not ended."""

    @pytest.mark.parametrize("schedule", ["restart", "squeeze", "keep"])
    @pytest.mark.parametrize("saved", ["in on_train_end", "after fit"])
    def test_resume_from_a_file_saved_at_the_end_equals_unbroken_run(self, tmp_path, saved, schedule):
        def pruner():
            return half(every_n_epochs=2, rounds=1, lr_schedule=schedule)

        def fits(pruner, *callbacks, **options):
            module = Scheduled()
            return module, fit(module, pruner, PQIMonitor(stop_on=None), *callbacks, max_epochs=6, **options)

        stop = Watch(on_train_epoch_end=lambda t, m: setattr(t, "should_stop", t.current_epoch == 3))
        keep = Watch(on_train_end=lambda t, m: t.save_checkpoint(tmp_path / "in on_train_end"))
        _, trainer = fits(pruner(), stop, keep)
        trainer.save_checkpoint(tmp_path / "after fit")
        whole, resumed = pruner(), pruner()
        (one, _), (other, _) = fits(whole), fits(resumed, ckpt_path=tmp_path / saved)
        assert same(other.state_dict(), one.state_dict())
        assert same(resumed.masks, whole.masks)
        assert records_of(resumed) == records_of(whole)
        assert [(r.round, r.first_epoch, r.last_epoch) for r in resumed.history] == [(0, 0, 1), (1, 2, 5)]

    def test_resume_after_the_end_saves_the_round_that_goes_on(self, tmp_path):
        def fits(pruner, folder, **options):
            return fit(Net(), pruner, default_root_dir=folder, **options)

        def pruner():
            return half(every_n_epochs=2, rounds=1, save_rounds=True, dirpath=str(tmp_path / "rounds"))

        fits(pruner(), tmp_path).save_checkpoint(tmp_path / "end.ckpt")
        resumed = pruner()
        trainer = fits(resumed, tmp_path, max_epochs=6, ckpt_path=tmp_path / "end.ckpt")
        assert [record.round for record in resumed.history] == [0, 1]
        file = torch.load(resumed.history[1].path, weights_only=True)
        assert same(file["state_dict"], trainer.lightning_module.state_dict())


class TestRunsThatAreOver:
    def test_resume_from_the_last_epoch_records_the_last_round(self, tmp_path):
        def run(**options):
            pruner, saver = (
                half(every_n_epochs=2),
                ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True),
            )
            module = Net()
            fit(module, pruner, saver, max_epochs=6, val=loader(), enable_checkpointing=True, **options)
            return module, pruner

        whole, pruner = run()
        again, resumed = run(ckpt_path=tmp_path / "last.ckpt")
        assert [record.round for record in pruner.history] == [0, 1, 2]
        assert records_of(resumed) == records_of(pruner)
        assert same(resumed.masks, pruner.masks)
        assert same(again.state_dict(), whole.state_dict())

    def test_resume_with_a_longer_last_round_saves_it_at_the_end(self, tmp_path):
        pruner, saver = half(rounds=1, every_n_epochs=2), ModelCheckpoint(tmp_path, save_last=True)
        fit(Net(), pruner, saver, max_epochs=4, enable_checkpointing=True)
        resumed = half(rounds=1, every_n_epochs=2, save_rounds=True)
        trainer = fit(Net(), resumed, max_epochs=6, ckpt_path=tmp_path / "last.ckpt", default_root_dir=tmp_path)
        assert [(r.first_epoch, r.last_epoch) for r in resumed.history] == [(0, 1), (2, 5)]
        saved = torch.load(resumed.history[1].path, weights_only=True)
        assert saved["epoch"] == trainer.current_epoch - 1 == 5
