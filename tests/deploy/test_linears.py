"""Linears that skip zeros: the same outputs, never in a slower place, and dense wherever CSR cannot be."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_sap.deploy import linears, sparse_linears
from lightning_sap.deploy.linears import SparseLinear


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def prune(module, share):
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.data.masked_fill_(torch.rand_like(parameter.data) < share, 0)
    return module


class AsBfloat16(nn.Module):
    def forward(self, x):
        return x.bfloat16()


@pytest.fixture
def always(monkeypatch):
    """CSR is told to be faster everywhere, so that what is tested does not hang on the machine."""
    monkeypatch.setattr(linears, "_speedup", lambda dense, sparse: 2.0)


@pytest.fixture
def never(monkeypatch):
    monkeypatch.setattr(linears, "_speedup", lambda dense, sparse: 1.05)


def kinds(module):
    return [type(part).__name__ for part in module.modules() if isinstance(part, nn.Linear)]


@pytest.mark.usefixtures("always")
class TestOutputs:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("shape", [(1,), (40,), (1, 40), (2, 40), (33, 40), (5, 7, 40), (64, 40)], ids=str)
    def test_outputs_equal_those_of_the_linear(self, shape, bias, dtype):
        net = prune(nn.Sequential(nn.Linear(shape[-1], 24, bias=bias)), 0.9).to(dtype)
        x = torch.randn(shape, dtype=dtype)
        found = sparse_linears(net, x)
        assert kinds(found) == ["SparseLinear"] if shape[-1] > 1 else ["Linear", "SparseLinear"]
        y = found(x)
        assert y.is_contiguous()
        assert torch.allclose(y, net(x), rtol=0, atol=1e-6)

    def test_an_empty_row_and_an_empty_layer(self):
        net = nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 8))
        with torch.no_grad():
            net[0].weight[3:] = 0
            net[1].weight.zero_()
        x = torch.randn(9, 40)
        assert torch.allclose(sparse_linears(net, x)(x), net(x), rtol=0, atol=1e-6)

    def test_other_row_counts_and_dtypes_are_dense(self, monkeypatch):
        net = prune(nn.Sequential(nn.Linear(40, 24)), 0.9)
        found = sparse_linears(net, torch.randn(16, 40))
        assert found[0].rows == {16}
        monkeypatch.setattr(SparseLinear, "multiply", None)
        x = torch.randn(15, 40)
        assert torch.equal(found(x), F.linear(x, net[0].weight, net[0].bias))

    def test_each_row_count_of_the_example_is_measured(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(40, 40)

            def forward(self, a, b):
                return self.linear(a), self.linear(b)

        net = prune(Twice(), 0.9)
        inputs = {"a": torch.randn(4, 40), "b": torch.randn(2, 3, 40)}
        for example in (inputs, tuple(inputs.values())):
            assert sparse_linears(net, example).linear.rows == {4, 6}

    def test_a_shared_linear_stays_shared(self):
        linear = prune(nn.Linear(40, 40), 0.9)
        found = sparse_linears(nn.Sequential(linear, nn.Sequential(linear)), torch.randn(8, 40))
        assert found[0] is found[1][0]
        assert kinds(found) == ["SparseLinear"]


class TestTheModule:
    @pytest.mark.usefixtures("always")
    def test_the_given_module_is_untouched(self):
        net = prune(nn.Sequential(nn.Linear(40, 24), nn.Dropout(0.5)), 0.9)
        before = copy.deepcopy(net.state_dict())
        found = sparse_linears(net, torch.randn(8, 40))
        assert kinds(net) == ["Linear"]
        assert net.training
        assert found.training
        assert found[1].training
        assert not net[0]._forward_pre_hooks
        assert net[0].weight.requires_grad
        assert not found[0].weight.requires_grad
        for name, tensor in before.items():
            assert torch.equal(net.state_dict()[name], tensor)
            assert torch.equal(found.state_dict()[name], tensor)

    @pytest.mark.usefixtures("always")
    @pytest.mark.parametrize("way", ["deepcopy", "file", "state_dict", "double", "written"])
    def test_what_changes_the_weights_changes_the_outputs(self, way):
        net = prune(nn.Sequential(nn.Linear(40, 24)), 0.9)
        x = torch.randn(8, 40)
        found, expected = sparse_linears(net, x), net(x)
        if way == "deepcopy":
            found = copy.deepcopy(found)
        elif way == "file":
            file = io.BytesIO()
            torch.save(found, file)
            file.seek(0)
            found = torch.load(file, weights_only=False)
        elif way == "state_dict":
            other = prune(nn.Sequential(nn.Linear(40, 24)), 0.9)
            found.load_state_dict(other.state_dict())
            expected = other(x)
        elif way == "double":
            found, x = found.double(), x.double()
            expected = net.double()(x)
        else:
            found[0].weight.mul_(2)
            expected = F.linear(x, net[0].weight * 2, net[0].bias)
            assert not found[0]._is_packed(x)
        if way != "written":
            assert found[0]._is_packed(x)
        assert torch.allclose(found(x), expected, rtol=0, atol=1e-6)

    @pytest.mark.usefixtures("always")
    def test_with_gradients_it_is_dense(self):
        net = prune(nn.Sequential(nn.Linear(40, 24)), 0.9)
        found = sparse_linears(net, torch.randn(8, 40))
        x = torch.randn(8, 40, requires_grad=True)
        found(x).sum().backward()
        assert torch.allclose(x.grad, net[0].weight.sum(0).expand(8, -1), atol=1e-6)

    @pytest.mark.usefixtures("never")
    def test_where_csr_is_not_clearly_faster_the_linear_stays(self):
        net = prune(nn.Sequential(nn.Linear(40, 24)), 0.9)
        assert kinds(sparse_linears(net, torch.randn(8, 40))) == ["Linear"]

    def test_where_the_whole_module_is_slower_all_stays(self, monkeypatch):
        said = iter([2.0, 2.0, 0.9])
        monkeypatch.setattr(linears, "_speedup", lambda dense, sparse: next(said))
        net = prune(nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 8)), 0.9)
        assert kinds(sparse_linears(net, torch.randn(8, 40))) == ["Linear", "Linear"]

    @pytest.mark.usefixtures("always")
    def test_what_is_not_sparse_or_no_plain_linear_stays(self):
        net = nn.Sequential(nn.Linear(40, 40), AsBfloat16(), prune(nn.Linear(40, 40), 0.9).bfloat16())
        assert kinds(sparse_linears(net, torch.randn(8, 40))) == ["Linear", "Linear"]

    @pytest.mark.usefixtures("always")
    def test_an_encoder_layer_of_a_transformer(self):
        net = prune(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 0.9).eval()
        x = torch.randn(2, 7, 32)
        found = sparse_linears(net, x)
        assert "SparseLinear" in kinds(found)
        with torch.no_grad():
            assert torch.allclose(found(x), net(x), rtol=0, atol=1e-6)

    @pytest.mark.usefixtures("always")
    def test_it_works_inside_inference_mode(self):
        net = prune(nn.Sequential(nn.Linear(40, 24)), 0.9)
        with torch.inference_mode():
            x = torch.randn(8, 40)
            assert torch.allclose(sparse_linears(net, x)(x), net(x), rtol=0, atol=1e-6)

    def test_a_linear_elsewhere_than_on_the_cpu_is_refused(self):
        with pytest.raises(ValueError, match=r"is for the CPU, and a Linear is on meta: module\.cpu\(\)"):
            sparse_linears(nn.Linear(4, 4, device="meta"), torch.randn(1, 4))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_a_stack_of_linears_gives_the_same_outputs_whatever_is_faster(rows):
    layers = [part for _ in range(6) for part in (nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768), nn.GELU())]
    net, x = prune(nn.Sequential(*layers), 0.9).eval(), torch.randn(rows, 768)
    found = sparse_linears(net, x)
    with torch.no_grad():
        assert torch.allclose(found(x), net(x), rtol=0, atol=1e-6)
