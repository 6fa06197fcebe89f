"""Llama 4's config.json and `DecoderConfig`, in both directions.

Semantics: transformers' `Llama4TextConfig` (5.23). What is not understood is refused by name rather than ignored, since
a field that changes the model would otherwise be lost without a word.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from moesaic.config import from_mapping
from moesaic.errors import InputError
from moesaic.interop.fields import (
    ACTIVATION_OF,
    INERT,
    activation_name,
    known_values,
    read_rope,
    with_intervals,
    write_rope,
)
from moesaic.layers import AttentionTemperature
from moesaic.models import AttentionConfig, DecoderConfig, LayerConfig, MoEConfig

__all__ = ["TEXT_ONLY", "UNREAD", "WITH_VISION", "config_from_hf", "differences", "fields_to_hf", "text_of_vision"]

UNREAD = {"router_jitter_noise"}  # by transformers' Llama 4
TEXT_ONLY, WITH_VISION = "Llama4ForCausalLM", "Llama4ForConditionalGeneration"


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


def text_of_vision(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The text part of a whole config.json of Llama 4 with vision; None if it is something else."""
    architectures = config.get("architectures") or []
    named = architectures[0] if architectures else {"llama4": WITH_VISION}.get(str(config.get("model_type")))
    text = config.get("text_config")
    if named != WITH_VISION or not isinstance(text, Mapping):
        return None
    quantization = config.get("quantization_config")
    return {**text, "quantization_config": quantization} if quantization else text


def config_from_hf(text: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a `Llama4TextConfig` (as a mapping) describes; missing fields have transformers' defaults.

    The spellings of 2025 are understood: attn_temperature_tuning: 4, floor_scale: 8192.0, rope_scaling and rope_theta
    side by side, no_rope_layers: [].

    Raises:
        InputError: a field that is not known, or a value that cannot be represented.
    """
    known = {field.name for field in dataclasses.fields(_TextFields)}
    values = known_values(text, known, INERT | UNREAD, "Llama 4")
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
    theta, scaling = read_rope(fields, 500000.0, max_length)
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
    return with_intervals(config, step, interval)


@dataclasses.dataclass(frozen=True)
class _Pattern:
    pattern: tuple[LayerConfig, ...]


def fields_to_hf(config: DecoderConfig, carried: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Llama4TextConfig` for a decoder without `differences`.

    Args:
        carried: an imported config.json; what is switched off or said in several ways is kept as it is there.
    """
    fields = _text_fields_of(config, carried)
    written = {name: list(x) if isinstance(x, tuple) else x for name, x in dataclasses.asdict(fields).items()}
    for legacy in ("rope_theta", "rope_scaling"):
        del written[legacy]
    return {**written, "max_position_embeddings": _max_length(carried), "pad_token_id": config.padding_token}


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
        hidden_act=activation_name(config.activation, carried.get("hidden_act")),
        rms_norm_eps=config.norm_eps,
        initializer_range=config.init_std or 0.02,
        tie_word_embeddings=config.tie_embeddings,
        attention_bias=attention.bias,
        num_experts_per_tok=moe.top_k if moe else 1,
        num_local_experts=moe.num_experts if moe else 1,
        moe_layers=tuple(i for i, layer in enumerate(layers) if layer.ffn == "moe"),
        # the two lists decide; the intervals only say how they came about
        interleave_moe_layer_step=config.interleave_moe_layer_step or carried.get("interleave_moe_layer_step") or 1,
        use_qk_norm=attention.qk_norm is True,  # no other, see `differences`
        no_rope_layers=tuple(int(layer.mixer in ("rope", "chunked_rope")) for layer in layers),
        no_rope_layer_interval=config.nope_layer_interval or carried.get("no_rope_layer_interval") or 4,
        # transformers wants a number even where no layer is chunked
        attention_chunk_size=attention.attention_chunk_size or _max_length(carried),
        layer_types=tuple("chunked_attention" if chunk else "full_attention" for chunk in chunked),
        attn_temperature_tuning=attention.temperature is not None,
        floor_scale=temperature.floor_scale,
        attn_scale=temperature.attn_scale,
        rope_parameters=write_rope(attention),
    )


def _max_length(carried: Mapping[str, Any]) -> int:
    """Positions that a model says it was made for; Llama 4's default where nothing says so."""
    return carried.get("max_position_embeddings", 131072)


def differences(config: DecoderConfig) -> dict[str, tuple[Any, Any]]:
    """What a decoder computes and Llama 4 does not: key -> (what was found, what it must be)."""
    attention, moe = config.attention, config.moe
    found: dict[str, Any] = {}
    if config.base is not None and config.base.num_layers != config.num_layers:  # blocks add a fraction
        found["base.num_layers"] = (config.base.num_layers, f"num_layers={config.num_layers}")
    for name in ("qk_norm", "clip_qkv"):
        if isinstance(value := getattr(attention, name), (str, float)):
            found[f"attention.{name}"] = (value, "a switch" if name == "qk_norm" else "null")
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
    return found


def _dense_width(config: DecoderConfig) -> int:
    widths = [config.ffn_width(layer.ffn) for layer in config.layers if layer.ffn in ("dense", "dense_twin")]
    return widths[0] if widths else config.hidden_dim
