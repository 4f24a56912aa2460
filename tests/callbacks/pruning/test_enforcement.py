"""Masks are enforced: pruned weights are zero after every optimizer step and in every hook."""

from functools import partial

import pytest
import torch
from helpers import (
    BATCHES,
    OPTIMIZERS,
    Checked,
    Crash,
    N,
    Net,
    Watch,
    all_masked_are_zero,
    crash_in,
    fit,
    half,
    loader,
    quiet_trainer,
    seeded,
    survivors,
    zeros_of,
)
from lightning.pytorch import LightningModule
from torch import nn

from lightning_sap.callbacks.pruning.session import PruningSession


class Manual(Checked):
    """Two optimizers, of which the second steps first; it clips by itself."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.manual_backward(loss)
        for optimizer in reversed(self.optimizers()):
            self.clip_gradients(optimizer, 0.5, "norm")
            optimizer.step()
            self.look()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return self.optimizer(self.net[0].parameters()), self.optimizer(self.net[1:].parameters())


class SparseRows(LightningModule):
    """An embedding of whose gradient only the rows of the batch exist."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.rows, self.gradients = seeded(lambda: nn.Embedding(8, 5, sparse=True)), []

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        rows = torch.tensor([batch_idx % 8, 3, 3])
        self.manual_backward((self.rows(rows) - 1).square().sum())
        self.gradients.append(self.rows.weight.grad.clone())
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TestEnforcement:
    @pytest.mark.parametrize("reset_optimizer", [True, False])
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"accumulate_grad_batches": 2},
            {"gradient_clip_val": 0.1},
            {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        ],
        ids=["plain", "accumulation", "clipped norm", "clipped values"],
    )
    def test_masked_weights_are_zero_after_every_step(self, optimizer, options, reset_optimizer):
        module = Checked(optimizer=OPTIMIZERS[optimizer])
        trainer = fit(module, half(reset_optimizer=reset_optimizer), **options)
        per_epoch = 2 if "accumulate_grad_batches" in options else BATCHES
        assert trainer.global_step == 4 * per_epoch
        # after three prunings by half of 48 and 24 weights, 6 and 3 remain
        zeros = [gone for gone in (0, N // 2, N * 3 // 4, N * 7 // 8) for _ in range(per_epoch)]
        assert module.steps == [(True, gone) for gone in zeros]
        assert zeros_of(module) == N * 7 // 8

    @pytest.mark.parametrize("reset_optimizer", [True, False])
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_masked_weights_are_zero_under_manual_optimization_with_two_optimizers(self, optimizer, reset_optimizer):
        module = Manual(optimizer=OPTIMIZERS[optimizer])
        fit(module, half(reset_optimizer=reset_optimizer))
        zeros = [gone for gone in (0, N // 2, N * 3 // 4, N * 7 // 8) for _ in range(2 * BATCHES)]
        assert module.steps == [(True, gone) for gone in zeros]

    def test_masked_weights_are_zero_in_an_embedding_with_sparse_gradients(self):
        module = SparseRows()
        pruner = half(include="rows.weight", scope="global")
        fit(module, pruner)
        mask = pruner.masks["rows.weight"]
        assert int(mask.sum()) == 5  # of 40, halved three times
        assert module.gradients[-1].is_sparse
        assert not module.gradients[-1].to_dense()[~mask].any()
        assert module.gradients[-1].to_dense()[mask].any()
        assert not module.rows.weight[~mask].any()

    def test_momentum_moves_pruned_weights_without_the_hooks(self, monkeypatch):
        """Without what the callback does at each step the same run moves pruned weights: the tests above can fail."""
        for name in ("enforce", "mask_gradients", "zero_kept_"):
            monkeypatch.setattr(PruningSession, name, lambda *_: None)
        module, pruner = Checked(), half(reset_optimizer=False)
        fit(module, pruner)
        assert [clean for clean, _ in module.steps] == [True] * BATCHES + [False] * (3 * BATCHES)

    def test_every_callback_sees_weights_masked_wherever_it_stands(self):
        seen = []
        watch = {
            hook: lambda trainer, module: seen.append(all_masked_are_zero(trainer, module))
            for hook in ("on_before_zero_grad", "on_train_batch_start", "on_train_batch_end", "on_train_epoch_end")
        }
        fit(Net(), Watch(**watch), half(reset_optimizer=False), Watch(**watch), val=loader())
        assert seen == [True] * len(seen)
        assert len(seen) > 4 * 2 * (3 * BATCHES)

    def test_optimizer_state_is_reset_at_each_pruning_only_if_asked(self):
        for reset in (True, False):
            sizes = []
            watch = Watch(on_train_batch_start=lambda t, m, sizes=sizes: sizes.append(len(t.optimizers[0].state)))
            fit(Net(), half(reset_optimizer=reset, every_n_epochs=2), watch)
            tensors = 6  # weight and bias of two linear layers and of one BatchNorm
            second = [0, tensors, tensors] if reset else [tensors] * BATCHES
            assert sizes == [0] + [tensors] * (2 * BATCHES - 1) + second + [tensors] * BATCHES

    def test_optimizer_state_from_before_the_first_step_is_back_after_a_reset(self):
        """Adagrad's is made with the optimizer, and older ones of PyTorch fail without it."""
        seen = []

        def look(trainer, module):
            state = trainer.optimizers[0].state[module.net[0].weight]
            seen.append((float(state["step"]), float(state["sum"].sum())))

        optimizer = partial(OPTIMIZERS["Adagrad"], initial_accumulator_value=0.5)
        fit(Net(optimizer=optimizer), half(), Watch(on_train_batch_start=look))
        assert seen[::BATCHES] == [(0, 24), (0, 12), (0, 6), (0, 3)]  # a half for each weight that is kept
        assert all(
            step > 0 and total > kept
            for (step, total), (_, kept) in zip(seen[1::BATCHES], seen[::BATCHES], strict=True)
        )

    @pytest.mark.parametrize("order", [1, -1])
    def test_masks_hold_after_another_callback_wrote_weights_in_on_train_end(self, tmp_path, order):
        module, pruner = Net(), half()
        write = Watch(on_train_end=lambda t, m: [nn.init.ones_(parameter) for parameter in m.parameters()])
        trainer = fit(module, *[pruner, write][::order])
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        assert survivors(pruner) == {"net.0.weight": 6, "net.3.weight": 3}
        for state in (module.state_dict(), torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]):
            for name, mask in pruner.masks.items():
                assert torch.equal(state[name], mask.float())  # one where it is kept, zero where it is pruned
            assert torch.equal(state["net.3.bias"], torch.ones(3))

    def test_optimizer_hooks_are_removed_after_fit_and_after_a_crash(self):
        for failing in (False, True):
            module, pruner = Net(), half()
            trainer = quiet_trainer(pruner, crash_in("on_train_epoch_end", 2) if failing else Watch())
            if failing:
                with pytest.raises(Crash):
                    trainer.fit(module, loader())
            else:
                trainer.fit(module, loader())
            optimizer = module.optimizers(use_pl_optimizer=False)
            assert not optimizer._optimizer_step_post_hooks
            with torch.no_grad():
                module.net[0].weight.fill_(1.0)
            optimizer.step()
            assert module.net[0].weight.count_nonzero() == 48  # nothing masks them any more
