"""Small Llama 4 models of transformers with weights at a scale at which mistakes show."""

from typing import Any

import torch
from torch import nn
from transformers import Llama4Config, Llama4ForCausalLM, Llama4ForConditionalGeneration, Llama4TextConfig

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 16,
    "intermediate_size_mlp": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 4,
    "floor_scale": 4,
    "attn_scale": 0.5,
    "max_position_embeddings": 256,
}
ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "original_max_position_embeddings": 32}
NO_BAND = {**ROPE, "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0}
BAND = {**ROPE, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {**ROPE, "rope_type": "yarn", "factor": 8.0, "beta_fast": 8.0, "beta_slow": 1.0, "truncate": False}

CASES: dict[str, dict[str, Any]] = {
    "maverick": {"use_qk_norm": False},
    "scout": {"interleave_moe_layer_step": 1, "rope_parameters": NO_BAND},
    "RoPE scaling with a band": {"rope_parameters": BAND},
    "YaRN": {"use_qk_norm": False, "rope_parameters": YARN},
    "top 2": {"num_experts_per_tok": 2},
    "every expert": {"num_experts_per_tok": 4},
    "one expert": {"num_local_experts": 1},
    "MoE layers listed": {"moe_layers": [0, 3]},
    "no MoE layer": {"moe_layers": []},
    "MoE every third layer": {"interleave_moe_layer_step": 3},
    "NoPE layers listed": {"no_rope_layers": [0, 1, 1, 0]},
    "NoPE every second layer": {"no_rope_layer_interval": 2},
    "NoPE everywhere": {"no_rope_layer_interval": 1},
    "masks listed": {
        "layer_types": ["full_attention", "chunked_attention", "full_attention", "chunked_attention"],
        "no_rope_layers": [1, 0, 0, 1],
    },
    "no temperature": {"attn_temperature_tuning": False},
    "temperature from the first token": {"floor_scale": 1, "attn_scale": 1.0},
    "chunks longer than the text": {"attention_chunk_size": 64},
    "chunks of two": {"attention_chunk_size": 2},
    "one kv head": {"num_key_value_heads": 1},
    "as many kv heads": {"num_key_value_heads": 4},
    "head_dim is not dim / heads": {"head_dim": 10},
    "biases": {"attention_bias": True},
    "tied head": {"tie_word_embeddings": True},
    "gelu": {"hidden_act": "gelu"},
    "gelu_new": {"hidden_act": "gelu_new"},
    "relu2": {"hidden_act": "relu2"},
    "padding token": {"pad_token_id": 3},
    "large epsilon": {"rms_norm_eps": 0.1},
}


@torch.no_grad()
def redraw(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.normal_(std=0.5)
        elif "norm" in name:
            p.normal_(std=0.25).add_(1)
        elif "embed" in name:
            p.normal_()
        else:  # dim 1 is the fan-in of Linear and of the stacked experts
            p.normal_(std=1.4 * p.size(1) ** -0.5)


def llama4(**changes: Any) -> Llama4ForCausalLM:
    model = Llama4ForCausalLM(Llama4TextConfig(**{**SMALL, **changes})).eval()
    redraw(model)
    return model


def llama4_with_vision(**changes: Any) -> Llama4ForConditionalGeneration:
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vision_output_dim": 16,
        "image_size": 8,
        "patch_size": 2,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
    }
    config = Llama4Config(text_config={**SMALL, **changes}, vision_config=vision)
    model = Llama4ForConditionalGeneration(config).eval()
    redraw(model.language_model)
    return model
