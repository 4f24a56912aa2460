"""What is a weight: a matrix that acts on an input; tried on layers of all kinds, and on models that people train."""

import oracle
import pytest
import torch
from mixtures import MIXTURES, Experts, language_model
from torch import nn
from torch_geometric.nn import RGCNConv

from lightning_sap import FixedFraction
from lightning_sap.engine.decision import decide
from lightning_sap.engine.groups import PrunableTensor
from lightning_sap.engine.matrices import EMBEDDING, NAMELESS, OF_NORM, TABLE, VECTOR, Layout
from lightning_sap.engine.patterns import Pattern, decide_pattern
from lightning_sap.engine.weights import prunable_weights, verdicts_of


class Holder(nn.Module):
    """One parameter under a name."""

    def __init__(self, name, *shape, **attributes):
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        vars(self).update(attributes)


def reason(module):
    """Why its first parameter is left out; None where it is pruned."""
    verdicts, name = verdicts_of(module), next(name for name, _ in module.named_parameters())
    return {**verdicts.others, **dict.fromkeys(verdicts.found)}[name]


class TestRule:
    @pytest.mark.parametrize(
        ("module", "expected"),
        [
            (Holder("task_weights", 3, 1), VECTOR),
            (Holder("weight", 1, 8, 1, 1), VECTOR),  # layer scale over channels
            (Holder("weight", 1, 5, 8), TABLE),  # positions, over a batch
            (Holder("position_weight", 1, 5, 8), TABLE),
            (Holder("temperature", 1, 1), NAMELESS),
            (Holder("pos_embed", 1, 5, 8), NAMELESS),
            (Holder("gamma", 8, 8), NAMELESS),
            (nn.LayerNorm((4, 4)), OF_NORM),
            (nn.RMSNorm((4, 4)), OF_NORM),
            (nn.Embedding(5, 3), EMBEDDING),
            (Holder("weight", 4, 3), None),
            (Holder("adapter_weight", 4, 3), None),
            (Holder("weight", 1, 8, in_features=8), None),
            (Holder("weight", 8, 1, in_channels=1), None),
            (nn.Linear(8, 1), None),
            (nn.Linear(1, 8), None),
            (nn.Conv2d(1, 8, 1), None),
            (nn.Conv2d(8, 8, 1, groups=8), None),
            (nn.ConvTranspose1d(1, 1, 3), None),
            (nn.Bilinear(3, 2, 1), None),
            (nn.GRU(1, 1), None),
            (nn.LSTMCell(1, 1), None),
        ],
    )
    def test_a_matrix_acts_on_an_input(self, module, expected):
        assert reason(module) == expected

    def test_include_takes_what_the_rule_leaves_out(self):
        assert list(prunable_weights(Holder("task_weights", 3, 1), include="task_weights")) == ["task_weights"]


MODELS = {
    "torchvision vit": (
        lambda tv, timm: tv.VisionTransformer(16, 8, 1, 2, 16, 16, num_classes=3),
        {"class_token": NAMELESS, "encoder.pos_embedding": NAMELESS},
    ),
    "torchvision swin": (
        lambda tv, timm: tv.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [2, 2], num_classes=3),
        {f"features.{i}.0.attn.relative_position_bias_table": NAMELESS for i in (1, 3)},
    ),
    "torchvision convnext": (
        lambda tv, timm: tv.ConvNeXt([tv.convnext.CNBlockConfig(8, w, 1) for w in (8, None)], num_classes=3),
        {f"features.{i}.0.layer_scale": NAMELESS for i in (1, 3)},
    ),
    "timm deit with two heads": (
        lambda tv, timm: timm.create_model(
            "deit_tiny_distilled_patch16_224", depth=1, embed_dim=16, num_heads=2, img_size=32, num_classes=3
        ),
        {"cls_token": NAMELESS, "pos_embed": NAMELESS, "dist_token": NAMELESS},
    ),
    "timm eva with gates": (
        lambda tv, timm: timm.create_model(
            "eva02_tiny_patch14_224", depth=1, embed_dim=16, num_heads=2, img_size=28, num_classes=3
        ),
        {"cls_token": NAMELESS, "pos_embed": NAMELESS},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_of_vision_models_exactly_the_matrices_are_pruned(name):
    """Linears and convolutions are; tokens, tables of positions and layer scales are not."""
    torchvision, timm = pytest.importorskip("torchvision"), pytest.importorskip("timm")
    build, left = MODELS[name]
    module = build(torchvision.models, timm)
    layers = [n for n, part in module.named_modules() if isinstance(part, nn.Linear | nn.modules.conv._ConvNd)]
    verdicts = verdicts_of(module)
    own = {"self_attention.in_proj_weight", "self_attention.out_proj.weight"}
    found = {n for n in verdicts.found if not any(n.endswith(end) for end in own)}
    assert found == {f"{n}.weight" for n in layers if not n.endswith("self_attention.out_proj")}
    assert {n: r for n, r in verdicts.others.items() if dict(module.named_parameters())[n].dim() > 1} == left


class TestExperts:
    @pytest.mark.parametrize("says", [True, False])
    @pytest.mark.parametrize("inputs_first", [False, True])
    def test_experts_in_one_tensor_are_matrices_and_units_are_outputs_of_each(self, inputs_first, says):
        module = Experts(inputs_first=inputs_first, says=says)
        found = prunable_weights(module)
        assert {n: w.layout for n, w in found.items()} == dict.fromkeys(
            ["gate_up_proj", "down_proj"], Layout(1, inputs_first)
        )
        up = found["gate_up_proj"]
        units = up.units(up.parameter)
        assert units.shape == (4 * 10, 6)
        row = module.gate_up_proj[1, :, 3] if inputs_first else module.gate_up_proj[1, 3]
        assert torch.equal(units[10 + 3], row)

    def test_in_scope_layer_each_expert_is_a_group(self):
        module = Experts()
        with torch.no_grad():
            module.gate_up_proj[2] *= 1e-3  # alone it would lose all
        tensors = tensors_of(module)
        found = decide(tensors, policy=FixedFraction(0.5), scope="layer", round=1)
        assert found.masks.kept["gate_up_proj"].flatten(1).sum(1).tolist() == [30] * 4
        alone = {str(e): module.down_proj[e].detach().numpy() for e in range(4)}
        expected = oracle.prune_masks(alone, amount=lambda w: oracle.fraction_count(w, 0.5), scope="layer")
        assert all((found.masks.kept["down_proj"][e].numpy() == expected[str(e)]).all() for e in range(4))

    @pytest.mark.parametrize("inputs_first", [False, True])
    def test_in_scope_neuron_each_output_of_each_expert_is_a_group(self, inputs_first):
        tensors = tensors_of(Experts(inputs_first=inputs_first))
        mask = decide(tensors, policy=FixedFraction(0.5), scope="neuron", round=1).masks.kept["gate_up_proj"]
        assert (mask.sum(1 if inputs_first else 2) == 3).all()

    @pytest.mark.parametrize("inputs_first", [False, True])
    def test_a_pattern_runs_along_the_inputs_of_each_expert(self, inputs_first):
        weights = prunable_weights(Experts(hidden=8, inner=6, inputs_first=inputs_first))
        pattern = Pattern(2, 4)
        assert {name: pattern.fits(weight) for name, weight in weights.items()} == {
            "gate_up_proj": True, "down_proj": False,
        }  # fmt: skip
        up = tensors_of(Experts(hidden=8, inner=6, inputs_first=inputs_first))["gate_up_proj"]
        mask = decide_pattern({"up": up}, pattern, 0.5, 1.0).masks.kept["up"]
        inputs = mask.transpose(1, 2) if inputs_first else mask
        assert (inputs.reshape(4, 12, 2, 4).sum(3) == 2).all()

    def test_floors_hold_in_each_output_of_each_expert(self):
        module = Experts(inputs_first=True)
        with torch.no_grad():
            module.down_proj[:, :, 0] *= 1e-3
        tensors = tensors_of(module, least=1)
        mask = decide(tensors, policy=FixedFraction(0.7), scope="layer", round=1).masks.kept["down_proj"]
        assert (mask.sum(1) >= 1).all()

    def test_a_matrix_for_each_relation_and_one_for_the_node_itself(self):
        module = RGCNConv(4, 5, 3, num_bases=2)
        found = prunable_weights(module)
        assert {n: w.layout for n, w in found.items()} == {"weight": Layout(1, True), "root": Layout(0, True, 1)}
        assert found["root"].units(found["root"].parameter).shape == (5, 4)
        assert verdicts_of(module).others["comp"] == NAMELESS

    def test_the_blocks_of_a_relation_are_matrices_of_their_own(self):
        module = RGCNConv(4, 6, 3, num_blocks=2)  # a relation has two blocks, of two inputs and three outputs
        found = prunable_weights(module)
        assert {n: w.layout for n, w in found.items()} == {"weight": Layout(2, True), "root": Layout(0, True, 1)}
        assert torch.equal(found["weight"].units(module.weight)[4], module.weight[0, 1, :, 1])
        masks = decide(tensors_of(module), policy=FixedFraction(0.5), scope="layer", round=1).masks.kept
        assert masks["weight"].sum((2, 3)).tolist() == [[3, 3]] * 3
        masks = decide(tensors_of(module), policy=FixedFraction(0.5), scope="neuron", round=1).masks.kept
        assert masks["weight"].sum(2).unique().tolist() == [1]
        pattern = Pattern(1, 2)
        assert pattern.fits(found["weight"])
        masks = decide_pattern(tensors_of(module), pattern, 0.5, 1.0).masks.kept
        assert masks["weight"].sum(2).unique().tolist() == [1]


def tensors_of(module, least=0):
    return {
        n: PrunableTensor(w.parameter.detach(), None, w.units, floors=w.floors(least), layout=w.layout)
        for n, w in prunable_weights(module).items()
    }


@pytest.mark.parametrize("name", MIXTURES)
def test_the_experts_of_transformers_are_pruned_each_as_a_group(name):
    module = language_model(name)
    found = prunable_weights(module)
    experts = {n: w for n, w in found.items() if ".experts." in n}
    if not all(w.parameter.dim() == 3 for w in experts.values()):
        pytest.skip("this version of transformers keeps each expert in a module of its own")
    assert [n.rpartition(".")[2] for n in experts] == ["gate_up_proj", "down_proj"]
    inputs_first = MIXTURES[name][2]
    assert {w.layout for w in experts.values()} == {Layout(1, inputs_first)}
    masks = decide(tensors_of(module), policy=FixedFraction(0.5), scope="layer", round=1).masks.kept
    for name, weight in experts.items():
        assert masks[name].flatten(1).sum(1).tolist() == [weight.parameter[0].numel() // 2] * 4
