"""Gradients that the module writes by hand are zero where weights are pruned, before anyone takes a norm of them."""

import copy
import pickle

import pytest
import torch
from callbacks.pruning.test_clipping import OneLayer
from helpers import Watch, crash, fit, half, loader
from torch import nn

WHOLE = pytest.approx([2.5 * g / 13 for g in (3, 4, 12)], rel=1e-5)
KEPT = pytest.approx([1.5, 2.0, 0.0], rel=1e-5)  # (3, 4, 0) has norm 5


class ByHand(OneLayer):
    """The gradient (3, 4, 12), clipped to a norm of 2.5; the last weight goes."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def write(self, batch):
        (self.net.weight.grad,) = torch.autograd.grad(self.loss(batch), [self.net.weight])

    def training_step(self, batch, batch_idx):
        optimizer, before = self.optimizers(), self.net.weight.detach().clone()
        optimizer.zero_grad()
        self.write(batch)
        self.clip_gradients(optimizer, 2.5, "norm")
        optimizer.step()
        self.seen.append((before - self.net.weight.detach()).flatten().tolist())


class Projected(ByHand):
    """PCGrad: of two losses each gradient loses its part against the other; the sum is (3, 4, 12) where all is kept."""

    def write(self, batch):
        one, other = (self.net.weight * torch.tensor([[3.0, 4.0, 0.0]])).sum(), (self.net.weight * 12)[0, 2]
        grads = [torch.autograd.grad(loss, self.net.weight, retain_graph=True)[0] for loss in (one, other)]
        parts = []
        for mine, against in (grads, grads[::-1]):
            dot, size = (mine * against).sum(), against.square().sum()
            parts.append(mine - dot.clamp(max=0) / size.clamp(min=1e-9) * against)
        self.net.weight.grad = sum(parts)


class Functional(ByHand):
    """By ``torch.func``, which knows a copy of the weight and not the weight."""

    def write(self, batch):
        self.net.weight.grad = torch.func.grad(lambda weight: (weight * self.slope).sum())(self.net.weight.detach())


class OfItsOwnBackward(OneLayer):
    def backward(self, loss):
        self.net.weight.grad = torch.autograd.grad(loss, self.net.weight)[0]
        nn.utils.clip_grad_norm_(self.parameters(), 2.5)


class WrittenBeforeTheStep(OneLayer):
    """After the callbacks had their turn; then the Trainer clips."""

    def on_before_optimizer_step(self, optimizer):
        (self.net.weight.grad,) = torch.autograd.grad((self.net.weight * self.slope).sum(), self.net.weight)


@pytest.mark.parametrize(
    ("build", "options"),
    [(ByHand, {}), (Projected, {}), (OfItsOwnBackward, {}), (WrittenBeforeTheStep, {"gradient_clip_val": 2.5})],
)
def test_written_gradients_are_clipped_by_the_norm_of_the_kept_weights(build, options):
    module = build()
    fit(module, half(rounds=1), max_epochs=2, train=loader(8), **options)
    assert module.seen == [WHOLE, KEPT]


def test_gradients_past_autograd_are_zero_at_the_step_and_said_once_in_a_round():
    module = Functional()
    with pytest.warns(
        UserWarning, match=r"^sap: the gradients of these were written by hand, .*: net\.weight\."
    ) as said:
        fit(module, half(rounds=1), max_epochs=3, train=loader(8))
    assert sum("written by hand" in str(each.message) for each in said) == 1
    clipped = pytest.approx([2.5 * g / 13 for g in (3, 4, 0)], rel=1e-5)  # by the norm of all
    assert module.seen == [WHOLE, clipped, clipped]


def test_gradients_with_a_graph_flow_through_what_is_kept():
    """A penalty on the gradient of a weight, as in meta-learning: its own gradient is that of the kept weights."""

    class Penalised(ByHand):
        def write(self, batch):
            (gradient,) = torch.autograd.grad(self.net.weight.pow(3).sum() / 3, self.net.weight, create_graph=True)
            (self.net.weight.grad,) = torch.autograd.grad(gradient.sum(), self.net.weight)  # 2 w

    module, pruner = Penalised(), half(rounds=1)
    fit(module, pruner, max_epochs=2, train=loader(8))
    before = module.net.weight.detach().flatten() + torch.tensor(module.seen[1])
    unit = before / before.norm()
    assert module.seen[1] == pytest.approx([*(2.5 * unit[:2]).tolist(), 0.0], rel=1e-4)


class TestAfterTraining:
    def gradient(self, module):
        return torch.autograd.grad((module.net.weight * module.slope).sum(), module.net.weight)[0].tolist()

    @pytest.mark.parametrize("ends", ["well", "badly"])
    def test_gradients_are_left_alone_when_training_is_over(self, ends):
        module, pruner = ByHand(), half(rounds=1)
        crashing = Watch(on_train_epoch_end=lambda t, m: crash() if t.current_epoch == 1 and ends == "badly" else None)
        try:
            fit(module, pruner, crashing, max_epochs=3, train=loader(8))
        except Exception:
            assert ends == "badly"
        assert pruner.masks["net.weight"].tolist() == [[True, True, False]]
        assert self.gradient(module) == [[3.0, 4.0, 12.0]]

    def test_copies_and_pickles_of_a_module_in_training_take_no_hooks_along(self):
        module, found = ByHand(), []

        def look(trainer, module):
            for net in (copy.deepcopy(module.net), pickle.loads(pickle.dumps(module.net))):
                found.append(torch.autograd.grad((net.weight * module.slope).sum(), net.weight)[0].tolist())

        fit(module, half(rounds=1), Watch(on_train_epoch_end=look), max_epochs=2, train=loader(8))
        assert found == [[[3.0, 4.0, 12.0]]] * 4
