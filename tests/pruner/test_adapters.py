"""Low-rank adapters merged into a sparse network, by the recipes of the docs, keep its zeros and their outputs."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from lightning_sap import FixedFraction, Pruner

PAGE = Path(__file__).resolve().parents[2] / "docs" / "lora.md"


@pytest.fixture
def recipe():
    """The classes of the page."""
    code = "\n".join(re.findall(r"^class .*?(?=^\S)", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))
    names = {"torch": torch, "nn": nn, "linear": linear}
    exec(code, names)
    return names


def sparse(layer):
    Pruner(FixedFraction(0.5)).attach(layer).prune()
    return layer


def test_a_masked_adapter_moves_kept_weights_alone_and_by_the_masked_product(recipe):
    layer = sparse(nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]]))
    adapted = recipe["MaskedLoRA"](layer, rank=1, scale=0.5)
    with torch.no_grad():
        adapted.lora_A.copy_(torch.tensor([[2.0, 4.0, 6.0]]))
        adapted.lora_B.copy_(torch.tensor([[1.0], [10.0]]))
    inputs = torch.tensor([[1.0, 1.0, 1.0]])
    assert adapted(inputs).tolist() == [[1 + 1 + 2 + 3, 3 + 20.0]]
    assert adapted.merge().weight.tolist() == [[2.0, 0.0, 5.0], [0.0, 23.0, 0.0]]
    assert layer(inputs).tolist() == [[7.0, 23.0]]


def test_only_the_adapter_is_trained_and_its_gradient_is_that_of_kept_weights(recipe):
    layer = sparse(nn.Linear(8, 4))
    adapted = recipe["MaskedLoRA"](layer)
    assert [name for name, p in adapted.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    assert set(adapted.state_dict()) == {"lora_A", "lora_B", "layer.weight", "layer.bias"}
    inputs = torch.randn(5, 8)
    adapted(inputs).sum().backward()
    slope = inputs.sum(0).expand(4, 8) * (layer.weight != 0)
    torch.testing.assert_close(adapted.lora_B.grad, slope @ adapted.lora_A.detach().T)


def test_pruning_goes_on_under_the_zeros_of_a_merged_network(recipe):
    network = sparse(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2)))
    adapted = recipe["MaskedLoRA"](network[0])
    with torch.no_grad():
        adapted.lora_B.normal_()
    network[0] = adapted.merge().requires_grad_(True)
    optimizer = torch.optim.Adam(network.parameters())
    pruner = Pruner(FixedFraction(0.5), keep_zeros=True).attach(network, optimizer)
    assert pruner.remaining == 0.5
    network(torch.randn(4, 16)).sum().backward()
    optimizer.step()
    pruner.prune()
    assert pruner.remaining == 0.25
