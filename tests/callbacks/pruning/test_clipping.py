"""Gradients are clipped by the norm of the kept weights alone."""

from types import SimpleNamespace

import pytest
import torch
from helpers import Net, fit, half, loader
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import SGD

from lightning_sap.callbacks.pruning import checks


class OneLayer(Net):
    """Its gradient is (3, 4, 12) in every step: the loss is the scalar product of the weights with that."""

    slope = torch.tensor([[3.0, 4.0, 12.0]])

    def __init__(self, optimizer=lambda p: SGD(p, lr=1.0)):
        super().__init__(nn.Linear(3, 1, bias=False), optimizer)
        with torch.no_grad():
            self.net.weight.copy_(torch.tensor([[60.0, 50.0, 1.0]]))  # the last is the smallest: it goes
        self.seen = []

    def loss(self, batch):
        return (self.net.weight * self.slope).sum() + 0 * batch[0].sum()

    def optimizer_step(self, *arguments, **options):
        before = self.net.weight.detach().clone()
        super().optimizer_step(*arguments, **options)
        self.seen.append((before - self.net.weight.detach()).flatten().tolist())


class OneLayerByHand(OneLayer):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        before = self.net.weight.detach().clone()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, 2.5, "norm")
        optimizer.step()
        self.seen.append((before - self.net.weight.detach()).flatten().tolist())


class ClipsByItself(OneLayer):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, 2.5, "norm")


class ClipsBeforeTheStep(OneLayer):
    def on_before_optimizer_step(self, optimizer):
        nn.utils.clip_grad_norm_(self.parameters(), 2.5)


class ClipsAfterTheBackward(OneLayer):
    def on_after_backward(self):
        nn.utils.clip_grad_norm_(self.parameters(), 2.5)


class TestClipping:
    """The gradient (3, 4, 12) has norm 13; without the pruned weight, (3, 4, 0) has norm 5."""

    @pytest.mark.parametrize(
        ("build", "options"),
        [
            (OneLayer, {"gradient_clip_val": 2.5}),
            *[(build, {}) for build in (OneLayerByHand, ClipsByItself, ClipsBeforeTheStep, ClipsAfterTheBackward)],
        ],
        ids=["by the Trainer", "by hand", "by the module's hook", "before the step", "after the backward"],
    )
    def test_clipping_by_norm_leaves_pruned_weights_out_of_the_norm(self, build, options):
        module = build()
        fit(module, half(rounds=1), max_epochs=2, train=loader(8), **options)
        whole = [2.5 * g / 13 for g in (3, 4, 12)]
        assert module.seen == [pytest.approx(whole, rel=1e-5), pytest.approx([1.5, 2.0, 0.0], rel=1e-5)]

    def test_clipping_by_value_leaves_pruned_weights_at_zero(self):
        module = OneLayer()
        options = {"gradient_clip_val": 3.5, "gradient_clip_algorithm": "value"}
        fit(module, half(rounds=1), max_epochs=2, train=loader(8), **options)
        assert module.seen == [pytest.approx([3.0, 3.5, 3.5]), pytest.approx([3.0, 3.5, 0.0])]

    def test_clipping_of_accumulated_gradients_leaves_pruned_weights_out(self):
        module = OneLayer()
        options = {"gradient_clip_val": 2.5, "accumulate_grad_batches": 2}
        fit(module, half(rounds=1), max_epochs=2, train=loader(16), **options)
        moved = [step for step in module.seen if any(step)]
        whole = [2.5 * g / 13 for g in (3, 4, 12)]
        assert moved == [pytest.approx(whole, rel=1e-5), pytest.approx([1.5, 2.0, 0.0], rel=1e-5)]


class TestClipsGradients:
    def test_gradient_clipping_of_trainer_and_module_is_seen(self):
        class Own(LightningModule):
            def configure_gradient_clipping(self, *arguments, **options):
                pass

        with_value, without = SimpleNamespace(gradient_clip_val=0.5), SimpleNamespace(gradient_clip_val=None)
        assert checks.clips_gradients(with_value, Net())
        assert checks.clips_gradients(without, Own())
        assert not checks.clips_gradients(without, Net())
