"""A pattern keeps exactly n of every m weights along the inputs, the largest, in every layer and dtype."""

import pytest
import torch
from torch import nn

from lightning_sap.engine.decision import prune_masks
from lightning_sap.engine.groups import PrunableTensor
from lightning_sap.engine.patterns import Pattern, decide_pattern
from lightning_sap.engine.weights import prunable_weights
from lightning_sap.policies.base import Policy

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def tensors_of(module, pruned=None):
    weights = prunable_weights(module)
    return {
        n: PrunableTensor(w.parameter.detach(), (pruned or {}).get(n), w.units, layout=w.layout)
        for n, w in weights.items()
    }


def kept(module, name="2:4", pruned=None):
    return decide_pattern(tensors_of(module, pruned), Pattern.named(name), 0.5, 1.0).masks.kept


@pytest.mark.parametrize(
    "name", ["weight", "unit", "", "2", "2:", "0:4", "4:4", "5:4", "-1:4", "2:4:8", "2.0:4", 24, None]
)
def test_what_is_no_pattern_has_no_name(name):
    assert Pattern.named(name) is None


def test_names_of_patterns():
    assert Pattern.named("2:4") == (2, 4)
    assert Pattern.named("1:16").remaining == 1 / 16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_larger_half_of_each_four_inputs_of_a_linear_survives(dtype):
    layer = nn.Linear(8, 2, bias=False).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1, -4, 3, 2, 5, 5, 5, 5], [0, 0, 0, -1, 8, -7, 6, 9]]))
    assert kept(layer)["weight"].int().tolist() == [[0, 1, 1, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 0, 0, 1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["2:4", "1:4", "3:8"])
def test_exactly_n_of_m_survive_in_random_weights_with_many_ties(dtype, name):
    layer, (n, m) = nn.Linear(64, 33).to(dtype), Pattern.named(name)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-3, 4, layer.weight.shape))
    blocks = kept(layer, name)["weight"].view(-1, m)
    assert (blocks.sum(1) == n).all()
    sizes = layer.weight.detach().float().abs().view(-1, m)
    least, most = sizes.masked_fill(~blocks, 9).amin(1), sizes.masked_fill(blocks, -1).amax(1)
    assert (least >= most).all()


def test_a_convolution_has_the_pattern_over_its_input_channels():
    layer = nn.Conv2d(8, 3, 3)
    mask = kept(layer)["weight"]
    assert mask.shape == layer.weight.shape
    assert mask.is_contiguous()
    at_each_place = mask.permute(0, 2, 3, 1).reshape(-1, 4)
    assert (at_each_place.sum(1) == 2).all()
    alone = nn.Linear(8, 3 * 9)
    with torch.no_grad():
        alone.weight.copy_(layer.weight.permute(0, 2, 3, 1).reshape(27, 8))
    assert torch.equal(at_each_place.view(27, 8), kept(alone)["weight"])


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_has_its_inputs_on_axis_0(groups):
    layer = nn.ConvTranspose2d(8, 6, 2, groups=groups)
    mask = kept(layer)["weight"]
    assert (mask.view(2, 4, -1).sum(1) == 2).all()


def test_blocks_that_lost_more_stay_as_they_are():
    layer = nn.Linear(8, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1.0, 9.0))
    pruned = torch.tensor([[False, True, True, True, False, False, False, True]])
    mask = kept(layer, pruned={"weight": pruned})["weight"]
    assert mask.int().tolist() == [[1, 0, 0, 0, 0, 1, 1, 0]]


def test_it_is_the_same_as_blocks_that_a_policy_prunes_as_units():
    class AllButTwo(Policy):
        def __call__(self, sums, round):
            return (sums.count - 2).clamp(min=0)

    layer = nn.Linear(32, 16)
    units = {"weight": lambda tensor: tensor.reshape(-1, 4)}
    weights = {"weight": layer.weight.detach()}
    assert torch.equal(
        kept(layer)["weight"], prune_masks(weights, policy=AllButTwo(), scope="neuron", units=units)["weight"]
    )


def test_counts_and_index_of_the_decision():
    decision = decide_pattern(tensors_of(nn.Linear(8, 4)), Pattern(1, 4), 0.5, 1.0)
    assert (decision.count, decision.regrown, decision.before.survivors) == (24, 0, {"weight": 32})
    assert 0 < decision.before.overall < 1


def test_weights_that_are_not_finite_are_refused():
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite in \\['weight'\\]"):
        kept(layer)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_torch_takes_the_weights_as_semi_structured(kind, dtype):
    layer = nn.Linear(128, 256, bias=False) if kind == "linear" else nn.Conv2d(128, 256, 3, bias=False)
    layer = layer.to("cuda", dtype)
    mask = kept(layer)["weight"]
    assert mask.device.type == "cuda"
    weight = layer.weight.detach() * mask
    matrix = weight if kind == "linear" else weight.permute(0, 2, 3, 1).reshape(256, -1).contiguous()
    sparse = torch.sparse.to_sparse_semi_structured(matrix)
    assert torch.equal(sparse.to_dense(), matrix)
    x = torch.randn(64, matrix.shape[1], device="cuda", dtype=dtype)
    torch.testing.assert_close(nn.functional.linear(x, sparse), nn.functional.linear(x, matrix), rtol=2e-2, atol=2e-2)
