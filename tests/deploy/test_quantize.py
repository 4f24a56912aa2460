"""Eight bits per weight: numbers by hand, zeros that stay zeros, and copies that leave the source as it is."""

import copy
import threading

import pytest
import torch
from helpers import Net, fit
from torch import nn

from lightning_sap.deploy import quantize_survivors
from lightning_sap.deploy.quantize import quantize


def test_numbers_and_scales_by_hand():
    weight = torch.tensor([[127.0, -63.6, 0.4, 0.0], [0.0, 2.54, -0.03, 0.0], [0.0, 0.0, 0.0, 0.0]])
    numbers, scale = quantize("w", weight)
    assert numbers.dtype == torch.int8
    assert numbers.tolist() == [[127, -64, 0, 0], [0, 127, -2, 0], [0, 0, 0, 0]]
    assert scale[:2].flatten().tolist() == pytest.approx([1.0, 0.02], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (8, 5), (4, 3, 3, 3)], ids=str)
def test_errors_are_at_most_half_a_step_and_zeros_stay(shape, dtype):
    weight = torch.randn(shape).to(dtype).masked_fill(torch.rand(shape) < 0.5, 0)
    found = quantize_survivors({"weight": weight})["weight"]
    assert (found.dtype, found.shape) == (dtype, weight.shape)
    step = weight.double().abs().amax(tuple(range(1, weight.dim())), keepdim=True) / 127
    rounding = 2 * torch.finfo(dtype).eps * weight.double().abs()
    assert ((found.double() - weight.double()).abs() <= 0.501 * step + rounding + 1e-12).all()
    assert (found[weight == 0] == 0).all()


def test_quantizing_twice_changes_nothing():
    weight = torch.randn(64, 33) * torch.logspace(-30, 30, 64)[:, None]
    once = quantize_survivors({"weight": weight})["weight"]
    assert torch.equal(quantize_survivors({"weight": once})["weight"], once)


def test_biases_norms_and_other_tensors_stay():
    state = {"bias": torch.randn(3, 3), "norm.weight": torch.randn(5), "n.weight": torch.arange(4).reshape(2, 2)}
    found = quantize_survivors(state)
    assert all(found[name] is tensor for name, tensor in state.items())


def test_a_module_is_copied_and_its_output_channels_are_found():
    module = nn.Sequential(nn.Linear(6, 5), nn.ConvTranspose2d(6, 4, 3), nn.BatchNorm2d(4)).train()
    before = copy.deepcopy(module.state_dict())
    found = quantize_survivors(module)
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.items())
    for i, others in ((0, (1,)), (1, (0, 2, 3))):
        steps = found[i].weight / (module[i].weight.abs().amax(others, keepdim=True) / 127)
        assert torch.allclose(steps, steps.round(), atol=2e-3)
    assert torch.equal(found[2].weight, module[2].weight)
    assert found.training
    assert found[0].weight.requires_grad


def test_a_module_that_cannot_be_copied_is_refused():
    module = nn.Linear(2, 2)
    module.lock = threading.Lock()
    with pytest.raises(ValueError, match="Linear cannot be copied: cannot pickle"):
        quantize_survivors(module)


def test_a_module_of_lightning_is_copied_without_its_trainer():
    net = Net()
    trainer = fit(net)
    net.trainer = trainer
    copied = quantize_survivors(net)
    assert net.trainer is trainer
    with pytest.raises(RuntimeError, match="not attached to a `Trainer`"):
        copied.trainer  # noqa: B018


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_what_eight_bits_cannot_hold_is_refused_by_name(value):
    weight = torch.ones(2, 2, dtype=torch.float64)
    weight[0, 0] = value
    with pytest.raises(ValueError, match=r"a\.weight has weights that are not finite in float32"):
        quantize_survivors({"a.weight": weight})


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match="takes a module or a state_dict, got Tensor"):
        quantize_survivors(torch.ones(2, 2))
