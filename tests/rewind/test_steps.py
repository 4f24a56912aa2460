"""Steps counted once, whoever takes them; gradients changed before each."""

import pytest
import torch
from optimizers import REAL, slow_later, take_step
from pytorch_optimizer import SAM
from torch import nn
from torch.optim import LBFGS, SGD, Adam

from lightning_sap.rewind import base_optimizers, fires_hooks, hook_gradients, hook_steps, innermost_optimizers


def layer():
    return nn.Linear(4, 2, bias=False)


def loss_of(network):
    return lambda: (network(torch.ones(3, 4)) - 1).square().mean()


@pytest.mark.parametrize("name", REAL)
def test_each_real_step_counts_once(name):
    network, steps = layer(), []
    optimizer = REAL[name](list(network.parameters()))
    handles = hook_steps([optimizer], steps.append)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(5):
        take_step(optimizer, loss_of(network))
    assert steps == innermost_optimizers([optimizer]) * 5
    for handle in handles:
        handle.remove()
    take_step(optimizer, loss_of(network))
    assert len(steps) == 5


def test_a_step_with_a_closure_of_sharpness_aware_minimization_counts_once():
    network, steps, evaluations = layer(), [], []
    optimizer = SAM(network.parameters(), SGD, lr=0.1)
    hook_steps([optimizer], steps.append)

    def closure():
        evaluations.append(1)
        optimizer.zero_grad()
        loss = loss_of(network)()
        loss.backward()
        return loss

    closure()
    optimizer.step(closure)
    assert steps == [optimizer.base_optimizer]
    assert len(evaluations) == 2


def test_several_evaluations_of_the_closure_are_one_step():
    network, steps, evaluations = layer(), [], []
    optimizer = LBFGS(network.parameters(), lr=0.1, max_iter=5)
    hook_steps([optimizer], steps.append)

    def loss():
        evaluations.append(1)
        return loss_of(network)()

    take_step(optimizer, loss)
    assert len(evaluations) > 2
    assert steps == [optimizer]


def test_two_optimizers_take_two_steps():
    first, second, steps = SGD(layer().parameters(), lr=0.1), Adam(layer().parameters()), []
    hook_steps([first, second], steps.append)
    second.step()
    first.step()
    assert steps == [second, first]


def test_a_step_within_a_step_counts_once():
    class Constrained(SGD):
        def step(self, closure=None):
            return super().step(closure)

    optimizer, steps = Constrained(layer().parameters(), lr=0.1), []
    SGD(layer().parameters(), lr=0.1)  # from now on SGD.step, too, fires hooks
    hook_steps([optimizer], steps.append)
    optimizer.step()
    optimizer.step()
    assert steps == [optimizer, optimizer]


@pytest.mark.parametrize("fused", [True, False])
def test_steps_that_a_gradient_scaler_skips_do_not_count(fused):
    network, steps = layer(), []
    optimizer, scaler = SGD(network.parameters(), lr=0.1, fused=fused), torch.amp.GradScaler("cpu", init_scale=4.0)
    hook_steps([optimizer], steps.append)
    before = network.weight.detach().clone()
    for factor, expected in ((1.0, 1), (float("inf"), 1), (1.0, 2)):
        optimizer.zero_grad()
        scaler.scale(loss_of(network)() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert len(steps) == expected
    assert network.weight.isfinite().all()
    assert not torch.equal(network.weight, before)


def test_an_optimizer_that_skips_its_constructor_is_known_not_to_fire():
    class Skips(SGD):
        def __init__(self, inner):
            self.inner = inner
            self.param_groups, self.defaults, self.state = inner.param_groups, inner.defaults, inner.state

        def step(self, closure=None):
            return self.inner.step(closure)

    network, steps = layer(), []
    optimizer = Skips(Adam(network.parameters()))
    assert [fires_hooks(each) for each in base_optimizers(optimizer)] == [False, True]
    assert not fires_hooks(object())
    optimizer.inner._optimizer_step_post_hooks = {}  # as older wrappers have it, and which cannot hold a hook
    assert not fires_hooks(optimizer.inner)
    optimizer = Skips(Adam(network.parameters()))
    hook_steps([optimizer], steps.append)
    optimizer.step()
    assert steps == [optimizer.inner]


def test_timms_lookahead_fires_with_its_first_step():
    network, steps = layer(), []
    optimizer = slow_later(network.parameters())
    hook_steps([optimizer], steps.append)
    loss_of(network)().backward()
    optimizer.step()
    assert steps == [base_optimizers(optimizer)[1]]


@pytest.mark.parametrize("keyword", [True, False])
@pytest.mark.parametrize("with_closure", [True, False])
def test_gradients_are_changed_before_the_step_uses_them(with_closure, keyword):
    network = layer()
    optimizer = SGD(network.parameters(), lr=1.0)

    def zero_first():
        network.weight.grad[0] = 0

    def closure():
        optimizer.zero_grad()
        loss = loss_of(network)()
        loss.backward()
        return loss

    hook_gradients([optimizer], zero_first)
    before = network.weight.detach().clone()
    if not with_closure:
        closure()
        optimizer.step()
    else:
        loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        assert loss > 0
    assert torch.equal(network.weight[0], before[0])
    assert (network.weight[1] != before[1]).all()


def test_every_evaluation_of_a_closure_gives_changed_gradients():
    """With one gradient unmasked, the directions of LBFGS would move what is masked."""
    network = layer()
    optimizer = LBFGS(network.parameters(), lr=0.5, max_iter=6)

    def zero_first():
        network.weight.grad[0] = 0

    hook_gradients([optimizer], zero_first)
    before = network.weight.detach().clone()
    take_step(optimizer, loss_of(network))
    assert torch.equal(network.weight[0], before[0])
    assert (network.weight[1] != before[1]).all()


def test_hooks_that_are_removed_change_nothing():
    network = layer()
    optimizer = SGD(network.parameters(), lr=1.0)
    for handle in hook_gradients([optimizer], optimizer.zero_grad):
        handle.remove()
    before = network.weight.detach().clone()
    take_step(optimizer, loss_of(network))
    assert (network.weight != before).all()
