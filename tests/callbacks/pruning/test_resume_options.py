"""Options and selection that changed since the checkpoint: what applies, what is kept and what is refused."""

import logging
import re

import pytest
import torch
from helpers import BATCHES, Net, Scheduled, Watch, copied, fit, half, same, survivors
from resuming import STATE, run_saving_epochs
from torch import nn

from lightning_sap import FixedFraction, PQIMonitor, PruningCallback


class TestChangedOptions:
    def test_resume_with_another_amount_applies_it_from_the_next_round(self, tmp_path, caplog):
        run_saving_epochs(Net, half, tmp_path, max_epochs=4)
        pruner = PruningCallback(FixedFraction(0.75), every_n_epochs=1, min_remaining=0.1)
        with caplog.at_level(logging.INFO):
            fit(Net(), pruner, ckpt_path=tmp_path / "epoch=1.ckpt")
        assert (
            "sap: changed since the checkpoint, from the next round on: policy=FixedFraction(fraction=0.75) "
            "(was FixedFraction(fraction=0.5)), min_remaining=0.1 (was 0.0)" in caplog.messages
        )
        # 24 and 12 survived the file's one pruning; then 18 of 24 would go, but 5 stay; 9 of 12, and 3 stay
        assert survivors(pruner) == {"net.0.weight": 5, "net.3.weight": 3}

    def test_resume_keeps_the_plan_and_logs_that(self, tmp_path, caplog):
        run_saving_epochs(Net, half, tmp_path, max_epochs=4)
        pruner = half(rounds=1, every_n_epochs=2)
        with caplog.at_level(logging.INFO):
            fit(Net(), pruner, ckpt_path=tmp_path / "epoch=1.ckpt")
        assert "sap: a run that is resumed keeps the checkpoint's rounds=None (not 1), every_n_epochs=1 (not 2)" in (
            caplog.messages
        )
        assert [record.round for record in pruner.history] == [0, 1, 2, 3]

    @pytest.mark.parametrize(
        ("old", "new", "epoch", "message"),
        [
            (
                {},
                {"rewind_weights": "init"},
                0,
                "after 0 epochs, and the checkpoint was saved with rewind_weights=None.",
            ),
            ({}, {"rewind_weights": 1}, 2, "after 1 epochs, and the checkpoint was saved with rewind_weights=None."),
            ({"rewind_weights": 1}, {"rewind_weights": "init"}, 2, "after 0 epochs, and the checkpoint was saved with"),
            (
                {},
                {"lr_schedule": "restart"},
                2,
                "lr_schedule='restart' cannot take the place of 'squeeze' in the middle",
            ),
            ({}, {"rewind_weights": 3}, 0, "rewind_weights=3 lies beyond the first round, which has 2 epochs"),
            ({}, {"target_remaining": 0.9}, 2, "that is 65 of 72 weights, and only 36 survive already."),
            ({}, {"target_remaining": 0.1}, 4, "that is 7 of 72 weights, and there are no prunings left."),
        ],
    )
    def test_resume_refuses_options_that_cannot_change(self, tmp_path, old, new, epoch, message):
        run_saving_epochs(Scheduled, lambda: half(every_n_epochs=2, **old), tmp_path)
        steps = []
        look = Watch(on_train_batch_start=lambda t, m: steps.append(t.global_step))
        file = tmp_path / f"epoch={epoch}.ckpt"
        with pytest.raises(ValueError, match=re.escape(message)):
            fit(Scheduled(), half(every_n_epochs=2, **new), look, ckpt_path=file, max_epochs=6)
        assert steps == []

    @pytest.mark.parametrize(
        ("old", "new"), [({"rewind_weights": "init"}, {"rewind_weights": 0}), ({}, {"lr_schedule": "squeeze"})]
    )
    def test_resume_with_other_words_for_the_same_changes_nothing(self, tmp_path, old, new):
        whole, *_ = run_saving_epochs(Scheduled, lambda: half(every_n_epochs=2, **old), tmp_path)
        module, resumed = Scheduled(), half(every_n_epochs=2, **new)
        fit(module, resumed, PQIMonitor(stop_on=None), ckpt_path=tmp_path / "epoch=2.ckpt", max_epochs=6)
        assert same(module.state_dict(), whole.state_dict())

    def test_resume_under_auto_keeps_the_chosen_schedule(self, tmp_path, caplog):
        """However long training is now: in mid-run the schedule must not change its course."""
        run_saving_epochs(Scheduled, lambda: half(every_n_epochs=2), tmp_path)
        file = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)
        (schedule,) = file["callbacks"][STATE]["schedules"]
        assert schedule["mode"] == "squeeze"
        schedule["mode"] = "restart"
        torch.save(file, tmp_path / "other.ckpt")
        with caplog.at_level(logging.INFO):
            fit(Scheduled(), half(every_n_epochs=2), ckpt_path=tmp_path / "other.ckpt", max_epochs=6)
        assert "CosineAnnealingLR: restart (as before the checkpoint)" in caplog.text

    def test_resume_without_rewinding_rewinds_no_more(self, tmp_path):
        run_saving_epochs(Net, lambda: half(every_n_epochs=2, rewind_weights="init"), tmp_path)
        pruner, states = half(every_n_epochs=2), []
        keep = Watch(
            on_train_epoch_end=lambda t, m: states.append(copied(m.state_dict())),
            on_train_batch_start=lambda t, m: states.append(copied(m.state_dict())),
        )
        module = Net()
        fit(module, pruner, keep, ckpt_path=tmp_path / "epoch=2.ckpt", max_epochs=6)
        end, start = states[BATCHES], states[BATCHES + 1]  # of the epoch before the pruning, and after it
        assert torch.equal(start["net.0.bias"], end["net.0.bias"])

    def test_resume_with_unchanged_options_logs_nothing(self, tmp_path, caplog):
        run_saving_epochs(Net, half, tmp_path, max_epochs=4)
        with caplog.at_level(logging.INFO):
            fit(Net(), half(), ckpt_path=tmp_path / "epoch=1.ckpt")
        assert "changed since" not in caplog.text


class TestSelectionOnResume:
    @pytest.fixture
    def file(self, tmp_path):
        run_saving_epochs(Net, half, tmp_path, max_epochs=3)
        return tmp_path / "epoch=1.ckpt"

    def refused(self, file, module, pruner, message):
        steps = []
        look = Watch(on_train_batch_start=lambda t, m: steps.append(t.global_step))
        with pytest.raises(ValueError, match=re.escape(message)):
            fit(module, pruner, look, ckpt_path=file)
        assert steps == []

    def test_resume_refuses_masks_of_weights_no_longer_selected(self, file):
        message = "missing [], surplus ['net.0.weight'], of another shape []. Give the same model, `include` and"
        self.refused(file, Net(), half(exclude="net.0.*"), message)

    def test_resume_refuses_selected_weights_without_masks(self, file):
        message = "missing ['net.3.bias'], surplus [], of another shape []"
        module = Net()
        module.net[3].bias = nn.Parameter(torch.ones(3, 1))
        module.on_load_checkpoint = lambda checkpoint: checkpoint["state_dict"].update({"net.3.bias": torch.ones(3, 1)})
        self.refused(file, module, half(include=["*weight", "*bias"], exclude=nn.BatchNorm1d), message)

    def test_resume_refuses_masks_of_another_shape(self, file):
        module = Net(nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3)))
        module.on_load_checkpoint = lambda checkpoint: checkpoint.update(state_dict=module.state_dict())
        message = "of another shape ['net.0.weight (8, 6) instead of (9, 6)', 'net.3.weight (3, 8) instead of (3, 9)']"
        self.refused(file, module, half(), message)

    def test_failed_resume_leaves_nothing_behind(self, file):
        pruner = half(exclude="net.0.*")
        self.refused(file, Net(), pruner, "surplus ['net.0.weight']")
        fit(Net(), pruner)
        assert survivors(pruner) == {"net.3.weight": 3}
        assert [record.round for record in pruner.history] == [0, 1, 2, 3]
