"""What prunes nothing: fast_dev_run, evaluation, the sanity check, epochs without a step."""

import pytest
from helpers import BATCHES, N, Net, Watch, copied, fit, half, loader, quiet_trainer, same, zeros_of
from lightning.pytorch.callbacks import ModelCheckpoint


class TestWhatPrunesNothing:
    def test_fast_dev_run_prunes_nothing(self):
        module, pruner = Net(), half()
        trainer = fit(module, pruner, val=loader(), fast_dev_run=True)
        assert trainer.global_step == 1
        assert pruner.remaining == 1.0
        assert zeros_of(module) == 0
        assert pruner.current_round() == 0

    def test_fast_dev_run_of_several_batches_keeps_the_masks(self):
        module, pruner = Net(), half()
        fit(module, pruner)
        masks = pruner.masks
        fit(module, pruner, val=loader(), fast_dev_run=BATCHES)
        assert same(pruner.masks, masks)
        assert zeros_of(module) == N * 7 // 8

    def test_fast_dev_run_checks_no_rounds(self):
        pruner = half(rounds=50, every_n_epochs=9, target_remaining=0.1, rewind_weights=40)
        trainer = fit(Net(), pruner, fast_dev_run=2)
        assert trainer.global_step == 2
        assert pruner.remaining == 1.0

    @pytest.mark.parametrize("run", ["validate", "test", "predict"])
    def test_evaluation_changes_neither_weights_nor_masks(self, run, tmp_path):
        module, pruner = Net(), half()
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        trainer = fit(module, pruner, saver, enable_checkpointing=True)
        before, masks = copied(module.state_dict()), pruner.masks
        module.forward = lambda batch: module.net(batch[0])
        getattr(trainer, run)(module, loader())
        assert same(module.state_dict(), before)
        assert same(pruner.masks, masks)
        # an early file: its denser weights are evaluated, and the live masks stay as they are
        getattr(trainer, run)(module, loader(), ckpt_path=str(tmp_path / "epoch=1.ckpt"), weights_only=True)
        assert zeros_of(module) == N // 2
        assert same(pruner.masks, masks)
        assert pruner.current_round() == 3

    @pytest.mark.parametrize("run", ["validate", "test", "predict"])
    def test_evaluation_by_a_callback_that_never_trained_prunes_nothing(self, run):
        module, pruner = Net(), half()
        before = copied(module.state_dict())
        module.forward = lambda batch: module.net(batch[0])
        getattr(quiet_trainer(pruner), run)(module, loader())
        assert pruner.masks == {}
        assert same(module.state_dict(), before)

    def test_sanity_check_prunes_nothing(self):
        module, pruner, seen = Net(), half(), []
        first = copied(module.state_dict())
        look = Watch(on_sanity_check_end=lambda t, m: seen.append(same(m.state_dict(), first)))
        trainer = fit(module, pruner, look, val=loader(), num_sanity_val_steps=2)
        assert seen == [True]
        assert trainer.callback_metrics["sap/round"] == 3

    def test_sanity_check_of_a_second_fit_keeps_weights_and_masks(self):
        module, pruner, seen = Net(), half(rounds=1, every_n_epochs=None), []
        fit(module, pruner, val=loader())
        before, masks = copied(module.state_dict()), pruner.masks
        look = Watch(on_sanity_check_end=lambda t, m: seen.extend([copied(m.state_dict()), pruner.masks]))
        fit(module, pruner, look, val=loader(), num_sanity_val_steps=2)
        assert [same(*pair) for pair in zip(seen, [before, masks], strict=True)] == [True, True]
        assert pruner.remaining == 0.25

    def test_epochs_without_a_step_prune_nothing(self):
        """A round that took no optimizer step is not a round."""
        module, pruner = Net(), half()
        module.on_train_batch_start = lambda batch, index: -1 if module.trainer.current_epoch < 2 else None
        with pytest.warns(UserWarning, match="not all prunings came"):
            trainer = fit(module, pruner)
        assert trainer.global_step == 2 * BATCHES
        assert pruner.current_round() == 1

    def test_epoch_without_a_step_in_a_second_fit_prunes_nothing(self):
        module, pruner = Net(), half(rounds=1, every_n_epochs=None)
        trainer = fit(module, pruner)
        module.on_train_batch_start = lambda batch, index: -1 if trainer.current_epoch == 4 else None
        trainer.fit_loop.max_epochs = 6
        with pytest.warns(UserWarning, match="nothing was pruned.* Give max_epochs=7 or more"):
            trainer.fit(module, loader())
        assert trainer.global_step == 5 * BATCHES
        assert pruner.current_round() == 0
        assert pruner.remaining == 0.5


class TestAFitThatTrainsNothing:
    @pytest.mark.parametrize(
        ("options", "why"),
        [
            ({"limit_train_batches": 0}, "limit_train_batches=0"),
            ({"max_epochs": 0}, "epoch 0 and step 0 are where training is to end"),
            ({"max_epochs": -1, "max_steps": 0}, "epoch 0 and step 0 are where training is to end"),
        ],
    )
    def test_is_warned_of(self, options, why):
        pruner = half(rounds=2, every_n_epochs=1)
        with pytest.warns(UserWarning, match=f"^sap: nothing was pruned, as no batch was trained: {why}\\. Give"):
            fit(Net(), pruner, **options)
        assert pruner.remaining == 1.0

    def test_is_not_warned_of_where_only_masks_are_held(self):
        fit(Net(), half(rounds=0, every_n_epochs=None), limit_train_batches=0)  # a warning would be an error

    def test_is_not_warned_of_where_the_run_was_over(self, tmp_path):
        saver = ModelCheckpoint(tmp_path, save_last=True)
        fit(Net(), half(), saver, enable_checkpointing=True)
        pruner = half()
        fit(Net(), pruner, ckpt_path=tmp_path / "last.ckpt")
        assert pruner.remaining == 1 / 8
