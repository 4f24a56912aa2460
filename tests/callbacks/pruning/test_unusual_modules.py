"""Modules and optimizers out of the ordinary."""

import re

import pytest
import torch
from helpers import (
    BATCHES,
    OPTIMIZERS,
    N,
    Net,
    Watch,
    all_masked_are_zero,
    fit,
    half,
    loader,
    mlp,
    same,
    seeded,
    survivors,
    zeros_of,
)
from torch import nn

from lightning_sap import FixedFraction, PQIMonitor, Pruner


class WithCausalMask(Net):
    """A user's buffer whose name looks like a pruning mask."""

    def __init__(self):
        super().__init__()
        self.register_buffer("causal_mask", torch.tril(torch.ones(6, 6)))

    def loss(self, batch):
        return (self.net(batch[0] @ self.causal_mask) - batch[1]).square().mean()


def test_buffer_named_like_a_mask_is_left_alone(tmp_path):
    module, pruner = WithCausalMask(), half(rewind_weights="init")
    trainer = fit(module, pruner)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    fresh = WithCausalMask()
    fresh.load_state_dict(torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"], strict=True)
    assert same(fresh.state_dict(), module.state_dict())
    assert torch.equal(fresh.causal_mask, torch.tril(torch.ones(6, 6)))
    assert zeros_of(fresh) == N * 7 // 8


def test_a_compiled_module_goes_by_the_same_names():
    module = Net(torch.compile(seeded(mlp), backend="eager"))
    seen = []
    module.loss = lambda batch: (module.net._orig_mod(batch[0]) - batch[1]).square().mean()
    pruner = half(rewind_weights="init", include="net.0.*")
    fit(module, pruner, Watch(on_train_batch_start=lambda t, m: seen.append(all_masked_are_zero(t, m))))
    assert survivors(pruner) == {"net.0.weight": 6}
    assert seen == [True] * (4 * BATCHES)


class OtherOptimizer:
    """What Lightning takes for an optimizer though it is none of PyTorch's."""

    def __init__(self, optimizer):
        self.inner = optimizer

    param_groups = property(lambda self: self.inner.param_groups)
    state = property(lambda self: self.inner.state)
    defaults = property(lambda self: self.inner.defaults)

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state):
        self.inner.load_state_dict(state)

    def step(self, closure=None):
        return self.inner.step(closure)

    def zero_grad(self, *_, **__):
        self.inner.zero_grad()


def test_optimizer_without_hooks_keeps_masked_weights_zero():
    module, pruner, clean = Net(optimizer=lambda p: OtherOptimizer(OPTIMIZERS["Adam"](p))), half(), []
    look = Watch(on_train_batch_end=lambda t, m: clean.append(all_masked_are_zero(t, m)))
    fit(module, pruner, look)
    assert clean == [True] * (4 * BATCHES)
    assert pruner.remaining == 0.125


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_module_without_an_optimizer_is_pruned_and_warned_of():
    module, pruner = Net(optimizer=lambda p: None), half()
    with pytest.warns(UserWarning, match="^sap: no optimizer of configure_optimizers holds a parameter: "):
        fit(module, pruner)
    assert pruner.remaining == 0.125
    assert zeros_of(module) == N * 7 // 8


def test_lazy_layer_cannot_be_rewound_to_init():
    network = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 3))
    message = "There are no weights to rewind to yet: ['net.0.weight', 'net.0.bias'] are not initialized before the"
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(Net(network), half(rewind_weights="init"))
    pruner = half(rewind_weights=1)
    fit(Net(nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 3))), pruner)
    assert pruner.remaining == 0.125


def all_lazy():
    return nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(3))


class TestLazyNetworks:
    def test_a_network_of_lazy_layers_alone_is_pruned_from_the_first_rounds_end(self, caplog):
        module, pruner, monitor, clean = Net(all_lazy()), half(), PQIMonitor(stop_on=None), []
        look = Watch(on_train_batch_end=lambda t, m: clean.append(all_masked_are_zero(t, m)))
        fit(module, pruner, monitor, look, val=loader())
        assert survivors(pruner) == {"net.0.weight": 6, "net.3.weight": 3}
        assert [record.pruned for record in pruner.history] == [36, 18, 9, None]
        assert clean == [True] * (4 * BATCHES)
        assert "sap: net.0.weight, net.0.bias, net.1.weight, net.1.bias, net.3.weight" in caplog.text
        assert "Those that are prunable join when the first round ends." in caplog.text

    def test_a_target_is_met(self):
        pruner = half(target_remaining=0.25, scope="global")
        fit(Net(all_lazy()), pruner)
        assert pruner.remaining == 0.25

    def test_a_pattern_is_met(self):
        pruner = half(structure="2:4", every_n_epochs=None, include="net.3.*")
        fit(Net(all_lazy()), pruner)
        assert survivors(pruner) == {"net.3.weight": 12}

    def test_whole_units_need_a_batch_first(self):
        with pytest.raises(ValueError, match=r"^structure='unit' needs the shapes .* Pass a batch through the module"):
            fit(Net(all_lazy()), half(structure="unit"))

    def test_a_pruner_without_a_trainer_needs_a_batch_first(self):
        net = all_lazy()
        with pytest.raises(ValueError, match=r"Pass a batch through the module before attach\.$"):
            Pruner(FixedFraction(0.5)).attach(net)
        net(torch.ones(2, 6))
        assert list(Pruner(FixedFraction(0.5)).attach(net).masks) == ["0.weight", "3.weight"]


def test_weight_that_is_a_strided_view_is_pruned():
    module, pruner = Net(), half()
    module.net[0].weight = nn.Parameter(torch.randn(8, 12)[:, ::2])
    fit(module, pruner, PQIMonitor(stop_on=None))
    assert not module.net[0].weight.is_contiguous()
    assert zeros_of(module) == N * 7 // 8
