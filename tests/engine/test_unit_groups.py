"""Which units of a module go together, with an example to trace and without one."""

import pytest
import torch
from networks import Concatenation, Encoder, Residual, build
from torch import nn

from lightning_sap.engine.unit_groups import flagged, unit_groups

tp = pytest.importorskip("torch_pruning")


def weights_of(module):
    return [name for name, parameter in module.named_parameters() if parameter.dim() > 1]


def groups_of(module, inputs=None, weights=None):
    return unit_groups(module, weights_of(module) if weights is None else weights, inputs)


def described(groups):
    """By name of a group its size and the names of its rows, companions and columns."""
    return {
        g.name: (g.size, *(tuple(p.name for p in places) for places in (g.rows, g.companions, g.columns)))
        for g in groups
    }


def flat(channels=6, norm=True):
    norms = [nn.BatchNorm2d(channels)] if norm else []
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), *norms, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(channels * 4, 5), nn.Dropout(), nn.Linear(5, 2),
    )  # fmt: skip


class TestTraced:
    def test_groups_of_a_chain_are_the_same_with_and_without_an_example(self):
        module = flat()
        alone, traced = groups_of(module), groups_of(module, torch.randn(1, 3, 4, 4))
        assert described(alone) == described(traced)
        units = [torch.tensor([i % 2 == 0 for i in range(group.size)]) for group in alone]
        shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        one, other = (flagged(list(zip(g, units, strict=True)), shapes) for g in (alone, traced))
        assert all(torch.equal(one[name], other[name]) for name in shapes)

    def test_layers_that_are_added_are_one_group(self):
        (group,) = groups_of(Residual(), torch.randn(2, 8))
        assert {p.name for p in group.rows} == {"first.weight", "second.weight"}
        assert {p.name for p in group.companions} == {"first.bias", "second.bias"}
        assert {p.name for p in group.columns} == {"second.weight", "head.weight"}

    def test_branches_that_are_concatenated_share_the_norm_and_its_reader(self):
        found = described(groups_of(Concatenation(), torch.randn(1, 3, 8, 8)))
        assert found["a"] == (8, ("a.weight",), ("a.bias", "norm.weight", "norm.bias"), ("c.weight",))
        assert found["b"] == (6, ("b.weight",), ("b.bias", "norm.weight", "norm.bias"), ("c.weight",))
        module = Concatenation()
        (b,) = (g for g in groups_of(module, torch.randn(1, 3, 8, 8)) if g.name == "b")
        last = torch.arange(6) == 5
        masks = flagged([(b, last)], {"norm.bias": torch.Size([14]), "c.weight": module.c.weight.shape})
        assert masks["norm.bias"].nonzero().flatten().tolist() == [13]
        assert masks["c.weight"].nonzero()[:, 1].unique().tolist() == [13]

    def test_of_an_encoder_only_the_feed_forward_has_units(self):
        assert described(groups_of(Encoder(), torch.randn(2, 5, 32))) == {
            "layer.linear1": (64, ("layer.linear1.weight",), ("layer.linear1.bias",), ("layer.linear2.weight",))
        }

    def test_a_depthwise_convolution_goes_with_what_it_reads(self):
        net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.Conv2d(8, 2, 1))
        expected = {"0": (8, ("0.weight", "1.weight"), ("0.bias",), ("2.weight",))}
        assert described(groups_of(net, torch.randn(1, 3, 6, 6))) == described(groups_of(net)) == expected

    @pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(6), lambda: nn.GroupNorm(2, 6)])
    def test_units_that_a_norm_computes_together_stay(self, norm):
        assert groups_of(nn.Sequential(nn.Linear(4, 6), norm(), nn.Linear(6, 2)), torch.randn(2, 4)) == []

    def test_a_group_stays_if_one_of_its_layers_is_not_among_the_weights(self):
        assert groups_of(Residual(), torch.randn(2, 8), ["first.weight", "head.weight"]) == []

    def test_a_group_with_a_shared_parameter_stays(self):
        net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        net[2].weight = net[0].weight
        assert groups_of(net, torch.randn(2, 4)) == []

    def test_the_module_and_the_random_state_are_left_alone(self):
        net, inputs = build("mlp")
        net.train()[0].weight.requires_grad_(False)
        state = torch.random.get_rng_state()
        groups_of(net, inputs)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert net.training
        assert not net[0].weight.requires_grad

    def test_half_precision_is_traced_too(self):
        assert described(groups_of(flat().half(), torch.randn(1, 3, 4, 4).half())).keys() == {"0", "5"}

    def test_a_compiled_part_has_the_names_of_the_plain_one(self):
        net = nn.Sequential(torch.compile(nn.Sequential(nn.Linear(4, 6), nn.ReLU())), nn.Linear(6, 2))
        assert described(groups_of(net, torch.randn(2, 4), ["0.0.weight", "1.weight"])) == {
            "0.0": (6, ("0.0.weight",), ("0.0.bias",), ("1.weight",))
        }

    def test_what_cannot_be_traced_is_refused_with_the_cure(self):
        class Broken(nn.Linear):
            def forward(self, x):
                raise NotImplementedError("no forward")

        with pytest.raises(
            ValueError, match=r"structure='unit': Broken is refused: .*no forward.*`example_input_array`"
        ):
            groups_of(Broken(2, 2), torch.randn(1, 2))


class TestWithoutAnExample:
    def test_a_chain_inside_of_a_module_is_found(self):
        class Wrapped(nn.Module):
            def __init__(self):
                super().__init__()
                self.loss, self.net = nn.CrossEntropyLoss(), flat(norm=False)

        assert described(groups_of(Wrapped())).keys() == {"net.0", "net.4"}

    @pytest.mark.parametrize(
        "module",
        [
            Residual,
            Concatenation,
            lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)),
            lambda: nn.Sequential(nn.Linear(4, 6), nn.Softmax(1), nn.Linear(6, 2)),
            lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Linear(6, 2)),
            lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 2, 3)),
            lambda: nn.Sequential(*[nn.Linear(4, 4)] * 2),
            lambda: nn.Sequential(nn.Linear(4, 6), nn.Sequential(Residual())),
        ],
    )
    def test_what_is_not_known_to_be_a_chain_needs_an_example(self, module):
        with pytest.raises(
            ValueError, match=r"must see how \w+ couples its layers, and has no example. Give the modul"
        ):
            groups_of(module())
