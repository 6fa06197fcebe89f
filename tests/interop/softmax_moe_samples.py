"""Small Mixtral, Qwen3-MoE, OLMoE and gpt-oss models of transformers, named ones and random ones."""

import random
from typing import Any

import torch
from reference.comparing import redraw
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
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
    "gpt_oss": (GptOssConfig, GptOssForCausalLM),
}
EXPERTS = {
    "mixtral": "num_local_experts",
    "qwen3_moe": "num_experts",
    "olmoe": "num_experts",
    "gpt_oss": "num_local_experts",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 50.0,
    "factor": 4.0,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
    "original_max_position_embeddings": 16,
}
OWN: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {"moe_intermediate_size": 12, "head_dim": 8},
    "olmoe": {},
    # a window, a limit and an original length that are small enough to be crossed
    "gpt_oss": {
        "head_dim": 8,
        "sliding_window": 4,
        "swiglu_limit": 1.0,
        "rope_parameters": {**YARN, "truncate": False},
    },
}
EVERYWHERE: dict[str, dict[str, Any]] = {
    "as given": {},
    "one kv head": {"num_key_value_heads": 1},
    "as many kv heads": {"num_key_value_heads": 4},
    "RoPE scaling": {"rope_parameters": LLAMA3},
    "YaRN": {"rope_parameters": YARN},
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
    "gpt_oss: no biases": ("gpt_oss", {"attention_bias": False}),
    "gpt_oss: a window of one": ("gpt_oss", {"sliding_window": 1}),
    "gpt_oss: a window longer than the text": ("gpt_oss", {"sliding_window": 50}),
    "gpt_oss: full layers alone": ("gpt_oss", {"layer_types": ["full_attention"] * 3}),
    "gpt_oss: windows alone": ("gpt_oss", {"layer_types": ["sliding_attention"] * 3}),
    "gpt_oss: windows last": ("gpt_oss", {"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}),
    "gpt_oss: another gate": ("gpt_oss", {"swiglu_alpha": 0.9, "swiglu_limit": 0.4}),
    "gpt_oss: plain RoPE": ("gpt_oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 20.0}}),
    "gpt_oss: head_dim is not dim / heads": ("gpt_oss", {"head_dim": 10}),
    "gpt_oss: loud YaRN": ("gpt_oss", {"rope_parameters": {**YARN, "attention_factor": 1.7, "beta_fast": None}}),
    "gpt_oss: two mscales": ("gpt_oss", {"rope_parameters": {**YARN, "mscale": 1.5, "mscale_all_dim": 0.5}}),
}
"""Name -> kind of model, and changes of `SMALL`."""


def sample(kind: str, **changes: Any) -> PreTrainedModel:
    config_class, model_class = CLASSES[kind]
    given = {**SMALL, EXPERTS[kind]: 4, **OWN[kind], **changes}
    if kind == "mixtral" and given.get("rope_parameters", {}).get("rope_type") == "yarn":
        width = given["hidden_size"] // given["num_attention_heads"]
        given.setdefault("head_dim", width)  # theirs does not run on null
    config = config_class(**given)
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
    changes: dict[str, Any] = {
        "vocab_size": draw.choice([11, 37]),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": heads * head_dim,
        "intermediate_size": draw.choice([7, 16]),
        "num_hidden_layers": draw.choice([1, 2, 4]),
        EXPERTS[kind]: experts,
        "num_experts_per_tok": draw.randint(2, experts),
        "rope_parameters": draw.choice(
            [LLAMA3, YARN, {"rope_type": "default", "rope_theta": draw.choice([10.0, 1e4, 1e6])}, {"rope_theta": 30.0}]
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
    if kind == "gpt_oss":
        changes.setdefault("head_dim", head_dim)
        kinds = ["sliding_attention", "full_attention"]
        changes["layer_types"] = [draw.choice(kinds) for _ in range(changes["num_hidden_layers"])]
        changes["sliding_window"] = draw.choice([1, 2, 5, 12, 40])
        changes["swiglu_limit"] = draw.choice([0.5, 2.0, 7.0])
        changes["swiglu_alpha"] = draw.choice([1.0, 1.702])
    if kind in ("qwen3_moe", "olmoe"):
        changes["norm_topk_prob"] = draw.random() < 0.5
    if kind != "mixtral":
        changes["attention_bias"] = draw.random() < 0.5
    if kind == "olmoe":
        changes["clip_qkv"] = draw.choice([None, 0.5, 1.5])
    return changes


RANDOM = {f"{kind}, {seed}": (kind, random_changes(kind, seed)) for kind in CLASSES for seed in range(6)}
