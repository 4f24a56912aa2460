"""Sums of squares of what layers read, beside a plain loop, and which layers have them."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_sap.engine.inputs import input_layers, layout, sums_of_squares
from lightning_sap.engine.weights import prunable_weights

LAYERS = {
    "linear": (lambda: nn.Linear(3, 2), (4, 3)),
    "one sample": (lambda: nn.Linear(3, 2), (3,)),
    "tokens": (lambda: nn.Linear(3, 2), (2, 5, 3)),
    "images": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5)),
    "one image": (lambda: nn.Conv2d(4, 6, 3), (4, 5, 5)),
    "groups": (lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
}


def channel_of(layer, index):
    """The input channel that an entry of the weight multiplies."""
    if isinstance(layer, nn.ConvTranspose2d):
        return index[0]
    groups = getattr(layer, "groups", 1)
    inputs, rows = layer.weight.shape[1], layer.weight.shape[0] // groups
    return index[0] // rows * inputs + index[1]


@pytest.mark.parametrize("kind", LAYERS)
def test_every_weight_meets_its_own_input_channel(kind):
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape, dtype=torch.float64)
    axis = x.dim() - layer.weight.dim() + 1
    sums, count = sums_of_squares(layer, x)
    assert sums.shape == torch.Size(layout(layer, layer.weight.shape))
    assert int(count) == x.numel() // x.shape[axis]
    found = sums.expand(layer.weight.shape)
    for index in layer.weight.detach().nonzero().tolist():
        channel = x.select(axis, channel_of(layer, index))
        assert float(found[tuple(index)]) == pytest.approx(float((channel**2).sum()), rel=1e-12)


def test_inputs_of_half_precision_do_not_overflow():
    sums, _ = sums_of_squares(nn.Linear(1, 1), torch.full((4, 1), 300.0, dtype=torch.float16))
    assert sums.tolist() == [[360_000.0]]


def test_layers_of_tied_weights_are_all_found():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    found, missing = input_layers(net, prunable_weights(net))
    assert found == {"0.weight": [net[0], net[1]]}
    assert missing == {}


def test_transformers_layers_read_along_axis_0():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layer = Conv1D(2, 3)
    sums, _ = sums_of_squares(layer, torch.tensor([[[1.0, 2.0, 3.0]]]))
    assert sums.tolist() == [[1.0], [4.0], [9.0]]
    assert input_layers(nn.Sequential(layer), prunable_weights(nn.Sequential(layer)))[1] == {}


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))


@pytest.mark.parametrize(
    ("make", "include", "reason"),
    [
        (lambda: nn.Bilinear(2, 2, 2), None, "it is 'weight' of Bilinear"),
        (lambda: nn.LSTM(2, 2), None, "it is 'weight_ih_l0' of LSTM"),
        (lambda: nn.Embedding(3, 2), "*", "it is 'weight' of Embedding"),
        (lambda: nn.MultiheadAttention(2, 1), None, "it belongs to MultiheadAttention"),
        (lambda: parametrizations.weight_norm(nn.Linear(2, 2)), "*original1", "it is parametrized"),
        (Own, None, "it is 'weight' of Own"),
    ],
)
def test_what_is_not_multiplied_by_a_known_input(make, include, reason):
    net = make()
    found, missing = input_layers(net, prunable_weights(net, include))
    assert found == {}
    assert next(iter(missing.values())) == reason


def test_a_weight_tied_to_an_embedding_is_not_had():
    net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    net[1].weight = net[0].weight
    _, missing = input_layers(net, prunable_weights(net))
    assert list(missing.values()) == ["it is 'weight' of Embedding"]
