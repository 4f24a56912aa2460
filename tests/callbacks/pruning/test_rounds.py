"""Rounds of a fit: where they begin and end, and what a checkpoint of each holds."""

import pytest
import torch
from helpers import BATCHES, Checked, N, Net, Watch, copied, fit, half, loader, same, survivors
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_sap import FixedFraction, PruningCallback


class TestRounds:
    """Two rounds of pruning, two epochs each, and a third without."""

    @pytest.mark.parametrize("validate", [False, True])
    @pytest.mark.parametrize("rewind", [None, "init"])
    def test_checkpoint_of_a_rounds_last_epoch_holds_its_trained_weights(self, tmp_path, validate, rewind):
        pruner, ends, module = half(every_n_epochs=2, rewind_weights=rewind), [], Net()
        last = Watch(on_train_batch_end=lambda t, m: ends.append((t.current_epoch, copied(m.state_dict()))))
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        fit(module, pruner, last, saver, max_epochs=6, val=loader() if validate else None, enable_checkpointing=True)
        trained = dict(ends)  # the last batch of each epoch
        remaining = {0: 72, 1: 72, 2: 36, 3: 36, 4: 18, 5: 18}
        for epoch, count in remaining.items():
            file = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
            assert same(file["state_dict"], trained[epoch])
            alive = PruningCallback(FixedFraction(0.5))
            alive.load_state_dict(file["callbacks"]["lightning_sap/sap"])
            assert sum(survivors(alive).values()) == count
            for name, mask in alive.masks.items():
                assert torch.equal(file["state_dict"][name] != 0, mask)

    @pytest.mark.parametrize("rewind", [None, "init", 1])
    def test_nothing_is_pruned_after_the_last_epoch(self, rewind):
        counts, module, pruner = [], Net(), half(every_n_epochs=2, rewind_weights=rewind)
        last = Watch(
            on_train_batch_start=lambda t, m: counts.append(sum(survivors(pruner).values())),
            on_train_epoch_end=lambda t, m: ends.append(copied(m.state_dict())),
        )
        ends = []
        fit(module, pruner, last, max_epochs=6)
        assert counts == [72] * (2 * BATCHES) + [36] * (2 * BATCHES) + [18] * (2 * BATCHES)
        assert sum(survivors(pruner).values()) == 18
        assert same(module.state_dict(), ends[-1])

    def test_epochs_left_over_lengthen_the_last_round(self):
        counts, pruner = [], half(rounds=2, every_n_epochs=2)
        fit(
            Net(), pruner, Watch(on_train_epoch_end=lambda t, m: counts.append(sum(survivors(pruner).values()))),
            max_epochs=8,
        )  # fmt: skip
        assert counts == [72, 72, 36, 36, 18, 18, 18, 18]

    def test_rounds_0_only_holds_masks(self):
        module, pruner = Net(), half()
        fit(module, pruner)
        masks = pruner.masks
        holder = half(rounds=0, every_n_epochs=None, keep_zeros=True, reset_optimizer=False)
        checked = Checked(module.net)
        fit(checked, holder)
        assert same(holder.masks, masks)
        assert checked.steps == [(True, N * 7 // 8)] * (4 * BATCHES)
        assert [record.pruned for record in holder.history] == [None]

    def test_run_without_an_end_prunes_until_it_stops(self):
        pruner = half(every_n_epochs=1)
        fit(Net(), pruner, max_epochs=-1, max_steps=4 * BATCHES)
        assert sum(survivors(pruner).values()) == 9


def test_steps_that_lightning_does_not_count_are_counted():
    class Uncounted(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    pruner = half()
    trainer = fit(Uncounted(), pruner)
    assert trainer.global_step == 0
    assert [record.remaining for record in pruner.history] == [1.0, 0.5, 0.25, 0.125]
