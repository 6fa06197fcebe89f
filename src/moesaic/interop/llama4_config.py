"""Llama 4's config.json and `DecoderConfig`, in both directions.

Semantics: transformers' `Llama4TextConfig` (5.23). What is not understood is refused by name rather than ignored, since
a field that changes the model would otherwise be lost without a word.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from moesaic.config import from_mapping
from moesaic.errors import InputError
from moesaic.layers import ActivationName, AttentionTemperature, Llama3RopeScaling
from moesaic.models import AttentionConfig, DecoderConfig, LayerConfig, MoEConfig

__all__ = ["config_from_hf", "config_to_hf", "text_fields"]

TEXT_ONLY, WITH_VISION = "Llama4ForCausalLM", "Llama4ForConditionalGeneration"

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

# Fields that say nothing about the function that the weights compute: kept for the way back.
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
    # read by nothing in transformers' Llama 4
    "router_aux_loss_coef", "router_jitter_noise",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _TextFields:
    """The fields of `Llama4TextConfig` that decide the function, with transformers' defaults."""

    vocab_size: int = dataclasses.field(default=202048, metadata={"most": 2**24})
    hidden_size: int = dataclasses.field(default=5120, metadata={"most": 2**20})
    intermediate_size: int = dataclasses.field(default=8192, metadata={"most": 2**22})
    intermediate_size_mlp: int = dataclasses.field(default=16384, metadata={"most": 2**22})
    num_hidden_layers: int = dataclasses.field(default=48, metadata={"most": 2**10})
    num_attention_heads: int = dataclasses.field(default=40, metadata={"most": 2**16})
    num_key_value_heads: int | None = dataclasses.field(default=8, metadata={"most": 2**16})
    head_dim: int | None = dataclasses.field(default=128, metadata={"most": 2**16})
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    initializer_range: float = dataclasses.field(default=0.02, metadata={"most": 100.0})
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_dropout: float = 0.0
    num_experts_per_tok: int = 1
    num_local_experts: int = dataclasses.field(default=16, metadata={"most": 2**14})
    moe_layers: tuple[int, ...] | None = None
    interleave_moe_layer_step: int = 1
    use_qk_norm: bool = True
    no_rope_layers: tuple[int, ...] | None = None
    no_rope_layer_interval: int = 4
    attention_chunk_size: int | None = 8192
    layer_types: tuple[Literal["chunked_attention", "full_attention"], ...] | None = None
    attn_temperature_tuning: bool = True
    floor_scale: int = dataclasses.field(default=8192, metadata={"most": 2**40})
    attn_scale: float = dataclasses.field(default=0.1, metadata={"most": 1e6})
    rope_theta: float | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.attention_dropout:
            raise ValueError(f"attention_dropout={self.attention_dropout}: must be 0, there is no dropout here")
        if self.hidden_act not in ACTIVATION_OF:
            raise ValueError(f"hidden_act={self.hidden_act!r}: must be one of {', '.join(ACTIVATION_OF)}")
        if not 1e-20 <= self.rms_norm_eps <= 1:
            raise ValueError(f"rms_norm_eps={self.rms_norm_eps}: must be a number from 1e-20 to 1")
        if self.initializer_range <= 0:
            raise ValueError(f"initializer_range={self.initializer_range}: must be a number > 0")
        if self.no_rope_layer_interval < 1:
            raise ValueError(f"no_rope_layer_interval={self.no_rope_layer_interval}: must be a number >= 1")
        if self.moe_layers is None and self.interleave_moe_layer_step < 1:
            raise ValueError(
                f"interleave_moe_layer_step={self.interleave_moe_layer_step}: must be a number >= 1, or a list "
                "moe_layers"
            )
        for i in self.moe_layers or ():
            if not 0 <= i < self.num_hidden_layers:
                raise ValueError(f"moe_layers: found layer {i}; must be 0 to {self.num_hidden_layers - 1}")
        for name in ("no_rope_layers", "layer_types"):
            given = getattr(self, name)
            if given and len(given) != self.num_hidden_layers:
                raise ValueError(
                    f"{name}: found {len(given)} entries; must be num_hidden_layers={self.num_hidden_layers}"
                )
        for uses_rope in self.no_rope_layers or ():
            if uses_rope not in (0, 1):
                raise ValueError(f"no_rope_layers: found {uses_rope}; must be 1 (uses RoPE) and 0 (does not)")


def text_fields(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The text part of a whole config.json, and the prefix of its tensors' names.

    Raises:
        InputError: an architecture other than Llama 4's text model or text and vision model.
    """
    architectures = config.get("architectures") or []
    model_type = config.get("model_type")
    of_type = {"llama4_text": TEXT_ONLY, "llama4": WITH_VISION}
    named = architectures[0] if architectures else of_type.get(str(model_type))
    if named == WITH_VISION and isinstance(config.get("text_config"), Mapping):
        outer, text = config, config["text_config"]
        if outer.get("quantization_config"):
            text = {**text, "quantization_config": outer["quantization_config"]}
        return text, "language_model."
    if named == TEXT_ONLY and model_type in ("llama4_text", None):
        return config, ""
    raise InputError(
        f"config.json: architectures={architectures}, model_type={model_type!r}; must be {TEXT_ONLY} (llama4_text) "
        f"and {WITH_VISION} (llama4, with a text_config)"
    )


def config_from_hf(text: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a `Llama4TextConfig` (as a mapping) describes; missing fields have transformers' defaults.

    The spellings of 2025 are understood: attn_temperature_tuning: 4, floor_scale: 8192.0, rope_scaling and rope_theta
    side by side, no_rope_layers: [].

    Raises:
        InputError: a field that is not known, or a value that cannot be represented.
    """
    known = {field.name for field in dataclasses.fields(_TextFields)}
    # quantization_config is neither: its weights are in a format of their own
    unknown = [key for key in text if key not in known | INERT and not key.startswith("_") and text[key] is not None]
    if unknown:
        raise InputError(
            f"config.json: {', '.join(f'{key}={text[key]!r}' for key in unknown)}: not a field of Llama 4 that is "
            "understood here; if it does not change the model, remove it from the file"
        )
    values = {key: text[key] for key in known if key in text}
    if isinstance(values.get("attn_temperature_tuning"), int):
        values["attn_temperature_tuning"] = bool(values["attn_temperature_tuning"])
    fields = from_mapping(_TextFields, values, "config.json")
    try:
        return _decoder_config(fields, text.get("pad_token_id"), _max_length(text))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"config.json: {error}") from error


def _decoder_config(fields: _TextFields, pad_token_id: int | None, max_length: int) -> DecoderConfig:
    num_layers, interval = fields.num_hidden_layers, fields.no_rope_layer_interval
    uses_rope = [bool(x) for x in fields.no_rope_layers or ((i + 1) % interval for i in range(num_layers))]
    chunked = [x == "chunked_attention" for x in fields.layer_types or ()] or uses_rope
    step = fields.interleave_moe_layer_step
    moe_layers = range(step - 1, num_layers, step) if fields.moe_layers is None else fields.moe_layers
    mixers = {(1, 1): "chunked_rope", (1, 0): "rope", (0, 0): "nope", (0, 1): "chunked_nope"}
    pattern = [
        {"mixer": mixers[rope, chunk], "ffn": "moe" if i in moe_layers else "dense"}
        for i, (rope, chunk) in enumerate(zip(uses_rope, chunked, strict=True))
    ]
    theta, scaling = _rope(fields, max_length)
    config = DecoderConfig(
        vocab_size=fields.vocab_size,
        dim=fields.hidden_size,
        num_layers=num_layers,
        attention=AttentionConfig(
            num_heads=fields.num_attention_heads,
            num_kv_heads=fields.num_key_value_heads,
            head_dim=fields.head_dim,
            rope_theta=theta,
            rope_scaling=scaling,
            qk_norm=fields.use_qk_norm,
            attention_chunk_size=fields.attention_chunk_size,
            temperature=AttentionTemperature(attn_scale=fields.attn_scale, floor_scale=fields.floor_scale)
            if fields.attn_temperature_tuning
            else None,
            bias=fields.attention_bias,
        ),
        hidden_dim=fields.intermediate_size_mlp,
        moe=MoEConfig(
            num_experts=fields.num_local_experts,
            hidden_dim=fields.intermediate_size,
            top_k=fields.num_experts_per_tok,
        ),
        pattern=from_mapping(_Pattern, {"pattern": pattern}).pattern,
        activation=ACTIVATION_OF[fields.hidden_act],
        norm_eps=fields.rms_norm_eps,
        tie_embeddings=fields.tie_word_embeddings,
        init_std=fields.initializer_range,
        padding_token=pad_token_id if pad_token_id is None else pad_token_id % fields.vocab_size,  # -1: the last
    )
    return _with_intervals(config, step, interval)


@dataclasses.dataclass(frozen=True)
class _Pattern:
    pattern: tuple[LayerConfig, ...]


def _with_intervals(config: DecoderConfig, step: int, interval: int) -> DecoderConfig:
    """The same layers as Llama 4's two intervals, which read better than a list, if these give them."""
    for moe_step, nope_interval in ((step, interval), (step, 0), (0, interval), (0, 0)):
        shorter = dataclasses.replace(
            config, pattern=None, interleave_moe_layer_step=moe_step, nope_layer_interval=nope_interval
        )
        if shorter.layers == config.layers:
            return shorter
    return config


def _rope(fields: _TextFields, max_length: int) -> tuple[float, Llama3RopeScaling | None]:
    """theta and scaling from rope_parameters (transformers 5) or rope_scaling and rope_theta (before)."""
    name = "rope_scaling" if fields.rope_scaling else "rope_parameters"
    given = dict(fields.rope_scaling or fields.rope_parameters or {})
    theta = given.pop("rope_theta", fields.rope_theta)
    theta = 500000.0 if theta is None else theta
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 1 <= theta <= 1e15:
        raise InputError(f"config.json: rope_theta={theta!r}: must be a number from 1 to 1e15")
    legacy = given.pop("type", None)
    kind = given.pop("rope_type", legacy) or "default"
    if kind not in ("default", "llama3"):
        raise InputError(f"config.json.{name}: found rope_type={kind!r}; must be one of default, llama3")
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"config.json.{name}: found a partial_rotary_factor; must be 1.0 (all of head_dim)")
    if kind == "default":
        original = {"original_max_position_embeddings"}  # written by some tools, without effect
        if given.keys() - original:
            raise InputError(f"config.json.{name}: found {sorted(given.keys() - original)} with rope_type default")
        return theta, None
    given["original_length"] = given.pop("original_max_position_embeddings", None) or max_length
    return theta, from_mapping(Llama3RopeScaling, given, f"config.json.{name}")


def config_to_hf(config: DecoderConfig, carried: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of `Llama4ForCausalLM` for this decoder.

    Args:
        carried: fields of an imported config.json, kept where they say nothing about the function (token ids).
        dtype: of the weights, as torch spells it without its prefix: "bfloat16".

    Raises:
        InputError: the decoder computes what Llama 4 does not; the message names every such key.
    """
    _refuse_what_llama4_has_not(config)
    fields = _text_fields_of(config, carried)
    written = {name: list(x) if isinstance(x, tuple) else x for name, x in dataclasses.asdict(fields).items()}
    for legacy in ("rope_theta", "rope_scaling"):
        del written[legacy]
    inert = {key: value for key, value in carried.items() if key in INERT}
    own = {"max_position_embeddings": _max_length(carried), "pad_token_id": config.padding_token}
    if not carried:  # transformers' defaults are ids of Llama's tokenizer
        own |= {"bos_token_id": None, "eos_token_id": None}
    identity = {"architectures": [TEXT_ONLY], "model_type": "llama4_text", "dtype": dtype}
    inert.pop("torch_dtype", None)  # dtype's old name
    return {**inert, **written, **own, **identity}


def _text_fields_of(config: DecoderConfig, carried: Mapping[str, Any]) -> _TextFields:
    """The inverse of `_decoder_config`."""
    attention, moe, layers = config.attention, config.moe, config.layers
    chunked = [x.mixer in ("chunked_rope", "chunked_nope") for x in layers]
    # what is switched off keeps the values it came with
    unused = AttentionTemperature(carried.get("attn_scale", 0.1), int(carried.get("floor_scale", 8192)))
    temperature = attention.temperature or unused
    return _TextFields(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=moe.hidden_dim if moe else config.hidden_dim,
        intermediate_size_mlp=_dense_width(config),
        num_hidden_layers=config.num_layers,
        num_attention_heads=attention.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        hidden_act=_activation_name(config.activation, carried.get("hidden_act")),
        rms_norm_eps=config.norm_eps,
        initializer_range=config.init_std or 0.02,
        tie_word_embeddings=config.tie_embeddings,
        attention_bias=attention.bias,
        num_experts_per_tok=moe.top_k if moe else 1,
        num_local_experts=moe.num_experts if moe else 1,
        moe_layers=tuple(i for i, layer in enumerate(layers) if layer.ffn == "moe"),
        # the two lists decide; the intervals only say how they came about
        interleave_moe_layer_step=config.interleave_moe_layer_step or carried.get("interleave_moe_layer_step") or 1,
        use_qk_norm=attention.qk_norm,
        no_rope_layers=tuple(int(layer.mixer in ("rope", "chunked_rope")) for layer in layers),
        no_rope_layer_interval=config.nope_layer_interval or carried.get("no_rope_layer_interval") or 4,
        # transformers wants a number even where no layer is chunked
        attention_chunk_size=attention.attention_chunk_size or _max_length(carried),
        layer_types=tuple("chunked_attention" if chunk else "full_attention" for chunk in chunked),
        attn_temperature_tuning=attention.temperature is not None,
        floor_scale=temperature.floor_scale,
        attn_scale=temperature.attn_scale,
        rope_parameters=_rope_parameters(attention),
    )


def _rope_parameters(attention: AttentionConfig) -> dict[str, Any]:
    """The inverse of `_rope`, as transformers 5 spells it."""
    if attention.rope_scaling is None:
        return {"rope_theta": attention.rope_theta, "rope_type": "default"}
    rope = {"rope_theta": attention.rope_theta, "rope_type": "llama3", **dataclasses.asdict(attention.rope_scaling)}
    rope["original_max_position_embeddings"] = rope.pop("original_length")
    return rope


def _max_length(carried: Mapping[str, Any]) -> int:
    """Positions that a model says it was made for; Llama 4's default where nothing says so."""
    return carried.get("max_position_embeddings", 131072)


def _refuse_what_llama4_has_not(config: DecoderConfig) -> None:
    attention, moe = config.attention, config.moe
    found: dict[str, Any] = {}
    if config.base is not None and config.base.num_layers != config.num_layers:  # blocks add a fraction
        found["base.num_layers"] = (config.base.num_layers, f"num_layers={config.num_layers}")
    if attention.conv_width:
        found["attention.conv_width"] = (attention.conv_width, "0")
    if attention.temperature is not None and attention.temperature.scalable_softmax is not None:
        found["attention.temperature.scalable_softmax"] = (attention.temperature.scalable_softmax, "null")
    if moe is not None and any(layer.ffn == "moe" for layer in config.layers):
        allowed = {
            "router": "top_k",
            "experts": "swiglu",
            "score_function": "sigmoid",
            "normalize_scores": False,
            "score_before_experts": True,
            "expert_bias": False,
            "identity_experts": 0,
            "skip_experts": 0,
            "latent_dim": None,
        }
        for name, value in allowed.items():
            if getattr(moe, name) != value:
                found[f"moe.{name}"] = (getattr(moe, name), value)
        if moe.shared_width != moe.hidden_dim:
            found["moe.shared_hidden_dim"] = (moe.shared_width, f"moe.hidden_dim={moe.hidden_dim}")
    for layer in config.layers:
        for name, part in (("mixer", layer.mixer), ("ffn", layer.ffn)):
            if isinstance(part, dict):
                found[f"pattern.{name}"] = (part.get("type"), "a built-in part")
    if len({config.ffn_width(x.ffn) for x in config.layers if x.ffn in ("dense", "dense_twin")}) > 1:
        found["hidden_dim"] = (config.hidden_dim, "one width for all dense layers, the dense twins' included")
    if found:
        listed = "; ".join(f"{key}: found {value!r}, must be {allowed}" for key, (value, allowed) in found.items())
        raise InputError(f"this model is not a Llama 4: {listed}")


def _dense_width(config: DecoderConfig) -> int:
    widths = [config.ffn_width(layer.ffn) for layer in config.layers if layer.ffn in ("dense", "dense_twin")]
    return widths[0] if widths else config.hidden_dim


def _activation_name(activation: str, carried: str | None) -> str:
    if carried is not None and ACTIVATION_OF.get(carried) == activation:
        return carried
    return next(name for name, ours in ACTIVATION_OF.items() if ours == activation)
