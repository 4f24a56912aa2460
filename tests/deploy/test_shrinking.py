"""Pruned units are gone and the outputs are the same; what cannot be proved is refused, and nothing is touched."""

import copy
import io
import sys
import time

import pytest
import torch
from helpers import Net, fit
from networks import NETWORKS, Residual, assert_equal, build, count, lively, mlp
from torch import nn

from lightning_sap.deploy import shrink, shrinking

tp = pytest.importorskip("torch_pruning")


def zero(layer, units, *, also=()):
    """Prune units of a layer with bias, and of what stands behind it."""
    with torch.no_grad():
        for part in (layer, *also):
            part.weight[units] = 0
            if part.bias is not None:
                part.bias[units] = 0


def prune_half_of_the_units(net, inputs, left=(nn.LayerNorm, nn.MultiheadAttention)):
    """Every second unit of each group of coupled layers, outputs left out."""
    graph = tp.DependencyGraph().build_dependency(copy.deepcopy(net), inputs, verbose=False)
    names = {part: name for name, part in graph.model.named_modules()}
    for group in list(graph.get_all_groups()):
        writes = [item for item in group if graph.is_out_channel_pruning_fn(item.dep.handler)]
        if any(not item.dep.target.outputs or isinstance(item.dep.target.module, left) for item in writes):
            continue
        for item in writes:
            if item.dep.target.module in names:
                layer = net.get_submodule(names[item.dep.target.module])
                zero(layer, [i for i, root in zip(item.idxs, item.root_idxs, strict=True) if root % 2 == 0])


class TestWhatGoes:
    def test_shapes_of_a_perceptron_by_hand(self):
        net = mlp()
        zero(net[0], [0, 3, 5])
        zero(net[2], slice(4, None))
        small = shrink(net, torch.randn(2, 8))
        assert [tuple(p.shape) for p in small.parameters()] == [(13, 8), (13,), (4, 13), (4,), (3, 4), (3,)]
        assert (small[0].out_features, small[2].in_features) == (13, 13)
        assert torch.equal(small[2].weight, net[2].weight[:4][:, [1, 2, 4, *range(6, 16)]])
        assert_equal(small, net, torch.randn(7, 8))

    def test_units_that_nobody_reads_go_and_those_that_only_they_read(self):
        net = mlp()
        with torch.no_grad():
            net[4].weight[:, :5] = 0  # nobody reads five units of net[2],
            net[2].weight[5:, :7] = 0  # and the others of net[2] do not read seven units of net[0]
        small = shrink(net, torch.randn(2, 8))
        assert (small[0].out_features, small[2].out_features) == (9, 7)
        assert_equal(small, net, torch.randn(7, 8))

    def test_a_unit_that_reads_only_pruned_units_goes_with_them(self):
        net = mlp()
        zero(net[0], [0, 1])
        with torch.no_grad():
            net[2].weight[3, 2:] = 0
            net[2].bias[3] = 0
        assert shrink(net, torch.randn(2, 8))[2].out_features == 11

    def test_one_unit_of_a_layer_stays(self):
        net = mlp()
        zero(net[0], slice(None))
        small = shrink(net, torch.randn(2, 8))
        assert small[0].out_features == 1
        assert_equal(small, net, torch.randn(7, 8))

    def test_outputs_stay(self, monkeypatch):
        monkeypatch.setattr(shrinking, "_outputs_among", None)  # it is told from the graph that they are outputs
        net = mlp()
        zero(net[4], [0, 2])
        assert count(shrink(net, torch.randn(2, 8))) == count(net)

    def test_outputs_on_the_way_stay_and_the_others_go(self):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(5, 2)

            def forward(self, x):
                a = self.a(x).relu()
                return {"features": a, "scores": [self.c(self.b(a).relu())]}

        net = Two()
        zero(net.a, [0, 2])
        zero(net.b, [1])
        small = shrink(net, torch.randn(2, 8))
        assert (small.a.out_features, small.b.out_features) == (6, 4)

    def test_units_tied_by_an_addition_go_only_together(self):
        net = Residual()
        zero(net.first, [0, 1])
        zero(net.second, [1, 2])
        small = shrink(net, torch.randn(2, 8))
        assert [tuple(p.shape) for p in small.parameters()] == [(7, 8), (7,), (7, 7), (7,), (2, 7), (2,)]
        assert_equal(small, net, torch.randn(5, 8))

    @pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Hardswish, lambda: nn.PReLU(1)])
    def test_activations_that_keep_zeros(self, activation):
        net = mlp(activation)
        zero(net[0], [0, 3])
        assert shrink(net, torch.randn(2, 8))[0].out_features == 14

    def test_a_constant_unit_stays_and_is_warned_of(self):
        net = mlp()
        with torch.no_grad():
            net[0].weight[[1, 2]] = 0
        with pytest.warns(UserWarning, match="2 units have no weights left but a bias or norm .* stay, in 0: "):
            assert count(shrink(net, torch.randn(2, 8))) == count(net)

    def test_a_norm_that_is_not_zero_holds_its_unit(self):
        net = lively(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 2)))
        zero(net[0], [0, 1, 2, 3])
        with torch.no_grad():
            net[1].weight[[0, 2]] = 0
            net[1].bias[[0, 3]] = 0
        with pytest.warns(UserWarning, match="3 units have no weights left"):
            small = shrink(net, torch.randn(1, 3, 6, 6))
        assert (small[1].num_features, small[4].in_features) == (5, 80)

    def test_named_layers_stay(self):
        net = Residual()
        zero(net.first, [0])
        zero(net.second, [0])
        assert count(shrink(net, torch.randn(2, 8), exclude="second")) == count(net)
        assert count(shrink(net, torch.randn(2, 8), exclude=["head"])) < count(net)


def network(name):
    net, inputs = build(name)
    prune_half_of_the_units(net, inputs)
    return net, inputs


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "mlp"])
def test_outputs_of_a_network_are_the_same_without_half_of_its_units(name):
    net, inputs = network(name)
    small = shrink(net, inputs)
    assert count(small) < (0.8 if name == "encoder" else 0.55) * count(net)
    assert_equal(small, net, inputs)
    assert_equal(small, net, torch.randn_like(inputs))
    assert_equal(small, net, torch.cat([inputs] * 3))


def test_parameters_that_stay_are_those_that_survive():
    net, inputs = network("concatenation")
    small = shrink(net, inputs)
    # 4 of 8 and 3 of 6 channels stay, 4 of 8 behind them
    assert count(small) == (4 + 3) * (27 + 1) + 2 * 7 + 4 * (7 * 9 + 1) + 4 * (4 * 36 + 1)
    net, inputs = network("encoder")
    assert shrink(net, inputs).layer.linear1.out_features == 32
    assert count(net) - count(shrink(net, inputs)) == 32 * (32 + 1 + 32)


class TestTheCopy:
    def test_the_given_module_is_untouched(self):
        net = mlp().train()
        net[2].weight.requires_grad_(False)
        zero(net[0], [0, 1])
        before = copy.deepcopy(net.state_dict())
        small = shrink(net, torch.randn(2, 8))
        assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in before.items())
        assert net.training
        assert all(part.training for part in small.modules())
        assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in net.parameters()]
        assert all(p.grad is None and p.is_leaf for p in small.parameters())
        assert not any(part._forward_hooks for part in (*net.modules(), *small.modules()))

    def test_it_trains_on(self):
        net = mlp()
        zero(net[0], range(8))
        small = shrink(net, torch.randn(2, 8))
        optimizer = torch.optim.Adam(small.parameters(), lr=0.01)
        x, y = torch.randn(64, 8), torch.randint(3, (64,))
        losses = []
        for _ in range(60):
            loss = nn.functional.cross_entropy(small(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0]

    def test_a_module_of_lightning_trains_on_with_a_new_trainer(self):
        class WithForward(Net):
            def forward(self, x):
                return self.net(x)

        net = WithForward()
        fit(net)
        zero(net.net[0], [0, 1], also=[net.net[1]])
        small = shrink(net, torch.randn(2, net.net[0].in_features))
        assert isinstance(small, WithForward)
        assert count(small) < count(net)
        fit(small)

    def test_it_exports_and_saves(self):
        net = mlp()
        zero(net[0], [0, 1])
        x = torch.randn(2, 8)
        small = shrink(net, x)
        assert torch.allclose(torch.export.export(small, (x,)).module()(x), net(x), atol=1e-6)
        file = io.BytesIO()
        torch.save(small, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), small(x))
        shrink(net, x).load_state_dict(small.state_dict())

    @pytest.mark.parametrize("form", ["tuple", "mapping"])
    def test_inputs_of_each_form(self, form):
        class Sum(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

            def forward(self, x, ids):
                return self.b(self.a(x).relu()) + ids

        net = Sum()
        zero(net.a, [0])
        inputs = {"x": torch.randn(2, 4), "ids": torch.ones(2, 1, dtype=torch.long)}
        assert shrink(net, inputs if form == "mapping" else tuple(inputs.values())).a.out_features == 5

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_it_works_where_gradients_are_off(self, mode):
        net = mlp()
        zero(net[0], [0])
        with mode():
            assert shrink(net, torch.randn(2, 8))[0].out_features == 15

    def test_the_random_state_is_left_alone(self):
        net = mlp()
        zero(net[0], [0])
        torch.manual_seed(3)
        expected = torch.randn(4)
        torch.manual_seed(3)
        shrink(net, torch.ones(2, 8))
        assert torch.equal(torch.randn(4), expected)


def assert_refused(net, inputs, reason, **options):
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=reason):
        shrink(net, inputs, **options)
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in before.items())


class TestRefused:
    @pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Softplus])
    def test_an_activation_that_does_not_keep_zeros_is_named_by_its_layer(self, activation):
        net = mlp(activation)
        zero(net[0], [0, 3])
        assert_refused(net, torch.randn(2, 8), r"The outputs .* are not those with them \(0: outputs differ by")
        assert count(shrink(net, torch.randn(2, 8), exclude="0")) == count(net)

    def test_a_remembered_size_is_named_by_its_layer(self):
        class Remembers(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

            def forward(self, x):
                return self.b(self.a(x).view(-1, 6))

        net = Remembers()
        zero(net.a, [0])
        assert_refused(net, torch.randn(2, 4), r"\(a: RuntimeError")

    @pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(6), lambda: nn.GroupNorm(2, 6)])
    def test_a_norm_over_the_units_is_named(self, norm):
        net = nn.Sequential(nn.Linear(4, 6), norm(), nn.ReLU(), nn.Linear(6, 2))
        zero(net[0], [0], also=[net[1]])
        assert_refused(net, torch.randn(2, 4), "0: 1 of its units are pruned, but 1 computes what it reads")

    def test_a_grouped_convolution_is_named(self):
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(128, 2)
        )
        zero(net[0], [0])
        assert_refused(net, torch.randn(1, 3, 8, 8), "0: 1 of its units are pruned, but 2 computes what it reads")

    def test_a_module_that_is_not_itself_twice(self):
        class Noise(nn.Module):
            def forward(self, x):
                return x + torch.randn_like(x)

        net = nn.Sequential(nn.Linear(4, 6), Noise(), nn.Linear(6, 2))
        assert_refused(net, torch.randn(2, 4), "Sequential is refused: called twice on the same inputs, outputs")

    def test_what_does_not_come_to_an_end_is_refused_by_name(self, monkeypatch):
        class Finalized:
            def __del__(self):
                """An exception in here would be lost."""

        def endless(graph, *args, **options):
            while True:
                time.sleep(0.05)  # the time is over as the finalizer is called
                Finalized()
                graph.is_out_channel_pruning_fn(None)

        monkeypatch.setattr(tp.DependencyGraph, "build_dependency", endless)
        tracer, start = sys.gettrace(), time.monotonic()
        assert_refused(mlp(), torch.randn(2, 8), "Sequential is refused: .* within 0.5 seconds", time_limit=0.5)
        assert time.monotonic() - start < 10
        assert sys.gettrace() is tracer

    def test_what_cannot_be_traced_is_refused_by_name(self):
        class Cut(nn.Sequential):
            def forward(self, x):
                return super().forward(x).detach()

        assert_refused(Cut(nn.Linear(2, 2)), torch.randn(1, 2), "Cut is refused: torch-pruning cannot trace it")

    @pytest.mark.slow
    @pytest.mark.timeout(300)
    @pytest.mark.parametrize("name", ["shufflenet_v2_x1_0", "swin_t", "maxvit_t"])
    def test_networks_that_torch_pruning_cannot_trace(self, name):
        net = getattr(pytest.importorskip("torchvision.models"), name)()
        start, size = time.monotonic(), 64 if name.startswith("shuffle") else 224
        assert_refused(net, torch.randn(1, 3, size, size), f"{type(net).__name__} is refused", time_limit=5)
        assert time.monotonic() - start < 60

    def test_without_torch_pruning_the_package_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch_pruning", None)
        with pytest.raises(ModuleNotFoundError, match='pip install "torch-pruning<2"'):
            shrink(mlp(), torch.randn(2, 8))
