"""Averages that are no parameters: buffers share the masks, what is kept in plain attributes is warned of."""

from functools import partial

import pytest
import torch
from averaging import Keeping
from helpers import Crash, Watch, crash, fit, half, is_masked, same, survivors
from lightning.pytorch import Callback
from resuming import Alike
from timm.utils.model_ema import ModelEma
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

MESSAGE = (
    r"^sap: these began as copies of pruned weights, changed since, and are no parameters or buffers of the module"
)


class LitEma(nn.Module):
    """An average in buffers whose names have no dots, as latent diffusion's is."""

    def __init__(self, network):
        super().__init__()
        for name, parameter in network.named_parameters():
            self.register_buffer(name.replace(".", ""), parameter.detach().clone())

    def update(self, network):
        for name, parameter in network.named_parameters():
            getattr(self, name.replace(".", "")).lerp_(parameter.detach(), 0.1)


class Shadow:
    """An object with a list of tensors, as of diffusers and torch_ema."""

    def __init__(self, network):
        self.shadow_params = [parameter.detach().clone() for parameter in network.parameters()]

    def update(self, network):
        for i, parameter in enumerate(network.parameters()):
            self.shadow_params[i] = 0.9 * self.shadow_params[i] + 0.1 * parameter.detach()


class Listed:
    """A list, so that the average is no submodule."""

    def __init__(self, network):
        self.average = [AveragedModel(network)]

    def update(self, network):
        self.average[0].update_parameters(network)


class Averaging(Keeping):
    def follow(self):
        self.copy.update(self.net)


class AveragingCallback(Callback):
    """Keeps an average of its own, from the start of training on."""

    def __init__(self, make, moves=True):
        self.make, self.moves = make, moves

    def on_fit_start(self, trainer, module):
        self.average = self.make(module.net)

    def on_train_batch_end(self, trainer, module, *_):
        if self.moves:
            self.average.update(module.net)


def still(make=nn.Identity):
    module = Keeping(make)
    module.follow = lambda: None
    return module


def values_of(average):
    """Its matrices, by the names that they have in the network."""
    found = {"Shadow": lambda: average.shadow_params, "ModelEma": lambda: list(average.ema.parameters())}
    tensors = found.get(type(average).__name__, lambda: list(average.average[0].parameters()))()
    return {"net.0.weight": tensors[0], "net.2.weight": tensors[2]}


def is_lit_masked(module, pruner):
    found = {"net.0.weight": module.copy.get_buffer("0weight"), "net.2.weight": module.copy.get_buffer("2weight")}
    return is_masked(found, pruner.masks)


class TestBuffers:
    def test_an_average_in_buffers_has_the_mask_of_its_source_after_every_step(self):
        module, pruner, clean = Averaging(LitEma), half(), []
        fit(module, pruner, Watch(on_train_batch_end=lambda t, m: clean.append(is_lit_masked(m, pruner))))
        assert clean == [True] * 12
        assert survivors(pruner) == {"net.0.weight": 6, "net.2.weight": 3}
        assert int((module.copy.get_buffer("0weight") != 0).sum()) == 6
        assert not torch.equal(module.copy.get_buffer("0weight"), module.net[0].weight)

    def test_it_is_known_after_a_resume(self, tmp_path):
        def run(pruner, *callbacks, **options):
            module = Averaging(LitEma)
            fit(module, pruner, *callbacks, train=DataLoader(Alike(2), 8), **options)
            return module

        def kill(trainer, module):
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "killed.ckpt")
                crash()

        whole = run(half())
        with pytest.raises(Crash):
            run(half(), Watch(on_train_batch_end=kill))
        assert same(run(half(), ckpt_path=tmp_path / "killed.ckpt").state_dict(), whole.state_dict())

    def test_a_buffer_that_is_equal_and_stays_as_it_is_is_not_touched(self):
        module = still(LitEma)
        before = module.copy.get_buffer("0weight").clone()
        fit(module, half())
        assert torch.equal(module.copy.get_buffer("0weight"), before)


HIDDEN = {"Shadow": Shadow, "timm's ModelEma": partial(ModelEma, decay=0.9), "a list": Listed}
PATHS = {
    "Shadow": ("shadow_params.0", "shadow_params.2"),
    "timm's ModelEma": ("ema.0.weight", "ema.2.weight"),
    "a list": ("average.0.module.0.weight", "average.0.module.2.weight"),
}


@pytest.mark.filterwarnings("ignore:Found 4 module.s. in eval mode")  # timm's
@pytest.mark.parametrize("kind", HIDDEN)
class TestPlainAttributes:
    def test_an_average_of_the_module_is_named_once_and_not_written_to(self, kind):
        module = Averaging(HIDDEN[kind])
        one, two = PATHS[kind]
        with pytest.warns(UserWarning, match=MESSAGE) as caught:
            fit(module, half())
        said = [str(each.message) for each in caught if "began as copies" in str(each.message)]
        assert len(said) == 1
        assert f": copy.{one} (of net.0.weight), copy.{two} (of net.2.weight). They stay dense." in said[0]
        assert all(tensor.all() for tensor in values_of(module.copy).values())

    def test_an_average_of_another_callback_is_named(self, kind):
        average = AveragingCallback(HIDDEN[kind])
        with pytest.warns(UserWarning, match=rf"{MESSAGE}: AveragingCallback\.average\.{PATHS[kind][0]} \(of net\.0"):
            fit(still(), average, half())
        assert all(tensor.all() for tensor in values_of(average.average).values())

    def test_a_copy_that_stays_as_it_is_is_not_spoken_of(self, kind):
        average = AveragingCallback(HIDDEN[kind], moves=False)
        fit(still(), average, half())  # a warning would be an error
        assert torch.equal(values_of(average.average)["net.0.weight"], still().net[0].weight)


def test_averages_of_two_callbacks_of_one_class_are_both_named():
    with pytest.warns(UserWarning, match=MESSAGE) as caught:
        fit(
            still(),
            AveragingCallback(Shadow, moves=False),
            AveragingCallback(Shadow),
            AveragingCallback(Listed),
            half(),
        )
    (said,) = [str(each.message) for each in caught if "began as copies" in str(each.message)]
    assert "AveragingCallback[1].average.shadow_params.0 (of net.0.weight)" in said
    assert "AveragingCallback[2].average.average.0.module.0.weight (of net.0.weight)" in said
    assert "AveragingCallback.average" not in said
