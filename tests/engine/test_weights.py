"""Which parameters are prunable, by which name, and what their units are."""

import re

import pytest
import torch
from helpers import Net, copied, fit, same, seeded, survivors
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import weight_norm as old_weight_norm

from lightning_sap import FixedFraction, PruningCallback
from lightning_sap.engine.weights import LOSES_ZEROS, left_out, low_rank_adapters, parameter_names, prunable_weights


def names(module, include=None, exclude=None):
    return list(prunable_weights(module, include, exclude))


class Table(nn.Module):
    """A weight and a bias of two dimensions."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.zeros(4, 4))


def block():
    return nn.Sequential(
        nn.Embedding(7, 4),  # 0
        nn.Conv1d(4, 4, 3),  # 1
        nn.BatchNorm1d(4),  # 2
        Table(),  # 3
        nn.Linear(4, 2),  # 4
    )


class Tied(nn.Module):
    """A head that shares the embedding's weight."""

    def __init__(self, head_first=False):
        super().__init__()
        if head_first:
            self.head = nn.Linear(4, 7, bias=False)
        self.embedding = nn.Embedding(7, 4)
        if not head_first:
            self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight


class Odd(nn.Module):
    """Parameters of its own, of all sorts."""

    def __init__(self):
        super().__init__()
        self.weight_table = nn.Parameter(torch.ones(3, 3))
        self.reweighted = nn.Parameter(torch.ones(3, 3))
        self.scale = nn.Parameter(torch.ones(3, 3))
        self.weight_vector = nn.Parameter(torch.ones(3))
        self.frozen_weight = nn.Parameter(torch.ones(3, 3), requires_grad=False)
        self.int_weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int64), requires_grad=False)
        self.complex_weight = nn.Parameter(torch.ones(3, 3, dtype=torch.complex64))
        self.register_buffer("weight_buffer", torch.ones(3, 3))


class Spectral(nn.Module):
    """Weights frequencies."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 4, dtype=torch.complex64))

    def forward(self, x):
        return torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=x.shape[-1])


class TestDefault:
    def test_default_selects_trainable_weights_of_two_dimensions_without_embeddings(self):
        assert names(block()) == ["1.weight", "3.weight", "4.weight"]

    def test_default_goes_by_the_parameters_own_name(self):
        assert names(Odd()) == ["weight_table", "reweighted"]

    def test_a_module_called_weight_does_not_make_its_parameters_weights(self):
        module = nn.Module()
        module.weight_net = Odd()
        assert names(module) == ["weight_net.weight_table", "weight_net.reweighted"]

    @pytest.mark.parametrize(
        ("build", "expected"),
        [
            (lambda: nn.Conv2d(4, 4, 3, groups=2), ["weight"]),
            (lambda: nn.ConvTranspose2d(4, 4, 3), ["weight"]),
            (lambda: nn.EmbeddingBag(5, 3), []),
            (lambda: nn.MultiheadAttention(4, 2), ["in_proj_weight", "out_proj.weight"]),
            (
                lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
                ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
            ),
            (lambda: nn.LSTM(3, 2), ["weight_ih_l0", "weight_hh_l0"]),
            (lambda: nn.GRU(3, 2, 2, bidirectional=True), [
                f"weight_{kind}_l{layer}{way}" for layer in (0, 1) for way in ("", "_reverse") for kind in ("ih", "hh")
            ]),
            (lambda: nn.Bilinear(2, 3, 4), ["weight"]),
            (lambda: nn.LSTM(3, 4, proj_size=2), ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"]),
        ],
    )  # fmt: skip
    def test_default_selects_weights_of_layers(self, build, expected):
        module = nn.Sequential(build(), nn.Linear(2, 2))
        assert names(module) == [*(f"0.{name}" for name in expected), "1.weight"]

    def test_default_selects_weights_of_a_transformer(self):
        module = nn.TransformerEncoderLayer(4, 2, 8)
        assert names(module) == [
            "self_attn.in_proj_weight",
            "self_attn.out_proj.weight",
            "linear1.weight",
            "linear2.weight",
        ]

    def test_frozen_parameters_are_left_out_even_where_included(self):
        module = block()
        module[1].requires_grad_(False)
        assert names(module) == ["3.weight", "4.weight"]
        assert names(module, include="*weight") == ["0.weight", "3.weight", "4.weight"]

    def test_default_leaves_out_a_lazy_layer_before_its_first_forward(self):
        module = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
        assert names(module) == ["1.weight"]
        module(torch.ones(1, 3))
        assert names(module) == ["0.weight", "1.weight"]

    @pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
    def test_default_leaves_out_what_has_no_elements(self):
        assert list(prunable_weights(nn.Sequential(nn.Linear(0, 4), nn.Linear(4, 0), nn.Linear(4, 2)))) == ["2.weight"]


class TestIncludeAndExclude:
    @pytest.mark.parametrize(
        ("include", "exclude", "expected"),
        [
            ("*", None, ["0.weight", "1.weight", "3.weight", "3.bias", "4.weight"]),
            ("0.weight", None, ["0.weight"]),
            (["0.*", "4.*"], None, ["0.weight", "4.weight"]),
            ("[14].weight", None, ["1.weight", "4.weight"]),
            ("?.weight", "1.*", ["0.weight", "3.weight", "4.weight"]),
            (None, "4.weight", ["1.weight", "3.weight"]),
            (None, ["4.weight", "1*"], ["3.weight"]),
            (nn.Linear, None, ["4.weight"]),
            ([nn.Embedding, nn.Linear], None, ["0.weight", "4.weight"]),
            (None, Table, ["1.weight", "4.weight"]),
            (None, nn.modules.conv._ConvNd, ["3.weight", "4.weight"]),
            ([nn.Embedding, "4.*"], None, ["0.weight", "4.weight"]),
            (nn.Sequential, None, ["0.weight", "1.weight", "3.weight", "3.bias", "4.weight"]),
            (lambda name, module, parameter: parameter.numel() > 20, None, ["0.weight", "1.weight"]),
            (None, lambda name, module, parameter: isinstance(module, nn.Conv1d), ["3.weight", "4.weight"]),
            (["4.*", lambda name, module, parameter: name == "3.bias"], None, ["3.bias", "4.weight"]),
            (None, [], ["1.weight", "3.weight", "4.weight"]),
        ],
    )
    def test_include_and_exclude_match_names_types_and_predicates(self, include, exclude, expected):
        assert names(block(), include, exclude) == expected

    def test_include_of_an_empty_list_matches_nothing(self):
        with pytest.raises(ValueError, match=re.escape("no prunable weight with include=[]")):
            names(block(), include=[])

    @pytest.mark.parametrize(
        ("path", "kind"),
        [
            ("torch.nn.Linear", nn.Linear),
            ("torch.nn.modules.linear.Linear", nn.Linear),
            ("torch.nn.modules.conv._ConvNd", nn.modules.conv._ConvNd),
            (f"{__name__}.Tied", Tied),
        ],
    )
    def test_a_dotted_path_of_a_module_type_counts_as_the_type(self, path, kind):
        module = nn.ModuleDict({"tied": Tied(), "block": block()})
        assert names(module, include=[path]) == names(module, include=[kind])
        assert names(module, exclude=path) == names(module, exclude=kind)
        assert names(module, exclude=path) != names(module)

    def test_a_dotted_path_that_is_the_name_of_a_parameter_stays_one(self):
        module = nn.ModuleDict({"torch": nn.ModuleDict({"nn": nn.Module()}), "other": nn.Linear(2, 2)})
        module["torch"]["nn"].Linear = nn.Parameter(torch.ones(2, 2))
        assert names(module, include="torch.nn.Linear") == ["torch.nn.Linear"]

    def test_no_module_is_imported_for_a_pattern(self, tmp_path, monkeypatch):
        (tmp_path / "encoder.py").write_text("raise RuntimeError('imported')")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ValueError, match=r"The pattern 'encoder\.Layer' matches no parameter"):
            names(block(), include="encoder.Layer")

    def test_include_by_a_type_around_the_owner_counts(self):
        module = nn.ModuleDict({"encoder": nn.TransformerEncoderLayer(4, 2, 8), "head": nn.Linear(4, 2)})
        assert names(module, exclude=nn.TransformerEncoderLayer) == ["head.weight"]
        assert names(module, include=nn.MultiheadAttention) == [
            "encoder.self_attn.in_proj_weight",
            "encoder.self_attn.out_proj.weight",
        ]

    def test_include_never_lifts_the_rules_on_dimensions_and_training(self):
        assert names(Odd(), include="*") == ["weight_table", "reweighted", "scale"]

    def test_include_patterns_are_case_sensitive(self):
        module = nn.ModuleDict({"FC": nn.Linear(2, 2), "fc": nn.Linear(2, 2)})
        assert names(module, include="FC.*") == ["FC.weight"]

    def test_a_predicate_is_asked_with_name_owner_and_parameter(self):
        module, asked = block(), []
        names(module, include=lambda *arguments: asked.append(arguments) or True)
        assert ("4.weight", module[4], module[4].weight) in asked
        assert all(isinstance(parameter, nn.Parameter) for _, _, parameter in asked)


class TestMistakes:
    def test_include_pattern_without_a_match_is_refused(self):
        message = (
            "The pattern 'linear.weight' matches no parameter. Patterns are globs on whole parameter names (say "
            "'*.fc.*'); the closest names are ["
        )
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            names(block(), include="linear.weight")
        closest = re.findall(r"'([^']*)'", str(error.value).split("closest names are")[1])
        assert set(closest) == {"0.weight", "1.weight", "3.weight", "3.bias", "4.weight"}  # of two dimensions

    @pytest.mark.parametrize("pattern", ["0.wieght", "torch.nn.Linaer", "no.such.Type", "torch.nn.functional.relu"])
    @pytest.mark.parametrize("option", ["include", "exclude"])
    def test_the_closest_names_are_those_that_can_be_pruned(self, option, pattern):
        module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2).requires_grad_(False))
        message = f"The pattern {pattern!r} matches no parameter."
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            names(module, **{option: pattern})
        assert str(error.value).endswith("the closest names are ['0.weight'].")

    def test_what_include_selects_and_cannot_be_pruned_is_told_with_the_reason(self):
        with pytest.raises(ValueError, match="no prunable weight") as error:
            names(Odd(), include=["complex_weight", "weight_vector", "frozen_weight", "int_weight"])
        assert str(error.value).endswith(
            " Selected, but not prunable: 'weight_vector' (it has fewer than two dimensions), 'frozen_weight' (it is "
            "frozen), 'int_weight' (it is frozen), 'complex_weight' (it is complex)."
        )

    def test_a_predicate_is_not_asked_about_what_has_too_few_dimensions(self):
        assert names(block(), include=lambda name, module, parameter: parameter.shape[1] == 4) == [
            "0.weight", "1.weight", "3.weight", "3.bias", "4.weight",
        ]  # fmt: skip

    @pytest.mark.parametrize("include", [None, "*", "net.0.*", lambda name, *_: True])
    def test_a_complex_parameter_is_warned_of(self, include):
        network = nn.Sequential(Spectral(), nn.Linear(6, 3))
        pruner = PruningCallback(FixedFraction(0.5), rounds=1, include=include and [include, "net.1.weight"])
        message = (
            "sap: these are complex, and are not pruned: net.0.weight. Hold real and imaginary parts as two real "
            "parameters to prune them, or leave them out with exclude=['net.0.weight']."
        )
        with pytest.warns(UserWarning, match="not pruned") as caught:
            fit(Net(network), pruner, max_epochs=2)
        assert [text for w in caught if (text := str(w.message)).startswith("sap: these")] == [message]
        assert survivors(pruner) == {"net.1.weight": 9}

    def test_model_without_parameters_is_refused(self):
        with pytest.raises(ValueError, match=re.escape("The first parameters of the model are [].")):
            names(nn.ReLU())


class TestTied:
    @pytest.mark.parametrize("head_first", [False, True])
    def test_an_embedding_tied_with_a_head_is_prunable_once(self, head_first):
        module = Tied(head_first)
        (name,) = names(module)
        assert name == next(iter(dict(module.named_parameters())))
        assert prunable_weights(module)[name].parameter is module.embedding.weight

    @pytest.mark.parametrize("pattern", ["head.*", "embedding.*", nn.Embedding, nn.Linear])
    def test_tied_weight_is_matched_by_any_of_its_names_and_owners(self, pattern):
        assert names(Tied(), include=pattern) == ["embedding.weight"]
        with pytest.raises(ValueError, match="no prunable weight"):
            names(Tied(), exclude=pattern)

    def test_shared_layer_counts_once(self):
        layer = nn.Linear(3, 3)
        assert names(nn.Sequential(layer, nn.ReLU(), layer)) == ["0.weight"]

    def test_tied_weight_is_pruned_once(self):
        network = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False), nn.Linear(6, 3, bias=False))
        network[1].weight = network[0].weight
        module, pruner = Net(network), PruningCallback(FixedFraction(0.5), rounds=1)
        fit(module, pruner, max_epochs=2)
        assert survivors(pruner) == {"net.0.weight": 18, "net.2.weight": 9}
        assert pruner.remaining == 0.5
        assert torch.equal(network[1].weight != 0, pruner.masks["net.0.weight"])


class TestParametrized:
    def test_weight_norm_only_the_full_size_original(self):
        module = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2))
        assert names(module) == ["0.parametrizations.weight.original1", "1.weight"]
        assert module[0].parametrizations.weight.original0.shape == (3, 1)

    def test_weight_norm_of_the_old_kind(self):
        with pytest.warns(FutureWarning, match="weight_norm"):
            module = nn.Sequential(old_weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2))
        assert names(module) == ["0.weight_v", "1.weight"]
        assert module[0].weight_g.shape == (3, 1)

    def test_a_weight_that_is_called_like_a_magnitude_by_chance(self):
        module = nn.Module()
        module.weight_g = nn.Parameter(torch.ones(3, 3))
        assert names(module) == ["weight_g"]

    def test_spectral_norm(self):
        module = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3)), nn.Linear(3, 2))
        before = copied(module.state_dict())
        assert names(module) == ["0.parametrizations.weight.original", "1.weight"]
        assert same(module.state_dict(), before)  # looking at the weight takes no power iteration

    def test_parametrized_weights_go_by_the_parametrized_name(self):
        module = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Embedding(5, 4))
        parametrizations.weight_norm(module[1])
        assert names(module) == ["0.parametrizations.weight.original1"]  # an embedding stays one
        assert names(module, include="1.weight") == ["1.parametrizations.weight.original1"]
        assert names(module, include="0.weight") == ["0.parametrizations.weight.original1"]
        assert names(module, include="*.original1", exclude="1.weight") == ["0.parametrizations.weight.original1"]

    def test_a_parametrized_bias_is_no_weight(self):
        class Flat(nn.Module):
            def forward(self, x):
                return x.flatten()

            def right_inverse(self, x):
                return x.reshape(1, -1)

        module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        parametrize.register_parametrization(module[0], "bias", Flat())
        assert names(module) == ["0.weight", "1.weight"]

    def test_parametrized_weights_are_masked_through_a_whole_fit(self):
        network = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3))
        keys = list(Net(network).state_dict())
        module, pruner = Net(network), PruningCallback(FixedFraction(0.5), rounds=2, rewind_weights="init")
        fit(module, pruner, max_epochs=3)
        assert list(module.state_dict()) == keys
        mask = pruner.masks["net.0.parametrizations.weight.original1"]
        assert int(mask.sum()) == 12
        assert torch.equal(network[0].weight != 0, mask)


class Applied(nn.Module):
    """A parametrization by a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)

    def right_inverse(self, x):
        return x


def parametrized(function, layer=None):
    """Such a layer and a plain one."""
    layer = seeded(lambda: nn.Linear(4, 3)) if layer is None else layer
    parametrize.register_parametrization(layer, "weight", Applied(function), unsafe=True)
    return nn.Sequential(layer, nn.Linear(3, 2))


def mirrored(x):
    """Its upper triangle on both sides of the diagonal: a zero below the diagonal changes nothing."""
    return x.triu() + x.triu(1).mT


ORIGINAL = "0.parametrizations.weight.original"


class TestZerosOfParametrizedWeights:
    @pytest.mark.parametrize(
        "function",
        [
            lambda x: x * 2, torch.tanh, torch.relu, lambda x: x * x.abs(), nn.functional.hardshrink,
            lambda x: x / x.norm(), lambda x: x / x.norm(dim=1, keepdim=True),
        ],
        ids=["scale", "tanh", "relu", "odd", "shrink", "norm", "norm of rows"],
    )  # fmt: skip
    def test_where_they_stay_zeros_it_is_prunable(self, function):
        module = parametrized(function)
        assert names(module) == [ORIGINAL, "1.weight"]
        assert left_out(module) == {}

    @pytest.mark.parametrize(
        "function",
        [
            nn.functional.softplus, torch.exp, torch.sigmoid, lambda x: x - x.mean(), lambda x: x - x.mean(1, True),
            lambda x: x.flip(0), lambda x: x.roll(1), lambda x: x + 1e-30,
        ],
        ids=["softplus", "exp", "sigmoid", "centred", "centred rows", "turned", "moved", "nearly zero"],
    )  # fmt: skip
    def test_where_they_do_not_it_is_left_out(self, function):
        module = parametrized(function)
        assert names(module) == ["1.weight"]
        assert left_out(module) == {ORIGINAL: LOSES_ZEROS}

    @pytest.mark.parametrize("size", range(2, 9))
    def test_a_mirrored_weight_is_left_out(self, size):
        assert names(parametrized(mirrored, seeded(lambda: nn.Linear(size, size)))) == ["1.weight"]

    @pytest.mark.parametrize("shape", [(2, 1), (1, 2), (3, 1), (7, 5), (2, 3, 1, 1), (40, 2)])
    def test_a_centred_weight_of_any_shape_is_left_out(self, shape):
        layer = nn.Linear(1, 1)
        layer.weight = nn.Parameter(seeded(lambda: torch.randn(shape)))
        assert names(parametrized(lambda x: x - x.mean(), layer)) == ["1.weight"]

    @pytest.mark.parametrize("way", ["matrix_exp", "cayley", "householder"])
    def test_an_orthogonal_weight_is_left_out(self, way):
        module = nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map=way), nn.Linear(4, 2))
        assert names(module) == ["1.weight"]

    def test_a_product_of_two_factors_is_left_out(self):
        class Product(nn.Module):
            def forward(self, left, right):
                return left @ right

            def right_inverse(self, x):
                return x, torch.eye(x.shape[1])

        module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        parametrize.register_parametrization(module[0], "weight", Product())
        assert names(module) == ["1.weight"]

    @pytest.mark.parametrize("layer", [lambda: nn.Conv2d(3, 3, 1, groups=3), lambda: nn.Linear(2, 40)])
    def test_rows_of_one_or_two_weights_may_be_normalised(self, layer):
        """Without any weight they are not a number, which is no zero that changed."""
        module = nn.Sequential(parametrizations.weight_norm(layer()), nn.Linear(3, 2))
        assert names(module, exclude="*original0") == ["0.parametrizations.weight.original1", "1.weight"]

    @pytest.mark.parametrize("start", [torch.zeros_like, torch.ones_like])
    def test_constant_weights_tell_nothing(self, start):
        """Zeros stay zeros in a centred weight of zeros, for now."""
        module = parametrized(lambda x: x - x.mean())
        with torch.no_grad():
            original = module[0].parametrizations.weight.original
            original.copy_(start(original))
        assert names(module) == ["1.weight"]

    def test_a_function_that_refuses_zeros_is_left_out(self):
        def refuse(x):
            if (x == 0).sum() > 1:
                raise ValueError("zeros")
            return x

        assert names(parametrized(refuse)) == ["1.weight"]

    @pytest.mark.parametrize("function", [torch.tanh, nn.functional.softplus])
    def test_trying_changes_nothing(self, function):
        module = parametrized(function)
        module[0].parametrizations.weight.eval()
        tensors, modes = copied(module.state_dict()), [part.training for part in module.modules()]
        parameters = list(module.parameters())
        names(module)
        assert same(module.state_dict(), tensors)
        assert [part.training for part in module.modules()] == modes
        assert all(one is other for one, other in zip(module.parameters(), parameters, strict=True))
        assert all(parameter.grad is None for parameter in parameters)

    def test_a_whole_fit_prunes_the_others_and_says_why(self):
        network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        parametrize.register_parametrization(network[0], "weight", Applied(nn.functional.softplus), unsafe=True)
        module, pruner = Net(network), PruningCallback(FixedFraction(0.5), rounds=2)
        message = (
            "sap: these are parametrized such that a zero in them is none in the weight that the layer uses, and are "
            "not pruned: net.0.parametrizations.weight.original. Call "
            "parametrize.remove_parametrizations(module.get_submodule('net.0'), 'weight') before fit to prune the "
            "weight itself, or leave them out with exclude=['net.0.parametrizations.weight.original']."
        )
        with pytest.warns(UserWarning, match="not pruned") as caught:
            fit(module, pruner, max_epochs=3)
        assert [text for w in caught if (text := str(w.message)).startswith("sap: these")] == [message]
        assert survivors(pruner) == {"net.2.weight": 6}
        parametrize.remove_parametrizations(module.get_submodule("net.0"), "weight")
        assert names(module) == ["net.0.weight", "net.2.weight"]

    def test_what_is_excluded_is_not_warned_of(self):
        network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        parametrize.register_parametrization(network[0], "weight", Applied(nn.functional.softplus), unsafe=True)
        pruner = PruningCallback(FixedFraction(0.5), rounds=1, exclude="net.0.weight")
        fit(Net(network), pruner, max_epochs=2)
        assert survivors(pruner) == {"net.2.weight": 12}


class TestUnits:
    def test_units_are_along_axis_0_unless_told(self):
        module = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Linear(2, 3), nn.ConvTranspose1d(2, 3, 3))
        found = prunable_weights(module)
        assert [weight.units is None for weight in found.values()] == [True, True, False]

    def test_units_of_a_transposed_convolution_with_groups(self):
        """in 4, out 6, groups 2: weight (4, 3, 2); unit (g, j) is inputs 2g and 2g + 1 at output index j."""
        module = nn.Sequential(nn.ConvTranspose1d(4, 6, 2, groups=2))
        weight = prunable_weights(module)["0.weight"]
        numbers = torch.arange(24).reshape(4, 3, 2)
        expected = [
            [numbers[2 * g + i, j, k].item() for i in range(2) for k in range(2)] for g in range(2) for j in range(3)
        ]
        assert weight.units(numbers).tolist() == expected

    @pytest.mark.parametrize("groups", [1, 2, 4])
    def test_a_unit_is_what_feeds_one_output_channel(self, groups):
        layer = nn.ConvTranspose2d(4, 8, 3, groups=groups, bias=False)
        units = prunable_weights(layer)["weight"].units
        for channel in range(8):
            with torch.no_grad():
                layer.weight.zero_()
                rows = torch.zeros(8, layer.weight.numel() // 8)
                rows[channel] = 1.0
                position = units(torch.arange(layer.weight.numel()).reshape(layer.weight.shape))
                layer.weight.view(-1)[position[channel]] = 1.0
                output = layer(torch.ones(1, 4, 5, 5))[0]
            assert [int(output[c].any()) for c in range(8)] == [int(c == channel) for c in range(8)]

    def test_units_of_a_parametrized_transposed_convolution(self):
        module = nn.Sequential(parametrizations.weight_norm(nn.ConvTranspose1d(4, 6, 2, groups=2)))
        weight = prunable_weights(module)["0.parametrizations.weight.original1"]
        assert weight.units(weight.parameter).shape == (6, 4)

    def test_neuron_scope_prunes_every_unit_alike_in_a_whole_fit(self):
        class Net1d(Net):
            def loss(self, batch):
                return (self.net(batch[0][:, :, None]).mean(2) - batch[1]).square().mean()

        network = nn.Sequential(
            nn.ConvTranspose1d(6, 4, 2, groups=2), nn.Conv1d(4, 4, 2, groups=2), nn.Flatten(1), nn.Linear(4, 3),
            nn.Unflatten(1, (3, 1)),
        )  # fmt: skip
        module, pruner = Net1d(network), PruningCallback(FixedFraction(0.5), rounds=1, scope="neuron")
        fit(module, pruner, max_epochs=2)
        masks = pruner.masks
        units = prunable_weights(module)["net.0.weight"].units(masks["net.0.weight"])
        assert units.sum(1).tolist() == [3] * 4
        assert masks["net.1.weight"].flatten(1).sum(1).tolist() == [2] * 4
        assert masks["net.3.weight"].sum(1).tolist() == [2] * 3


class TestCompiled:
    def test_compiled_prefixes_are_ignored(self):
        plain, whole, part = block(), torch.compile(block()), block()
        part[4] = torch.compile(part[4])
        for module in (whole, part):
            assert names(module) == names(plain)
            assert names(module, include="4.*") == ["4.weight"]
            assert list(parameter_names(module)) == [name for name, _ in plain.named_parameters()]

    def test_compiled_modules_parameter_is_the_modules_own(self):
        module = block()
        compiled = torch.compile(module)
        assert prunable_weights(compiled)["4.weight"].parameter is module[4].weight

    def test_types_and_units_are_seen_through_compiled_modules(self):
        module = nn.Sequential(torch.compile(nn.ConvTranspose1d(4, 6, 2)), nn.Linear(2, 2))
        assert names(module, exclude=nn.ConvTranspose1d) == ["1.weight"]
        assert prunable_weights(module)["0.weight"].transposed_groups == 1


class LoRALinear(nn.Module):
    """A linear layer that stays as it is, and what is learnt beside it, of rank 2; named as given."""

    def __init__(self, a="down", b="up", dims=(8, 6), transposed=False):
        super().__init__()
        self.a, self.b = a, b
        self.weight = nn.Parameter(torch.randn(*dims[::-1]), requires_grad=False)
        shapes = [(dims[0], 2), (2, dims[1])] if transposed else [(2, dims[0]), (dims[1], 2)]
        for name, shape in zip((a, b), shapes, strict=True):
            setattr(self, f"{name}_weight", nn.Parameter(torch.randn(shape)))


def adapted():
    """A layer with low-rank adapters of peft, and one that is trained whole."""
    module = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 6))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), module)
    module[1].requires_grad_(True)
    return module


class Siblings(nn.Module):
    def __init__(self, base, down, up):
        super().__init__()
        self.base, self.down, self.up = base.requires_grad_(False), down, up


def adapters(module, **selection):
    return low_rank_adapters(module, prunable_weights(module, **selection))


class TestLowRankAdapters:
    def test_adapters_are_found_as_peft_names_them(self):
        module = adapted()
        assert adapters(module) == ["0.lora_A.default.weight", "0.lora_B.default.weight"]

    @pytest.mark.parametrize("transposed", [False, True])
    def test_adapters_are_found_by_hand_beside_the_weight(self, transposed):
        module = nn.Sequential(LoRALinear(transposed=transposed), nn.Linear(6, 3))
        assert adapters(module) == ["0.down_weight", "0.up_weight"]

    @pytest.mark.parametrize(
        ("base", "down", "up"),
        [
            (nn.Linear(8, 6), nn.Linear(8, 2), nn.Linear(2, 6)),
            (nn.Conv2d(8, 6, 3), nn.Conv2d(8, 2, 3), nn.Conv2d(2, 6, 1)),
            (nn.Embedding(8, 6), nn.Linear(8, 2), nn.Linear(2, 6)),
        ],
        ids=["linear", "convolution", "embedding"],
    )
    def test_adapters_are_found_as_modules_beside_a_frozen_one(self, base, down, up):
        assert adapters(nn.Sequential(nn.Linear(3, 8), Siblings(base, down, up))) == ["1.down.weight", "1.up.weight"]

    def test_adapters_are_found_only_where_they_are_pruned(self):
        module = adapted()
        assert adapters(module, exclude="*lora_*") == []
        assert adapters(module, exclude="*lora_A*") == ["0.lora_B.default.weight"]

    def test_adapters_are_not_factors_of_full_rank(self):
        assert adapters(Siblings(nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 6))) == []

    def test_adapters_are_none_where_nothing_is_frozen(self):
        layer = Siblings(nn.Linear(8, 6), nn.Linear(8, 2), nn.Linear(2, 6)).requires_grad_(True)
        assert adapters(layer) == []

    def test_adapters_are_not_a_frozen_backbone_and_its_head(self):
        backbone = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 6)).requires_grad_(False)
        assert adapters(nn.Sequential(backbone, nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))) == []
