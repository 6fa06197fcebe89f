"""config.json of Mixtral, Qwen3-MoE, OLMoE and gpt-oss and `DecoderConfig`, in both directions: one table for each.

All choose the top_k of a softmax over the experts and scale the experts' output. Semantics: transformers'
`MixtralConfig`, `Qwen3MoeConfig`, `OlmoeConfig` and `GptOssConfig` (5.23). What is not understood is refused by name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from moesaic.config import flatten, from_mapping, to_mapping
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
from moesaic.models import DecoderConfig, Mixer

__all__ = ["GPT_OSS", "MIXTRAL", "OLMOE", "QWEN3_MOE", "Fields", "Table", "fields_of", "read_config", "write_config"]

AnyFields = TypeVar("AnyFields", bound="Fields")


@dataclasses.dataclass(frozen=True)
class Fields:
    """The fields that all of them have, and DeepSeek-V3 too."""

    vocab_size: int = dataclasses.field(default=32000, metadata={"most": 2**24})
    hidden_size: int = dataclasses.field(default=4096, metadata={"most": 2**20})
    intermediate_size: int = dataclasses.field(default=14336, metadata={"most": 2**22})
    num_hidden_layers: int = dataclasses.field(default=32, metadata={"most": 2**10})
    num_attention_heads: int = dataclasses.field(default=32, metadata={"most": 2**16})
    num_key_value_heads: int | None = dataclasses.field(default=8, metadata={"most": 2**16})
    head_dim: int | None = dataclasses.field(default=None, metadata={"most": 2**16})
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    initializer_range: float = dataclasses.field(default=0.02, metadata={"most": 100.0})
    tie_word_embeddings: bool = False
    attention_dropout: float = 0.0
    num_experts_per_tok: int = 2
    pad_token_id: int | None = None
    max_position_embeddings: int = dataclasses.field(default=4096 * 32, metadata={"most": 2**40})
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
        positive = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
        for name in (*positive, "vocab_size", "intermediate_size", "num_experts_per_tok", "initializer_range"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name}={value}: must be a number > 0")
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads}: must be a multiple of "
                f"num_key_value_heads={self.kv_heads}"
            )
        if self.width_of_head % 2 or not self.width_of_head:
            raise ValueError(f"head_dim={self.width_of_head}: must be even, as RoPE rotates pairs")
        if self.pad_token_id is not None and not -self.vocab_size <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id={self.pad_token_id}: must be below vocab_size={self.vocab_size}, or null")

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def width_of_head(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def num_routed(self) -> int:
        raise NotImplementedError

    @property
    def dense_layers(self) -> frozenset[int]:
        return frozenset()

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        rope: Mixer = "rope"
        return (rope,) * self.num_hidden_layers


@dataclasses.dataclass(frozen=True)
class MixtralFields(Fields):
    num_local_experts: int = dataclasses.field(default=8, metadata={"most": 2**14})
    sliding_window: int | None = None
    router_jitter_noise: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sliding_window is not None:
            raise ValueError(f"sliding_window={self.sliding_window}: must be null, there is no sliding window here")
        if self.router_jitter_noise:
            raise ValueError(f"router_jitter_noise={self.router_jitter_noise}: must be 0, there is no noise here")

    @property
    def num_routed(self) -> int:
        return self.num_local_experts


@dataclasses.dataclass(frozen=True)
class Qwen3MoeFields(Fields):
    vocab_size: int = dataclasses.field(default=151936, metadata={"most": 2**24})
    hidden_size: int = dataclasses.field(default=2048, metadata={"most": 2**20})
    intermediate_size: int = dataclasses.field(default=6144, metadata={"most": 2**22})
    num_hidden_layers: int = dataclasses.field(default=24, metadata={"most": 2**10})
    num_key_value_heads: int | None = dataclasses.field(default=4, metadata={"most": 2**16})
    rms_norm_eps: float = 1e-6
    num_experts_per_tok: int = 8
    max_position_embeddings: int = dataclasses.field(default=32768, metadata={"most": 2**40})
    moe_intermediate_size: int = dataclasses.field(default=768, metadata={"most": 2**22})
    num_experts: int = dataclasses.field(default=128, metadata={"most": 2**14})
    norm_topk_prob: bool = False
    attention_bias: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] | None = None
    use_sliding_window: bool = False
    sliding_window: int | None = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_sliding_window and self.sliding_window is not None:
            raise ValueError("use_sliding_window=True: must be false, there is no sliding window here")
        for name in ("decoder_sparse_step", "moe_intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be a number >= 1")

    @property
    def num_routed(self) -> int:
        return self.num_experts

    @property
    def dense_layers(self) -> frozenset[int]:
        step, listed = self.decoder_sparse_step, self.mlp_only_layers or ()
        layers = range(self.num_hidden_layers)
        return frozenset(i for i in layers if i in listed or (i + 1) % step or not self.num_experts)


@dataclasses.dataclass(frozen=True)
class OlmoeFields(Fields):
    vocab_size: int = dataclasses.field(default=50304, metadata={"most": 2**24})
    hidden_size: int = dataclasses.field(default=2048, metadata={"most": 2**20})
    intermediate_size: int = dataclasses.field(default=2048, metadata={"most": 2**22})
    num_hidden_layers: int = dataclasses.field(default=16, metadata={"most": 2**10})
    num_attention_heads: int = dataclasses.field(default=16, metadata={"most": 2**16})
    num_key_value_heads: int | None = dataclasses.field(default=None, metadata={"most": 2**16})
    num_experts_per_tok: int = 8
    pad_token_id: int | None = 1
    max_position_embeddings: int = dataclasses.field(default=4096, metadata={"most": 2**40})
    num_experts: int = dataclasses.field(default=64, metadata={"most": 2**14})
    norm_topk_prob: bool = False
    attention_bias: bool = False
    clip_qkv: float | None = dataclasses.field(default=None, metadata={"most": 1e9})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip_qkv is not None and self.clip_qkv <= 0:
            raise ValueError(f"clip_qkv={self.clip_qkv}: must be a number > 0, or null")
        if self.width_of_head * self.num_attention_heads != self.hidden_size:
            raise ValueError(
                f"hidden_size={self.hidden_size}: must be num_attention_heads={self.num_attention_heads} times "
                f"head_dim={self.width_of_head}, as QK norm takes all heads as one vector"
            )

    @property
    def num_routed(self) -> int:
        return self.num_experts


MIXER_OF: dict[str, Mixer] = {"sliding_attention": "windowed_rope", "full_attention": "rope"}


@dataclasses.dataclass(frozen=True)
class GptOssFields(Fields):
    vocab_size: int = dataclasses.field(default=201088, metadata={"most": 2**24})
    hidden_size: int = dataclasses.field(default=2880, metadata={"most": 2**20})
    intermediate_size: int = dataclasses.field(default=2880, metadata={"most": 2**22})
    num_hidden_layers: int = dataclasses.field(default=36, metadata={"most": 2**10})
    num_attention_heads: int = dataclasses.field(default=64, metadata={"most": 2**16})
    head_dim: int | None = dataclasses.field(default=64, metadata={"most": 2**16})
    num_experts_per_tok: int = 4
    num_local_experts: int = dataclasses.field(default=128, metadata={"most": 2**14})
    attention_bias: bool = True
    swiglu_alpha: float = dataclasses.field(default=1.702, metadata={"most": 1e6})
    swiglu_limit: float = dataclasses.field(default=7.0, metadata={"most": 1e9})
    sliding_window: int | None = 128
    layer_types: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("swiglu_alpha", "swiglu_limit"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be a number > 0")
        for i, each in enumerate(self.layer_types or ()):
            if each not in MIXER_OF:
                raise ValueError(f"layer_types[{i}]={each!r}: must be one of {', '.join(MIXER_OF)}")
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types: found {len(self.layer_types)} of them; must be "
                f"num_hidden_layers={self.num_hidden_layers}"
            )
        if self.sliding_window is None and "windowed_rope" in self.mixers:
            raise ValueError("sliding_window=None: must be a number with layers of sliding_attention")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window={self.sliding_window}: must be a number >= 1")

    @property
    def num_routed(self) -> int:
        return self.num_local_experts

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        layers = range(self.num_hidden_layers)
        named = self.layer_types or ["full_attention" if i % 2 else "sliding_attention" for i in layers]
        return tuple(MIXER_OF[name] for name in named)


@dataclasses.dataclass(frozen=True)
class Table:
    """One architecture: which of its fields is which of our keys, and what holds for every model of it."""

    title: str
    fields: type[Fields]
    same: Mapping[str, str]
    """Our dotted key -> their field, where both mean the same; of several, the last one is written."""
    fixed: Mapping[str, Any]
    """Our dotted key -> the value that every model of this architecture has."""
    default_theta: float = 10000.0
    default_rope: Mapping[str, Any] | None = None
    """What rope_parameters are where a config.json says nothing."""
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Another name of a field -> the field."""
    inert: frozenset[str] = frozenset()


COMMON = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
    "tie_embeddings": "tie_word_embeddings",
    "attention.num_heads": "num_attention_heads",
    "moe.top_k": "num_experts_per_tok",
}
SOFTMAX = {"moe.score_function": "softmax", "moe.score_before_experts": False, "moe.shared_hidden_dim": 0}

MIXTRAL = Table(
    title="Mixtral",
    fields=MixtralFields,
    same=COMMON | {"moe.num_experts": "num_local_experts", "moe.hidden_dim": "intermediate_size"},
    fixed=SOFTMAX | {"moe.normalize_scores": True, "attention.qk_norm": False},
    default_theta=1000000.0,
    aliases={"num_experts": "num_local_experts"},
)
QWEN3_MOE = Table(
    title="Qwen3-MoE",
    fields=Qwen3MoeFields,
    same=COMMON
    | {
        "moe.num_experts": "num_experts",
        "moe.hidden_dim": "moe_intermediate_size",
        "moe.normalize_scores": "norm_topk_prob",
        "attention.bias": "attention_bias",
    },
    fixed=SOFTMAX | {"attention.qk_norm": "per_head"},
    aliases={"num_local_experts": "num_experts"},
    inert=frozenset({"max_window_layers"}),
)
OLMOE = Table(
    title="OLMoE",
    fields=OlmoeFields,
    same=COMMON
    | {
        "moe.num_experts": "num_experts",
        "moe.hidden_dim": "intermediate_size",
        "moe.normalize_scores": "norm_topk_prob",
        "attention.bias": "attention_bias",
        "attention.clip_qkv": "clip_qkv",
    },
    fixed=SOFTMAX | {"attention.qk_norm": "full_width"},
    aliases={"num_local_experts": "num_experts"},
)
GPT_OSS = Table(
    title="gpt-oss",
    fields=GptOssFields,
    same=COMMON
    | {
        "moe.num_experts": "num_local_experts",
        "moe.hidden_dim": "intermediate_size",
        "moe.swiglu_alpha": "swiglu_alpha",
        "moe.swiglu_limit": "swiglu_limit",
        "attention.bias": "attention_bias",
        "attention.window": "sliding_window",
    },
    fixed=SOFTMAX
    | {
        "moe.normalize_scores": True,
        "moe.router": {"type": "top_k", "bias": True},
        "moe.experts": "clamped_swiglu",
        "attention.qk_norm": False,
        "attention.sinks": True,
        "activation": "silu",  # whatever hidden_act says, which theirs does not read
    },
    default_theta=150000.0,
    default_rope={
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    aliases={"num_experts": "num_local_experts"},
    inert=frozenset({"experts_per_token", "initial_context_length"}),  # of OpenAI's files, not read by transformers
)


def read_config(table: Table, config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a config.json of this architecture describes; missing fields have transformers' defaults.

    Raises:
        InputError: a field that is not known, or a value that cannot be represented.
    """
    fields = fields_of(table.fields, config, table.aliases, table.inert, table.title)
    try:
        return _decoder_config(table, fields)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"config.json: {error}") from error


def fields_of(
    cls: type[AnyFields], config: Mapping[str, Any], aliases: Mapping[str, str], inert: frozenset[str], title: str
) -> AnyFields:
    """The fields of a config.json, all in one object; missing ones have their defaults.

    Args:
        aliases: another name of a field -> the field.
        inert: fields without effect, beside those of `INERT`.

    Raises:
        InputError: a field that is not known, an impossible value, or an alias that says another thing.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    given = dict(config)
    for alias, name in aliases.items():
        if (value := given.pop(alias, None)) is not None and given.setdefault(name, value) != value:
            raise InputError(
                f"config.json: {alias}={value} and {name}={given[name]}: must be equal, they are one field"
            )
    return from_mapping(cls, known_values(given, known, INERT | inert, title), "config.json")


def _decoder_config(table: Table, fields: Fields) -> DecoderConfig:
    ours = {key: getattr(fields, name) for key, name in table.same.items()}
    ours |= {"activation": ACTIVATION_OF[fields.hidden_act], **table.fixed}
    theta, scaling = read_rope(fields, table.default_theta, fields.max_position_embeddings, table.default_rope)
    pad, dense = fields.pad_token_id, fields.dense_layers
    ours |= {
        "attention.num_kv_heads": fields.kv_heads,
        "attention.head_dim": fields.width_of_head,
        "attention.rope_theta": theta,
        "attention.rope_scaling": None if scaling is None else to_mapping(scaling),
        "padding_token": None if pad is None else pad % fields.vocab_size,  # -1: the last
        "pattern": [{"mixer": mixer, "ffn": "dense" if i in dense else "moe"} for i, mixer in enumerate(fields.mixers)],
    }
    if "windowed_rope" in fields.mixers:
        ours["pattern"] = _period(ours["pattern"])
    if not fields.num_routed and len(dense) == fields.num_hidden_layers:
        ours = {key: value for key, value in ours.items() if not key.startswith("moe.")}
    else:
        _require_routing(fields, ours)
    config = from_mapping(DecoderConfig, _nested(ours), "config.json")
    return with_intervals(config, getattr(fields, "decoder_sparse_step", 1) if config.moe else 0, 0)


def _period(layers: list[Any]) -> list[Any]:
    """The shortest list that, repeated, is this one."""
    lengths = range(1, len(layers) + 1)
    return next(layers[:n] for n in lengths if all(layer == layers[i % n] for i, layer in enumerate(layers)))


def _require_routing(fields: Fields, ours: Mapping[str, Any]) -> None:
    top_k = fields.num_experts_per_tok
    if not 1 <= top_k <= fields.num_routed:
        raise ValueError(f"num_experts_per_tok={top_k}: must be 1 to the number of experts, {fields.num_routed}")
    if top_k == 1 and ours["moe.normalize_scores"]:
        raise ValueError(
            "num_experts_per_tok=1: must be 2 or more where the scores of the chosen experts are normalized, as every "
            "score is 1 and the router never learns"
        )


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested


def write_config(table: Table, config: DecoderConfig, carried: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.json for this decoder, as far as they can say it: the inverse of `read_config`.

    Args:
        carried: an imported config.json; of several ways to say the same its own is kept.
    """
    flat = flatten(to_mapping(config))
    known = {field.name for field in dataclasses.fields(table.fields)}
    values = {name: flat[key] for key, name in table.same.items() if flat.get(key) is not None}
    values |= {
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": activation_name(config.activation, carried.get("hidden_act")),
        "pad_token_id": config.padding_token,
        "max_position_embeddings": carried.get("max_position_embeddings", _default(table, "max_position_embeddings")),
        "rope_parameters": write_rope(config.attention),
    }
    if "mlp_only_layers" in known:
        values |= _write_dense_layers(config, carried)
    if "layer_types" in known:
        name_of: dict[str, str] = {mixer: name for name, mixer in MIXER_OF.items()}
        values["layer_types"] = [name_of.get(str(layer.mixer), "full_attention") for layer in config.layers]
        # theirs makes the mask of a window whether a layer uses it or not
        values.setdefault("sliding_window", carried.get("sliding_window") or _default(table, "sliding_window"))
    elif "sliding_window" in known:
        values["sliding_window"] = None
    written = {name: value for name, value in values.items() if name in known}
    defaults = {field.name: field.default for field in dataclasses.fields(table.fields)}
    legacy = {"rope_theta", "rope_scaling"}
    return {name: x for name, x in defaults.items() if name not in legacy} | written


def _write_dense_layers(config: DecoderConfig, carried: Mapping[str, Any]) -> dict[str, Any]:
    dense = [i for i, layer in enumerate(config.layers) if layer.ffn != "moe"]
    step, listed = carried.get("decoder_sparse_step", 1), carried.get("mlp_only_layers") or []
    if config.moe is None:
        return {"num_experts": 0, "decoder_sparse_step": step, "mlp_only_layers": listed}
    if dense != [i for i in range(config.num_layers) if i in listed or (i + 1) % step]:
        step, listed = 1, dense
    return {"decoder_sparse_step": step, "mlp_only_layers": listed}


def _default(table: Table, name: str) -> Any:
    return next(field.default for field in dataclasses.fields(table.fields) if field.name == name)
