"""Tiny random models of each family."""

from __future__ import annotations

import torch
import transformers as t

torch.set_num_threads(1)  # the models are tiny

_COMMON = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}

FAMILIES = {
    "llama": (t.LlamaForCausalLM, t.LlamaConfig, {}),
    "mistral": (t.MistralForCausalLM, t.MistralConfig, {"sliding_window": None}),
    "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config, {}),
    "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config, {"head_dim": 32}),
    "gemma3": (
        t.Gemma3ForCausalLM,
        t.Gemma3TextConfig,
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 40,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
    ),
    "phi": (t.PhiForCausalLM, t.PhiConfig, {"partial_rotary_factor": 0.5}),
}


def make(family: str, attention: str = "sdpa") -> t.PreTrainedModel:
    kind, config, more = FAMILIES[family]
    torch.manual_seed(0)
    model = kind(config(**_COMMON, **more, attn_implementation=attention)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.15)  # so that attention is not all alike
    return model


def prompts(batch: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Prompts of different lengths, padded on the left."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 199, (batch, length), generator=rng)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : 7 * row] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}
