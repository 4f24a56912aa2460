"""Averages that are no modules share the masks where a method gives them by name."""

import pytest
import torch
from averaging import Keeping
from helpers import Watch, fit, half, is_masked, survivors
from lightning.pytorch import Callback
from torch import nn
from torch.optim import SGD

from lightning_sap import FixedFraction, Pruner


class EMAModel:
    """A list of tensors made anew at each update, with parameters that are passed in: the layout of diffusers."""

    def __init__(self, parameters):
        self.shadow_params = [p.detach().clone() for p in parameters]

    def step(self, parameters):
        self.shadow_params = [0.9 * s + 0.1 * p.detach() for s, p in zip(self.shadow_params, parameters, strict=True)]


def names_of(module):
    return [name for name, _ in module.named_parameters()]


class Averaging(Keeping):
    """The average is the module's own, and follows after each step."""

    def __init__(self):
        super().__init__(nn.Identity)
        self.ema = EMAModel(self.net.parameters())

    def averaged_weights(self):
        return {f"net.{name}": tensor for name, tensor in zip(names_of(self.net), self.ema.shadow_params, strict=True)}

    def follow(self):
        self.ema.step(self.net.parameters())


class AveragingCallback(Callback):
    """The average is a callback's."""

    def on_fit_start(self, trainer, module):
        self.ema = EMAModel(module.net.parameters())
        self.names = [f"net.{name}" for name in names_of(module.net)]

    def averaged_weights(self):
        return dict(zip(self.names, self.ema.shadow_params, strict=True)) if hasattr(self, "ema") else {}

    def on_train_batch_end(self, trainer, module, *_):
        self.ema.step(module.net.parameters())


class Still(Averaging):
    averaged_weights = None

    def follow(self):
        pass


def test_an_average_of_the_module_is_as_sparse_and_not_warned_of():
    module, pruner, clean = Averaging(), half(), []
    fit(
        module,
        pruner,
        Watch(on_train_batch_end=lambda t, m: clean.append(is_masked(m.averaged_weights(), pruner.masks))),
    )
    assert clean == [True] * 12
    assert survivors(pruner) == {"net.0.weight": 6, "net.2.weight": 3}
    average = module.averaged_weights()
    assert int((average["net.0.weight"] != 0).sum()) == 6
    assert not torch.equal(average["net.0.weight"], module.net[0].weight)


@pytest.mark.parametrize("order", [1, -1])
def test_an_average_of_another_callback_is_as_sparse(order):
    average, pruner, clean = AveragingCallback(), half(), []
    look = Watch(on_train_epoch_end=lambda t, m: clean.append(is_masked(average.averaged_weights(), pruner.masks)))
    fit(Still(), *[average, pruner][::order], look)
    assert clean == [True] * 4
    assert int((average.averaged_weights()["net.0.weight"] != 0).sum()) == 6


def test_an_average_in_a_loop_without_a_trainer_is_as_sparse():
    module = Averaging()
    optimizer = SGD(module.parameters(), lr=0.1)
    pruner = Pruner(FixedFraction(0.5)).attach(module, optimizer)
    for _ in range(3):
        module.net(torch.ones(2, 6)).square().sum().backward()
        optimizer.step()
        module.follow()
        pruner.prune()
        assert is_masked(module.averaged_weights(), pruner.masks)
    assert int((module.averaged_weights()["net.0.weight"] != 0).sum()) == 6


class TestMistakes:
    def fails(self, error, message, given):
        module = Averaging()
        module.averaged_weights = lambda: given
        with pytest.raises(error, match=message):
            fit(module, half())

    def test_a_name_that_is_no_parameter_is_an_error_when_fit_begins(self):
        message = (
            r"^Averaging\.averaged_weights\(\) names '0\.weight', which is no parameter .* closest are \['net\.0\.w"
        )
        self.fails(ValueError, message, {"0.weight": torch.zeros(8, 6)})

    def test_another_shape_is_an_error(self):
        message = (
            r"^Averaging\.averaged_weights\(\) must give a tensor of shape \(8, 6\) for 'net\.0\.weight', got \(2,\)\.$"
        )
        self.fails(ValueError, message, {"net.0.weight": torch.zeros(2)})

    def test_a_list_is_an_error(self):
        self.fails(TypeError, r"^Averaging\.averaged_weights\(\) must return a mapping from names", [torch.zeros(2)])
