"""Averaged copies inside a module: which parameters copy which."""

import copy

import pytest
import torch
from helpers import seeded
from timm.utils.model_ema import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_sap.engine.copies import averaged_copies, possible_copies

NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")


def net(seed=0):
    return seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), seed)


def frozen(module):
    return copy.deepcopy(module).requires_grad_(False)


def pairs(copied, source):
    return {f"{copied}.{name}": f"{source}.{name}" for name in NAMES}


def shifted(module):
    """Other values, as an average has after a while."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.01)
    return module


class TestOfKnownTypes:
    @pytest.mark.parametrize(
        "average",
        [AveragedModel, lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9)), ModelEmaV2, ModelEmaV3],
        ids=["AveragedModel", "EMA", "timm V2", "timm V3"],
    )
    @pytest.mark.parametrize("now", [lambda m: m, shifted], ids=["at the start", "later"])
    def test_a_copy_of_a_part(self, average, now):
        module = nn.ModuleDict({"net": net(), "head": nn.Linear(2, 2)})
        module["ema"] = now(average(module["net"]))
        assert averaged_copies(module) == pairs("ema.module", "net")

    def test_a_copy_of_the_whole(self):
        module = nn.ModuleDict({"net": net(), "head": nn.Linear(2, 2)})
        module["ema"] = shifted(AveragedModel(module))
        expected = {f"ema.module.{name}": name for name, _ in module.named_parameters() if not name.startswith("ema")}
        assert len(expected) == 6
        assert averaged_copies(module) == expected

    def test_of_two_sources_the_nearer(self):
        module = nn.ModuleDict({"one": net(1), "two": net(2)})
        module["ema"] = shifted(AveragedModel(module["two"]))
        module["other"] = shifted(AveragedModel(module["one"]))
        assert averaged_copies(module) == pairs("ema.module", "two") | pairs("other.module", "one")

    def test_two_copies_of_one_source(self):
        module = nn.ModuleDict({"fast": AveragedModel(net()), "net": net(), "slow": AveragedModel(net())})
        assert averaged_copies(module) == pairs("fast.module", "net") | pairs("slow.module", "net")

    def test_a_copy_whose_source_is_not_in_the_module(self):
        assert averaged_copies(nn.ModuleDict({"ema": AveragedModel(net()), "head": nn.Linear(2, 2)})) == {}

    @pytest.mark.parametrize("compiled_first", [True, False])
    def test_of_a_compiled_module(self, compiled_first):
        plain = net()
        compiled = torch.compile(plain)
        module = nn.ModuleDict({"net": compiled, "ema": AveragedModel(compiled if compiled_first else plain)})
        assert averaged_copies(module) == pairs("ema.module", "net")

    def test_of_a_module_with_a_compiled_layer(self):
        module = nn.ModuleDict({"net": net()})
        module["ema"] = AveragedModel(module["net"])
        module["net"][2] = torch.compile(module["net"][2])
        assert averaged_copies(module) == pairs("ema.module", "net")


class TestByTheirValues:
    def test_a_momentum_encoder(self):
        module = nn.ModuleDict({"encoder": net(), "predictor": nn.Linear(2, 2)})
        module["momentum"] = frozen(module["encoder"])
        assert possible_copies(module) == pairs("momentum", "encoder")

    def test_one_that_requires_gradients_and_is_in_no_optimizer(self):
        module = nn.ModuleDict({"encoder": net(), "momentum": net()})
        assert possible_copies(module) == {}
        assert possible_copies(module, module["encoder"].parameters()) == pairs("momentum", "encoder")

    def test_copies_of_two_parts_in_a_container_of_their_own(self):
        module = nn.ModuleDict({"encoder": net(1), "projector": net(2)})
        module["averages"] = nn.ModuleList([frozen(module["projector"]), frozen(module["encoder"])])
        assert possible_copies(module) == pairs("averages.0", "projector") | pairs("averages.1", "encoder")

    def test_one_in_another_precision(self):
        module = nn.ModuleDict({"net": net().bfloat16()})
        module["average"] = frozen(module["net"]).float()
        assert possible_copies(module) == pairs("average", "net")

    @pytest.mark.parametrize(
        "other",
        [
            lambda: net(1).requires_grad_(False),  # a teacher
            lambda: frozen(nn.Sequential(net(1)[0], nn.ReLU(), net()[2])[:2]),  # another beginning
            lambda: nn.Sequential(net(), frozen(nn.Linear(2, 2))),  # trained but for another part
        ],
        ids=["a teacher", "another beginning", "trained"],
    )
    def test_what_is_no_copy(self, other):
        assert possible_copies(nn.ModuleDict({"net": net(), "other": other()})) == {}

    def test_the_part_that_is_equal(self):
        """A teacher may share its beginning."""
        module = nn.ModuleDict({"net": net(), "other": frozen(nn.Sequential(*net()[:2], nn.Linear(3, 5)))})
        assert possible_copies(module) == {"other.0.weight": "net.0.weight", "other.0.bias": "net.0.bias"}

    @pytest.mark.parametrize("average", [AveragedModel, ModelEmaV2, ModelEmaV3])
    def test_what_certainly_is_one_is_not_among_them(self, average):
        module = nn.ModuleDict({"net": net()})
        module["ema"] = average(module["net"])
        assert possible_copies(module) == possible_copies(module, module["net"].parameters()) == {}

    def test_equal_constants_make_no_copy(self):
        module = nn.Sequential(nn.LayerNorm(3), nn.LayerNorm(3), nn.Linear(3, 3), nn.Linear(3, 3))
        for layer in module[2:]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        module[1].requires_grad_(False)
        module[3].requires_grad_(False)
        assert possible_copies(module) == {}

    def test_a_whole_before_its_parts(self):
        module = nn.ModuleDict({"early": copy.deepcopy(net()[0]), "net": net(), "momentum": frozen(net())})
        assert possible_copies(module) == pairs("momentum", "net")

    def test_the_source_is_no_average_itself(self):
        module = nn.ModuleDict({"ema": AveragedModel(net()), "net": net(), "momentum": frozen(net())})
        assert possible_copies(module) == pairs("momentum", "net")

    def test_a_lazy_module_is_passed_over(self):
        module = nn.ModuleDict({"lazy": nn.LazyLinear(2), "layer": seeded(lambda: nn.Linear(3, 2))})
        module["average"] = frozen(module["layer"])
        assert possible_copies(module) == {"average.weight": "layer.weight", "average.bias": "layer.bias"}
