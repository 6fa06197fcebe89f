"""What the config.json files of all supported architectures have in common, and how a decoder is compared with one."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from moesaic.config import flatten, from_mapping, to_mapping
from moesaic.errors import InputError
from moesaic.layers import ActivationName, Llama3RopeScaling, RopeScaling, YarnRopeScaling
from moesaic.models import AttentionConfig, DecoderConfig

__all__ = [
    "ACTIVATION_OF",
    "INERT",
    "activation_name",
    "defining",
    "known_values",
    "read_rope",
    "with_intervals",
    "write_rope",
]

ACTIVATION_OF: dict[str, ActivationName] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",  # the next three are the same formula, spelled out
    "gelu_fast": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "sigmoid": "sigmoid",
    "linear": "linear",
}
"""transformers' name -> the name in `moesaic.layers.ACTIVATIONS`; of several, the first one is written."""

INERT = {
    # identity and storage
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "for_llm_compressor",
    "max_position_embeddings", "task_specific_params", "problem_type", "torchscript", "use_bfloat16", "tf_legacy_loss",
    "id2label", "label2id", "num_labels", "finetuning_task", "tokenizer_class", "prefix",
    # token ids and what generate() and the outputs do with the logits
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "use_cache",
    "return_dict", "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_router_logits",
    "output_scores", "do_sample", "temperature", "top_k", "top_p", "typical_p", "num_beams", "num_beam_groups",
    "num_return_sequences", "max_length", "min_length", "early_stopping", "length_penalty", "diversity_penalty",
    "repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens",
    "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty",
    "remove_invalid_values", "cache_implementation",
    # of other kinds of model, in every config file of transformers 4
    "is_decoder", "is_encoder_decoder", "add_cross_attention", "cross_attention_hidden_size", "tie_encoder_decoder",
    "pruned_heads", "chunk_size_feed_forward",
    # of the training loss, which is not in the model
    "router_aux_loss_coef",
}  # fmt: skip
"""Fields that say nothing about the function that the weights compute: kept for the way back."""


ROUTER_DEFAULTS = (
    ("moe.router.scale", 1.0),
    ("moe.router.bias", False),
    ("moe.router.scored_by", 2),
    ("moe.router.logit_scale", 1.0),
)
"""Arguments of a router with which it is what it is without them."""


def known_values(config: Mapping[str, Any], known: set[str], inert: set[str], title: str) -> dict[str, Any]:
    """The fields of config.json that are in `known`.

    Raises:
        InputError: a field that is in neither set, and has a value. It may change the model.
    """
    if quantization := config.get("quantization_config"):
        raise InputError(
            f"config.json: quantization_config={quantization!r}: must be absent, as only floating-point weights are "
            "read; let transformers dequantize them first, and save that model"
        )
    unknown = [
        key for key in config if key not in known | inert and not key.startswith("_") and config[key] is not None
    ]
    if unknown:
        raise InputError(
            f"config.json: {', '.join(f'{key}={config[key]!r}' for key in unknown)}: not a field of {title} that is "
            "understood here; if it does not change the model, remove it from the file"
        )
    return {key: config[key] for key in known if key in config}


def with_intervals(config: DecoderConfig, step: int, interval: int) -> DecoderConfig:
    """The same layers as Llama 4's two intervals, which read better than a list, if these give them."""
    for moe_step, nope_interval in ((step, interval), (step, 0), (0, interval), (0, 0)):
        shorter = dataclasses.replace(
            config, pattern=None, interleave_moe_layer_step=moe_step, nope_layer_interval=nope_interval
        )
        if shorter.layers == config.layers:
            return shorter
    return config


def read_rope(
    fields: Any, default_theta: float, max_length: int, default: Mapping[str, Any] | None = None
) -> tuple[float, RopeScaling | None]:
    """theta and scaling from rope_parameters (transformers 5) or rope_scaling and rope_theta (before).

    Args:
        fields: has attributes rope_parameters, rope_scaling and rope_theta.
        max_length: positions that the model was made for, where the scaling does not say.
        default: what rope_parameters are where nothing is said.

    Raises:
        InputError: a kind of RoPE that is not supported, or a value that is impossible.
    """
    name = "rope_scaling" if fields.rope_scaling else "rope_parameters"
    said = default if fields.rope_parameters is None else fields.rope_parameters
    given = dict(fields.rope_scaling or said or {})
    theta = given.pop("rope_theta", fields.rope_theta)
    theta = default_theta if theta is None else theta
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 1 <= theta <= 1e15:
        raise InputError(f"config.json: rope_theta={theta!r}: must be a number from 1 to 1e15")
    legacy = given.pop("type", None)
    kind = given.pop("rope_type", legacy) or "default"
    if kind not in ("default", "llama3", "yarn"):
        raise InputError(f"config.json.{name}: found rope_type={kind!r}; must be one of default, llama3, yarn")
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"config.json.{name}: found a partial_rotary_factor; must be 1.0 (all of head_dim)")
    if kind == "default":
        original = {"original_max_position_embeddings"}  # written by some tools, without effect
        if given.keys() - original:
            raise InputError(f"config.json.{name}: found {sorted(given.keys() - original)} with rope_type default")
        return theta, None
    given["original_length"] = given.pop("original_max_position_embeddings", None) or max_length
    if kind == "yarn":
        return theta, from_mapping(YarnRopeScaling, _yarn(given, max_length), f"config.json.{name}")
    return theta, from_mapping(Llama3RopeScaling, given, f"config.json.{name}")


def _yarn(given: dict[str, Any], max_length: int) -> dict[str, Any]:
    """The fields of `YarnRopeScaling`, with what transformers makes of none, null or 0, and of its two mscales."""
    scale, scale_of_all = given.pop("mscale", None), given.pop("mscale_all_dim", None)
    defaults: dict[str, Any] = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
    found = {key: defaults[key] if not x and key.startswith("beta") else x for key, x in (defaults | given).items()}
    length = found["original_length"]
    if "factor" in found and found["factor"] is None and isinstance(length, (int, float)) and length:
        found["factor"] = max_length / length
    numbers = [x for x in (scale, scale_of_all, found.get("factor")) if isinstance(x, (int, float)) and x]
    if found.get("attention_factor") is None and len(numbers) == 3 and numbers[2] > 0:
        growth = 0.1 * math.log(max(numbers[2], 1))
        found["attention_factor"] = (numbers[0] * growth + 1) / (numbers[1] * growth + 1)
    return found


def write_rope(attention: AttentionConfig) -> dict[str, Any]:
    """The inverse of `read_rope`, as transformers 5 spells it."""
    if attention.rope_scaling is None:
        return {"rope_theta": attention.rope_theta, "rope_type": "default"}
    kind = "yarn" if isinstance(attention.rope_scaling, YarnRopeScaling) else "llama3"
    rope = {"rope_theta": attention.rope_theta, "rope_type": kind, **dataclasses.asdict(attention.rope_scaling)}
    rope["original_max_position_embeddings"] = rope.pop("original_length")
    return {key: value for key, value in rope.items() if value is not None}


def activation_name(activation: str, carried: str | None) -> str:
    """The name in transformers of one of our activations: the one that it came with, if there are several."""
    if carried is not None and ACTIVATION_OF.get(carried) == activation:
        return carried
    return next(name for name, ours in ACTIVATION_OF.items() if ours == activation)


def defining(config: DecoderConfig) -> dict[str, Any]:
    """What decides the function that a decoder computes, flat, by dotted key: equal for equal functions.

    Left out are keys that no layer uses, how weights are drawn, how experts run, and by which words layers are listed.
    """
    layers = config.layers
    mixers = {layer.mixer for layer in layers if isinstance(layer.mixer, str)}
    ffns = {layer.ffn for layer in layers if isinstance(layer.ffn, str)}
    unused = {
        "pattern", "interleave_moe_layer_step", "nope_layer_interval", "dense_twin", "format", "init_std",
        "parametrization", "base", "hidden_dim", "moe.backend", "moe.dispatcher", "moe.shared_hidden_dim",
        "first_dense_layers",
    }  # fmt: skip
    if not mixers & {"nope", "chunked_nope"}:
        unused.add("attention.temperature")
    if not mixers & {"chunked_rope", "chunked_nope"}:
        unused.add("attention.attention_chunk_size")
    if "windowed_rope" not in mixers:
        unused.add("attention.window")
    if config.moe is None or config.moe.experts != "clamped_swiglu":
        unused |= {"moe.swiglu_alpha", "moe.swiglu_limit"}
    if config.moe is None or config.moe.experts != "normed_swiglu":
        unused.add("moe.experts_norm_eps")
    if "moe" not in ffns:
        unused.add("moe")
    flat = flatten(to_mapping(config))
    found = {key: x for key, x in flat.items() if not any(key == name or key.startswith(f"{name}.") for name in unused)}
    found = {key: x for key, x in found.items() if (key, x) not in ROUTER_DEFAULTS}
    found |= {"attention.num_kv_heads": config.num_kv_heads, "attention.head_dim": config.head_dim}
    if config.moe is not None and "moe" in ffns:
        found["moe.shared_hidden_dim"] = config.moe.shared_width
    if config.base is not None and config.base.num_layers != config.num_layers:  # blocks add a fraction
        found["base.num_layers"] = config.base.num_layers
    for i, layer in enumerate(layers):
        ffn = layer.ffn if layer.ffn == "moe" or isinstance(layer.ffn, dict) else f"dense {config.ffn_width(layer.ffn)}"
        found[f"layers[{i}]"] = (layer.mixer, ffn)
    return found
