"""Small Mixtral, Qwen3-MoE and OLMoE models of transformers, named ones and random ones."""

import random
from typing import Any

import torch
from reference.comparing import redraw
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
CLASSES: dict[str, tuple[type[Any], type[Any]]] = {
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM),
}
EXPERTS = {"mixtral": "num_local_experts", "qwen3_moe": "num_experts", "olmoe": "num_experts"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
EVERYWHERE: dict[str, dict[str, Any]] = {
    "as given": {},
    "one kv head": {"num_key_value_heads": 1},
    "as many kv heads": {"num_key_value_heads": 4},
    "RoPE scaling": {"rope_parameters": LLAMA3},
    "tied head": {"tie_word_embeddings": True},
    "all experts": {"num_experts_per_tok": 4},
    "gelu": {"hidden_act": "gelu"},
    "padding token": {"pad_token_id": 3},
    "large epsilon": {"rms_norm_eps": 0.1},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{kind}: {name}": (kind, changes) for kind in CLASSES for name, changes in EVERYWHERE.items()},
    "mixtral: head_dim is not dim / heads": ("mixtral", {"head_dim": 10}),
    "qwen3_moe: head_dim is not dim / heads": ("qwen3_moe", {"head_dim": 10}),
    "qwen3_moe: normalized": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3_moe: top 1": ("qwen3_moe", {"num_experts_per_tok": 1}),
    "qwen3_moe: biases": ("qwen3_moe", {"attention_bias": True}),
    "qwen3_moe: every second layer": ("qwen3_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 4}),
    "qwen3_moe: dense layers listed": ("qwen3_moe", {"mlp_only_layers": [0, 2]}),
    "qwen3_moe: both": ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [1], "num_hidden_layers": 4}),
    "qwen3_moe: all dense": ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}),
    "qwen3_moe: no experts": ("qwen3_moe", {"num_experts": 0}),
    "olmoe: no kv heads given": ("olmoe", {"num_key_value_heads": None}),
    "olmoe: normalized": ("olmoe", {"norm_topk_prob": True}),
    "olmoe: top 1": ("olmoe", {"num_experts_per_tok": 1}),
    "olmoe: biases": ("olmoe", {"attention_bias": True}),
    "olmoe: clipped": ("olmoe", {"clip_qkv": 0.7}),
    "olmoe: clipped, one kv head": ("olmoe", {"clip_qkv": 0.7, "num_key_value_heads": 1, "norm_topk_prob": True}),
}
"""Name -> kind of model, and changes of `SMALL`."""


def sample(kind: str, **changes: Any) -> PreTrainedModel:
    config_class, model_class = CLASSES[kind]
    own = {EXPERTS[kind]: 4, **({"moe_intermediate_size": 12, "head_dim": 8} if kind == "qwen3_moe" else {})}
    config = config_class(**{**SMALL, **own, **changes})
    config._experts_implementation = "eager"  # the one they call the reference
    return redraw_all(model_class(config).eval())


def redraw_all(model: PreTrainedModel) -> PreTrainedModel:
    redraw(model)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()
    return model


def random_changes(kind: str, seed: int) -> dict[str, Any]:
    draw = random.Random(f"{kind} {seed}")
    kv_heads = draw.choice([1, 2, 3])
    heads = kv_heads * draw.choice([1, 2])
    head_dim = draw.choice([4, 6, 8])
    experts = draw.choice([2, 3, 5, 8])
    changes = {
        "vocab_size": draw.choice([11, 37]),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": heads * head_dim,
        "intermediate_size": draw.choice([7, 16]),
        "num_hidden_layers": draw.choice([1, 2, 4]),
        EXPERTS[kind]: experts,
        "num_experts_per_tok": draw.randint(2, experts),
        "rope_parameters": draw.choice(
            [LLAMA3, {"rope_type": "default", "rope_theta": draw.choice([10.0, 1e4, 1e6])}, {"rope_theta": 30.0}]
        ),
        "tie_word_embeddings": draw.random() < 0.3,
        "rms_norm_eps": draw.choice([1e-6, 1e-5, 0.05]),
        "hidden_act": draw.choice(["silu", "silu", "gelu", "relu"]),
    }
    if kind != "olmoe" and draw.random() < 0.5:
        changes["head_dim"] = draw.choice([4, 6, 10])
    if kind == "qwen3_moe":
        changes.setdefault("head_dim", head_dim)
        layers = range(changes["num_hidden_layers"])
        changes["moe_intermediate_size"] = draw.choice([5, 12])
        changes["decoder_sparse_step"] = draw.choice([1, 2, 3])
        changes["mlp_only_layers"] = [i for i in layers if draw.random() < 0.3]
    if kind != "mixtral":
        changes["norm_topk_prob"] = draw.random() < 0.5
        changes["attention_bias"] = draw.random() < 0.5
    if kind == "olmoe":
        changes["clip_qkv"] = draw.choice([None, 0.5, 1.5])
    return changes


RANDOM = {f"{kind}, {seed}": (kind, random_changes(kind, seed)) for kind in CLASSES for seed in range(6)}
