"""Hugging Face's layers: which axis of their weights holds the output units."""

import torch
from helpers import Net, fit
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from lightning_sap import FixedFraction, PruningCallback
from lightning_sap.engine.weights import prunable_weights


def test_a_unit_of_conv1d_is_a_column_of_its_weight():
    """Its weight is (in, out)."""
    module = nn.Sequential(Conv1D(3, 4), nn.Linear(3, 2))
    weights = prunable_weights(module)
    numbers = torch.arange(12).reshape(4, 3)
    assert weights["0.weight"].units(numbers).tolist() == numbers.T.tolist()
    assert weights["1.weight"].units is None


def test_gpt2_loses_weights_of_every_output_unit_alike():
    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)

    class Language(Net):
        def loss(self, batch):
            tokens = (batch[0].abs() * 7).long().clamp(max=10)
            return self.net(tokens, labels=tokens).loss

    module, pruner = (
        Language(GPT2LMHeadModel(config)),
        PruningCallback(FixedFraction(0.5), rounds=1, scope="neuron", exclude="*wte*"),
    )
    fit(module, pruner, max_epochs=2)
    kept = {name.removeprefix("net.transformer.h.0."): mask for name, mask in pruner.masks.items()}
    assert set(kept) == {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
    assert all(mask.sum(0).tolist() == [mask.shape[0] // 2] * mask.shape[1] for mask in kept.values())
