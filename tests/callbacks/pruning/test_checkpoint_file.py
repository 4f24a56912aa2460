"""What PruningCallback stores in a checkpoint, and what loading it does."""

import zipfile

import pytest
import torch
from helpers import Net, Scheduled, Watch, all_masked_are_zero, copied, fit, half, is_masked, loader, parameters, same
from resuming import STATE, STATE_KEYS, run_saving_epochs
from torch import nn


class TestRestoredInTraining:
    @pytest.mark.filterwarnings("ignore:sap. not all prunings came")
    def test_state_loaded_in_training_gives_masks_and_history_at_once(self, tmp_path):
        """As a callback does that goes back to an earlier file while it trains."""
        module, pruner, seen = Net(), half(), []

        def go_back(trainer, module):
            if trainer.current_epoch == 2 and not seen:
                saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
                module.load_state_dict(saved["state_dict"])
                pruner.load_state_dict(saved["callbacks"][STATE])
                seen.append((pruner.remaining, len(pruner.history), all_masked_are_zero(trainer, module)))

        def save(trainer, module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "one.ckpt")

        fit(module, pruner, Watch(on_train_epoch_end=save, on_train_batch_end=go_back), max_epochs=5)
        assert seen == [(0.5, 1, True)]
        assert [record.round for record in pruner.history] == [0, 1, 2, 3]
        assert pruner.remaining == 0.125
        assert sum(int(mask.sum()) for mask in pruner.masks.values()) == 9
        assert is_masked(parameters(module), pruner.masks)


class TestFile:
    def test_checkpoint_loads_with_weights_only_and_holds_these_keys(self, tmp_path):
        run_saving_epochs(Scheduled, lambda: half(rewind_weights="init"), tmp_path, validate=True)
        file = torch.load(tmp_path / "epoch=4.ckpt", weights_only=True)
        state = file["callbacks"][STATE]
        assert set(state) == STATE_KEYS
        assert state["round"] == 4
        plan = {"rounds": 5, "length": 1, "first": 0, "end": 6, "unit": "epoch", "schedules_from": 0, "dense": None}
        assert state["plan"] == plan
        assert same(state["first_weights"], copied(Net().state_dict()))
        assert [record["remaining"] for record in state["history"]] == [1.0, 0.5, 0.25, 0.125]
        assert {type(key) for key in state} == {str}

    def test_checkpoint_holds_no_first_weights_after_the_last_pruning(self, tmp_path):
        run_saving_epochs(Net, lambda: half(rewind_weights="init"), tmp_path)
        state = torch.load(tmp_path / "epoch=5.ckpt", weights_only=True)["callbacks"][STATE]
        assert state["round"] == 5
        assert state["first_weights"] is None

    def test_checkpoint_holds_no_first_weights_without_rewinding(self, tmp_path):
        run_saving_epochs(Net, half, tmp_path)
        file = torch.load(tmp_path / "epoch=5.ckpt", weights_only=True)
        assert file["callbacks"][STATE]["first_weights"] is None

    def test_checkpoint_masks_take_one_bit_per_weight(self, tmp_path):
        module = Net(nn.Sequential(nn.Linear(6, 101, bias=False), nn.Linear(101, 3, bias=False)))
        pruner = half()
        trainer = fit(module, pruner, max_epochs=2)
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        masks = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"][STATE]["masks"]
        for name, size in {"net.0.weight": 606, "net.1.weight": 303}.items():
            bits = masks[name]["bits"]
            assert (bits.dtype, bits.numel()) == (torch.uint8, -(-size // 8))
            assert bits.untyped_storage().nbytes() == -(-size // 8)
            assert masks[name]["shape"] == list(module.state_dict()[name].shape)

    def test_checkpoint_is_hardly_larger_than_a_dense_one(self, tmp_path):
        sizes = []
        for pruner in ([], [half()]):
            module = Net(nn.Sequential(nn.Linear(6, 4000, bias=False), nn.Linear(4000, 3, bias=False)))
            trainer = fit(module, *pruner, max_epochs=2, train=loader(8))
            trainer.save_checkpoint(tmp_path / "end.ckpt")
            with zipfile.ZipFile(tmp_path / "end.ckpt") as file:
                sizes.append(sum(entry.file_size for entry in file.infolist()))
        assert sizes[1] - sizes[0] < 36000 / 8 + 4000  # a bit per weight, and what is not masks

    def test_checkpoint_state_loads_outside_a_trainer(self, tmp_path):
        _, pruner, *_ = run_saving_epochs(Net, half, tmp_path)
        file = torch.load(tmp_path / "epoch=5.ckpt", weights_only=True)
        fresh = half()
        fresh.load_state_dict(file["callbacks"][STATE])
        assert same(fresh.masks, pruner.masks)
        assert fresh.remaining == pruner.remaining == 3 / 72
        assert [record.round for record in fresh.history] == [0, 1, 2, 3, 4]

    def test_saving_a_checkpoint_changes_nothing(self, tmp_path):
        module, pruner = Net(), half(rewind_weights="init")
        trainer = fit(module, pruner)
        before, masks = copied(module.state_dict()), pruner.masks
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        trainer.save_checkpoint(tmp_path / "b.ckpt")
        assert same(module.state_dict(), before)
        assert same(pruner.masks, masks)
