"""Small DeepSeek-V3 models of transformers, named ones and random ones."""

import random
from typing import Any

import torch
from reference.comparing import redraw
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

SMALL: dict[str, Any] = {
    "vocab_size": 41,
    "hidden_size": 24,
    "intermediate_size": 20,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 9,
    "q_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 7,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0, "original_max_position_embeddings": 16}
YARNS = [
    YARN,
    YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 8, "beta_slow": 0.5},
    YARN | {"mscale": 0.7, "mscale_all_dim": 1.6},
    YARN | {"mscale_all_dim": 2.0},
    YARN | {"attention_factor": 0.8, "mscale_all_dim": 0.5, "truncate": False},
]
CASES: dict[str, dict[str, Any]] = {
    "as given": {},
    "no latent of the queries": {"q_lora_rank": None},
    "halves, biases": {"rope_interleave": False, "attention_bias": True},
    "scores not normalized": {"norm_topk_prob": False, "routed_scaling_factor": 0.7},
    "top 1": {"norm_topk_prob": False, "num_experts_per_tok": 1},
    "one group": {"n_group": 1, "topk_group": 1},
    "all groups": {"topk_group": 4, "num_experts_per_tok": 8},
    "three shared experts": {"n_shared_experts": 3},
    "no dense layer": {"first_k_dense_replace": 0},
    "dense layers only": {"first_k_dense_replace": 5},
    "tied head, padding token": {"tie_word_embeddings": True, "pad_token_id": 3},
    "RoPE scaling": {"rope_parameters": LLAMA3},
    **{f"YaRN {i}": {"rope_parameters": yarn, "v_head_dim": 12} for i, yarn in enumerate(YARNS)},
}
"""Name -> changes of `SMALL`."""


def sample(**changes: Any) -> DeepseekV3ForCausalLM:
    config = DeepseekV3Config(**{**SMALL, **changes})
    config._experts_implementation = "eager"  # the one they call the reference
    model = DeepseekV3ForCausalLM(config).eval()
    redraw(model)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.3)
    return model


def random_changes(seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    heads, groups, size = draw.choice([1, 2, 3, 4]), draw.choice([1, 2, 3, 4]), draw.choice([2, 3, 4])
    used = draw.randint(1, groups)
    normalized = draw.random() < 0.6
    theta = draw.choice([10.0, 1e4, 1e6])
    return {
        "vocab_size": draw.choice([11, 37]),
        "hidden_size": draw.choice([16, 25, 40]),
        "intermediate_size": draw.choice([7, 16]),
        "moe_intermediate_size": draw.choice([5, 12]),
        "num_hidden_layers": draw.choice([1, 2, 4]),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([heads, None]),
        "n_routed_experts": groups * size,
        "n_group": groups,
        "topk_group": used,
        "num_experts_per_tok": draw.randint(2 if normalized else 1, used * size),
        "norm_topk_prob": normalized,
        "n_shared_experts": draw.choice([1, 1, 2]),
        "routed_scaling_factor": draw.choice([1.0, 2.5, 0.3]),
        "first_k_dense_replace": draw.choice([0, 0, 1, 2, 4]),
        "kv_lora_rank": draw.choice([3, 8, 30]),
        "q_lora_rank": draw.choice([None, 5, 12]),
        "qk_nope_head_dim": draw.choice([1, 4, 7]),
        "qk_rope_head_dim": draw.choice([2, 4, 6]),
        "v_head_dim": draw.choice([2, 5, 12]),
        "rope_interleave": draw.random() < 0.6,
        "attention_bias": draw.random() < 0.4,
        "tie_word_embeddings": draw.random() < 0.3,
        "rms_norm_eps": draw.choice([1e-6, 1e-5, 0.05]),
        "hidden_act": draw.choice(["silu", "silu", "gelu", "relu"]),
        "rope_parameters": draw.choice(
            [LLAMA3, {"rope_type": "default", "rope_theta": theta}, {"rope_theta": 30.0}, *YARNS]
        ),
    }


RANDOM = {f"random {seed}": random_changes(seed) for seed in range(8)}
