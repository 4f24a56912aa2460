"""Mixtures of experts: in one tensor, as transformers keeps them, and its own small ones."""

import pytest
import torch
from torch import nn


class Experts(nn.Module):
    """Experts in one tensor, as transformers keeps them: ``(out, in)`` each, or ``(in, out)``."""

    def __init__(self, experts=4, hidden=6, inner=5, inputs_first=False, says=True):
        super().__init__()
        self.num_experts = experts
        if says:
            self.is_transposed = inputs_first
        up, down = (experts, 2 * inner, hidden), (experts, hidden, inner)
        if inputs_first:
            up, down = (up[0], *up[:0:-1]), (down[0], *down[:0:-1])
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(up)), nn.Parameter(torch.randn(down))
        self.gate_up_proj_bias = nn.Parameter(torch.randn(experts, 2 * inner))


MIXTURES = {
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 4, "moe_intermediate_size": 8, "num_experts_per_tok": 2}, False),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "intermediate_size": 8}, False),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "intermediate_size": 8}, True),
}


def language_model(name, **more):
    transformers = pytest.importorskip("transformers")
    kind, options, _ = MIXTURES[name]
    if not hasattr(transformers, kind):
        pytest.skip(f"this version of transformers has no {kind}")
    sizes = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "vocab_size": 32, "head_dim": 8, **options, **more,
    }  # fmt: skip
    config = getattr(transformers, kind)(**sizes)
    return transformers.AutoModelForCausalLM.from_config(config)
