"""A model of random weights and a context that nobody wrote: times without weights, data or a prefill.

Values are normal, and so are keys, half of their variance common to the 16 tokens of a page. Over a context, the logits
of a query head have a standard deviation of 3.6 to 4.5, another for each; the query heads of a group correlate by
0.64. It is what `twilight bench` and peers.py read. How many tokens are kept depends on it; no model is claimed to be
like that.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ..model import Model, Prefix

PAGE = 16
SHARED = 0.5  # of a key's variance, within a page
SPREADS = (3.6, 4.5)
CORRELATION = 0.64

SHAPES = {
    "llama-3.1-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=1 << 18,
    ),
    "tiny": LlamaConfig(
        vocab_size=256,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1 << 18,
    ),
}


def make(shape: str, device: str, dtype: str) -> Model:
    """Makes a model of one of SHAPES, whose own attention is torch's SDPA."""
    torch.manual_seed(1)
    config: Any = SHAPES[shape]
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")
        query_heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        spread = torch.linspace(*SPREADS, query_heads).view(kv_heads, -1, 1, 1)
        # What RMSNorm leaves has a mean square of 1, which makes these the deviations of queries and keys.
        unit = 1 / math.sqrt(config.hidden_size)
        for layer in model.model.layers:
            own = torch.randn(kv_heads, query_heads // kv_heads, dim, config.hidden_size)
            common = torch.randn(kv_heads, 1, dim, config.hidden_size)
            query = math.sqrt(CORRELATION) * common + math.sqrt(1 - CORRELATION) * own
            layer.self_attn.q_proj.weight.data.copy_((unit * spread * query).flatten(0, 2))
            layer.self_attn.k_proj.weight.data.normal_(0, unit)
            layer.self_attn.v_proj.weight.data.normal_(0, unit)
    return Model.of(shape, model, None)


def context(model: Model, tokens: int) -> Prefix:
    """Makes keys and values of so many tokens, in the model's memory."""
    own = model.model
    config = own.config
    shape = (1, config.num_key_value_heads, tokens, config.head_dim)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=own.device, dtype=own.dtype)

    layers = []
    for _ in range(config.num_hidden_layers):
        keys = math.sqrt(1 - SHARED) * normal(*shape)
        pages = math.sqrt(SHARED) * normal(*shape[:2], -(-tokens // PAGE), shape[3])
        keys += pages.repeat_interleave(PAGE, 2)[:, :, :tokens]
        layers.append((keys, normal(*shape)))
    return Prefix(layers, [0] * tokens)
