"""Words beside globs: a network's output and input, its heads, routers and embeddings."""

import re

import pytest
import torch
from mixtures import Experts, language_model
from torch import nn

from lightning_sap.engine.selection import told
from lightning_sap.engine.weights import prunable_weights, verdicts_of


def excluded(module, word):
    """What a word leaves out, or takes in."""
    found = list(prunable_weights(module, include=word))
    assert [n for n, why in verdicts_of(module, exclude=word).others.items() if why == f"exclude={word!r}"] == found
    return found


class Two(nn.Module):
    """Its layers stand in another order than they are used; it has two outputs, one of them as a shortcut."""

    def __init__(self, example):
        super().__init__()
        self.last, self.box = nn.Linear(8, 3), nn.Linear(8, 4)
        self.middle, self.first = nn.Linear(8, 8), nn.utils.parametrizations.weight_norm(nn.Linear(6, 8))
        if example is not None:
            self.example_input_array = example

    def forward(self, x):
        x = self.first(x).relu()
        x = x + self.middle(x)
        return {"class": self.last(x), "boxes": [self.box(x).sigmoid()]}


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 9)
        self.embedding, self.encoder = nn.Embedding(9, 4), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.example_input_array = torch.zeros(2, 3, dtype=torch.int64)

    def forward(self, x):
        return self.head(self.encoder(self.embedding(x)))


class TestEnds:
    def test_the_graph_of_the_example_tells_both_ends(self):
        module = Two(torch.randn(2, 6))
        assert excluded(module, "output") == ["last.weight", "box.weight"]
        assert excluded(module, "input") == ["first.parametrizations.weight.original1"]

    def test_of_text_the_output_is_the_head_and_the_embedding_the_input(self):
        module = Text()
        assert excluded(module, "output") == ["head.weight"]
        assert list(prunable_weights(module, include="input")) == ["embedding.weight"]

    def test_the_forward_leaves_no_trace(self):
        module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
        module.example_input_array = torch.randn(3, 4)
        module[0].weight.requires_grad_(False)
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        state = torch.get_rng_state()
        assert excluded(module, "output") == ["3.weight"]
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
        assert [p.requires_grad for p in module.parameters()] == [False, True, True, True, True, True]
        assert module.training
        assert all(p.grad is None for p in module.parameters())

    def test_without_an_example_names_and_places_tell(self):
        module = Two(None)
        assert excluded(module, "output") == ["first.parametrizations.weight.original1"]  # the last that is registered
        assert excluded(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "input") == ["0.weight"]
        named = nn.ModuleDict({"score_head": nn.Linear(4, 2), "body": nn.Linear(4, 4)})
        assert excluded(named, "output") == ["score_head.weight"]

    def test_a_forward_that_fails_tells_nothing(self):
        module = Two(torch.randn(2, 5))
        assert excluded(module, "output") == ["first.parametrizations.weight.original1"]

    @pytest.mark.parametrize("word", ["output", "heads"])
    def test_what_timm_calls_its_classifier(self, word):
        timm = pytest.importorskip("timm")
        options = {"depth": 1, "embed_dim": 16, "num_heads": 2, "img_size": 32, "num_classes": 3}
        assert excluded(timm.create_model("deit_tiny_distilled_patch16_224", **options), word) == [
            "head.weight", "head_dist.weight",
        ]  # fmt: skip

    def test_what_transformers_calls_its_output_embeddings(self):
        assert excluded(language_model("mixtral"), "output") == ["lm_head.weight"]


class TestHeads:
    def test_heads_are_the_output_and_what_is_called_a_head(self):
        layers = {"body": nn.Linear(4, 4), "box_head": nn.Sequential(nn.Linear(4, 4)), "classifier": nn.Linear(4, 2)}
        assert excluded(nn.ModuleDict(layers), "heads") == ["box_head.0.weight", "classifier.weight"]

    def test_attention_with_several_heads_is_none(self):
        module = nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(4, 2))
        assert excluded(module, "heads") == ["1.weight"]


class TestRouters:
    def test_routers_choose_between_experts(self):
        block = nn.Module()
        block.gate, block.experts = nn.Linear(6, 4, bias=False), Experts()
        block.shared_expert = nn.ModuleDict({"gate_proj": nn.Linear(6, 4), "down_proj": nn.Linear(4, 6)})
        block.shared_expert_gate = nn.Linear(6, 1)
        assert excluded(nn.Sequential(block, nn.Linear(6, 4)), "routers") == [
            "0.gate.weight",
            "0.shared_expert_gate.weight",
        ]

    def test_routers_of_experts_in_a_list(self):
        block = nn.Module()
        block.router, block.experts = nn.Linear(6, 3), nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        assert excluded(block, "routers") == ["router.weight"]

    @pytest.mark.parametrize(("name", "router"), [("qwen3_moe", "mlp.gate"), ("gpt_oss", "mlp.router")])
    def test_routers_of_transformers(self, name, router):
        assert excluded(language_model(name), "routers") == [f"model.layers.0.{router}.weight"]


class TestWords:
    def test_embeddings_and_what_is_tied_to_them(self):
        module = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9))
        module[2].weight = module[0].weight
        assert list(prunable_weights(module)) == ["0.weight", "1.weight"]
        assert list(prunable_weights(module, exclude="embeddings")) == ["1.weight"]

    def test_a_word_that_stands_for_nothing_is_an_error(self):
        message = "'routers' in include or exclude stands for nothing in this module. Leave it out, or give globs"
        with pytest.raises(ValueError, match=re.escape(message)):
            prunable_weights(nn.Sequential(nn.Linear(4, 2)), exclude="routers")

    def test_a_parameter_of_that_very_name_comes_before_the_word(self):
        module = nn.Sequential(nn.Linear(4, 2))
        module.register_parameter("output", nn.Parameter(torch.ones(2, 2)))
        assert list(prunable_weights(module, include="output")) == ["output"]

    def test_words_stand_beside_globs_types_and_predicates(self):
        module = Two(torch.randn(2, 6))
        assert list(prunable_weights(module, exclude=["output", "middle.*"])) == [
            "first.parametrizations.weight.original1"
        ]
        assert [told(each) for each in ("a.*", nn.Linear)] == ["'a.*'", "Linear"]
