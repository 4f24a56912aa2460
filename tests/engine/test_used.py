"""What layers compute with: asked of layers, and measured on an example."""

import pytest
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d, StdConv2dSame
from timm.models.byobnet import MobileOneBlock
from timm.utils import reparameterize_model
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from lightning_sap import FixedFraction, Pruner, effective_weights
from lightning_sap.engine.branches import merging_blocks
from lightning_sap.engine.used import Effective, layer_keeps_zeros
from lightning_sap.engine.weights import LOSES_ZEROS, left_out, prunable_weights


class Scaled(nn.Linear):
    """Equalised learning rates: a factor keeps zeros."""

    def forward(self, inputs):
        return functional.linear(inputs, self.weight * 0.1, self.bias)


class Centred(nn.Linear):
    def forward(self, inputs):
        return functional.linear(inputs, self.weight - self.weight.mean(1, keepdim=True), self.bias)


class Partial(nn.Conv2d):
    """Takes a mask beside the image."""

    def forward(self, inputs, mask):
        return super().forward(inputs * mask)


class Counting(nn.Linear):
    """Counts its calls in a buffer, draws noise, and has a hook of the user's."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("calls", torch.zeros(()))
        self.seen = []
        self.register_forward_hook(lambda *_: self.seen.append(1))

    def forward(self, inputs):
        self.calls += 1
        return functional.linear(inputs + torch.rand_like(inputs), self.weight, self.bias)


class TestAskedLayers:
    @pytest.mark.parametrize(
        ("layer", "keeps"),
        [
            (nn.Linear(4, 3), True),
            (nn.Conv2d(2, 4, 3), True),
            (Scaled(4, 3), True),
            (Centred(4, 3), False),
            (Conv2dSame(4, 8, 3, stride=2), True),
            (StdConv2d(4, 8, 3), False),
            (StdConv2dSame(4, 8, 3), False),
            (ScaledStdConv2d(4, 8, 3), False),
            (StdConv2d(4, 8, 3, dilation=2, groups=2), False),
            (Partial(2, 4, 3), None),
        ],
    )
    def test_a_layer_with_a_forward_of_its_own_is_asked(self, layer, keeps):
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        assert layer_keeps_zeros(layer, "weight") is keeps
        assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())

    def test_asking_leaves_no_trace(self):
        layer, state = Counting(4, 3), torch.get_rng_state()
        assert layer_keeps_zeros(layer, "weight") is True
        assert (float(layer.calls), layer.seen, layer.training) == (0.0, [], True)
        assert torch.equal(torch.get_rng_state(), state)

    def test_standardised_weights_are_left_out_and_parametrized_ones_go_by_their_rule(self):
        net = nn.Sequential(
            StdConv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), parametrizations.weight_norm(Scaled(4, 3))
        )
        assert list(prunable_weights(net)) == ["2.weight", "3.parametrizations.weight.original1"]
        assert left_out(net) == {"0.weight": LOSES_ZEROS}

    def test_lazy_layers_wait(self):
        net = nn.Sequential(nn.LazyConv2d(4, 3), nn.Conv2d(4, 2, 1))
        assert list(prunable_weights(net)) == ["1.weight"]


class TestEffectiveWeights:
    def test_of_plain_layers_it_is_what_is_not_zero(self):
        net = nn.Sequential(nn.Conv2d(1, 2, 2, bias=False), nn.Flatten(), nn.Linear(2, 3, bias=False))
        with torch.no_grad():
            net[0].weight.copy_(torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]], [[[1.0, 1.0], [1.0, 0.0]]]]))
        found = effective_weights(net.train(), torch.ones(1, 1, 2, 2))
        assert found == Effective({"0": (4, 8), "2": (6, 6)})
        assert found.remaining == 10 / 14
        assert net.training

    def test_standardised_weights_are_dense_though_their_parameters_are_sparse(self):
        net = nn.Sequential(StdConv2d(4, 8, 3))
        with torch.no_grad():
            net[0].weight[:, :, 0] = 0.0  # a third
        assert effective_weights(net, torch.ones(1, 4, 8, 8)) == Effective({"0": (288, 288)})

    def test_a_list_is_one_argument(self):
        class OfImages(nn.Linear):
            def forward(self, images):
                return super().forward(torch.stack(images))

        assert effective_weights(OfImages(4, 2), [torch.ones(4), torch.ones(4)]).layers == {"": (8, 8)}

    def test_adapters_products_and_arguments_by_name_are_seen(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.base, self.down, self.up = (
                    nn.Linear(4, 4, bias=False),
                    *(nn.Parameter(torch.ones(s)) for s in ((1, 4), (4, 1))),
                )
                self.table = nn.Parameter(torch.tensor([[1.0, 0.0]] * 4))

            def forward(self, *, first, second):
                return functional.linear(first, self.base.weight + self.up @ self.down) @ self.table + second

        model = Model()
        nn.init.zeros_(model.base.weight)
        found = effective_weights(model, {"first": torch.ones(1, 4), "second": torch.ones(1, 2)})
        assert found.layers == {"": (16 + 4 + 4 + 4, 16 + 4 + 4 + 8)}

    def test_a_layer_that_is_used_twice_counts_once_and_one_that_is_not_used_does_not(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

            def forward(self, inputs):
                return self.used(self.used(inputs))

        assert effective_weights(Twice(), torch.ones(1, 2)) == Effective({"used": (4, 4)})

    def test_a_compiled_network_is_measured_too(self):
        net = torch.compile(nn.Sequential(nn.Linear(4, 2, bias=False)), backend="eager")
        assert effective_weights(net, torch.ones(1, 4)).remaining == 1.0

    def test_hooks_and_modes_are_put_back_after_an_error(self):
        net = nn.Sequential(nn.Linear(4, 2))
        with pytest.raises(RuntimeError):
            effective_weights(net, torch.ones(1, 3))
        assert net.training
        assert not net[0]._forward_hooks
        assert not net[0]._forward_pre_hooks


@pytest.mark.filterwarnings("ignore:sap. MobileOneBlock adds branches")
class TestMergedBranches:
    def network(self):
        torch.manual_seed(0)
        return nn.Sequential(MobileOneBlock(3, 16), MobileOneBlock(16, 16, num_conv_branches=4), nn.Conv2d(16, 4, 1))

    def test_merged_branches_are_denser_than_pruned_ones(self):
        net, example = self.network(), torch.randn(1, 3, 8, 8)
        pruner = Pruner(FixedFraction(0.8)).attach(net)
        pruner.prune()
        before = effective_weights(net, example).remaining
        merged = reparameterize_model(net.eval())
        torch.testing.assert_close(merged(example), net(example), atol=1e-4, rtol=1e-4)
        after = effective_weights(merged, example).remaining
        assert before == pytest.approx(pruner.remaining, abs=0.01)
        assert after > 2 * before  # of four branches a weight is zero in all with 0.8 to the power of four

    def test_blocks_that_merge_branches_are_known(self):
        net = self.network()
        assert merging_blocks(net, set(prunable_weights(net))) == {"0": "MobileOneBlock", "1": "MobileOneBlock"}
        assert merging_blocks(net, {"2.weight"}) == {}
        assert merging_blocks(reparameterize_model(net), set(prunable_weights(net))) == {}
