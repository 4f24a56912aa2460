"""Averaged copies inside a module: which parameters copy which."""

import copy
from typing import ClassVar

import pytest
import torch
from helpers import seeded
from timm.utils.model_ema import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_sap.engine.copies import averaged_copies, followers, parameters_of_averages
from lightning_sap.engine.weights import prunable_weights

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

    def test_of_several_sources_one_that_is_trained_before_a_nearer_one(self):
        module = nn.ModuleDict({"momentum": net(), "net": net()})
        module["ema"] = AveragedModel(module["momentum"])
        shifted(module["net"])
        assert averaged_copies(module) == pairs("ema.module", "momentum")
        assert averaged_copies(module, {"net.0.weight"}) == pairs("ema.module", "net")
        assert averaged_copies(module, {"other.weight"}) == pairs("ema.module", "momentum")

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


class TestFollowers:
    """Weights that change though they are not trained, by what the bits were before training."""

    def weights(self):
        parts = {"encoder": net(), "predictor": nn.Linear(2, 2), "momentum": nn.ModuleDict({"encoder": net()})}
        return {n: weight.parameter for n, weight in prunable_weights(nn.ModuleDict(parts)).items()}

    FIRST: ClassVar = {
        "encoder.0.weight": 1,
        "encoder.2.weight": 2,
        "predictor.weight": 3,
        "momentum.encoder.0.weight": 1,
        "momentum.encoder.2.weight": 2,
    }
    TRAINED = ("encoder.0.weight", "encoder.2.weight", "predictor.weight")

    def test_a_momentum_encoder(self):
        moved = ["momentum.encoder.0.weight", "momentum.encoder.2.weight"]
        assert followers(self.weights(), moved, self.TRAINED, self.FIRST) == {
            "momentum.encoder.0.weight": "encoder.0.weight",
            "momentum.encoder.2.weight": "encoder.2.weight",
        }

    def test_what_does_not_change_follows_nothing(self):
        assert followers(self.weights(), [], self.TRAINED, self.FIRST) == {}

    def test_one_that_began_with_other_values_follows_nothing(self):
        first = {**self.FIRST, "momentum.encoder.0.weight": 7}
        assert followers(self.weights(), ["momentum.encoder.0.weight"], self.TRAINED, first) == {}

    def test_equal_bits_of_another_shape_are_not_followed(self):
        """All zeros have the same bits."""
        first = dict.fromkeys(self.FIRST, 0)
        found = followers(self.weights(), ["momentum.encoder.0.weight"], self.TRAINED[1:], first)
        assert found == {}

    def test_of_several_that_are_equal_the_one_whose_name_ends_alike(self):
        layers = nn.ModuleDict({"x": nn.ModuleDict({"a": net(), "b": net()}), "y": nn.ModuleDict({"b": net()})})
        weights = {n: weight.parameter for n, weight in prunable_weights(layers).items()}
        first = dict.fromkeys(weights, 5)
        trained = [name for name in weights if name.startswith("x")]
        assert followers(weights, ["y.b.0.weight"], trained, first) == {"y.b.0.weight": "x.b.0.weight"}

    def test_what_joined_after_training_began_is_not_followed(self):
        first = {name: bits for name, bits in self.FIRST.items() if name != "encoder.0.weight"}
        assert followers(self.weights(), ["momentum.encoder.0.weight"], self.TRAINED, first) == {}


def test_parameters_of_averages_are_those_that_known_types_hold():
    module = nn.ModuleDict({"net": net(), "teacher": frozen(net())})
    module["ema"] = AveragedModel(module["net"])
    module["timm"] = ModelEmaV2(module["net"])
    assert parameters_of_averages(module) == [f"{path}.module.{name}" for path in ("ema", "timm") for name in NAMES]
