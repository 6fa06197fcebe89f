"""config.json of DeepSeek-V3 and `DecoderConfig`, in both directions.

Semantics: transformers' `DeepseekV3Config` (5.23), and of three fields that it ignores DeepSeek's own code. What is not
understood is refused by name.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from moesaic.config import from_mapping, to_mapping
from moesaic.errors import InputError
from moesaic.interop.fields import ACTIVATION_OF, activation_name, read_rope, write_rope
from moesaic.interop.softmax_moe_config import Fields, fields_of
from moesaic.layers import YarnRopeScaling
from moesaic.models import DecoderConfig, MLAConfig, MoEConfig

__all__ = ["TITLE", "UNREAD", "config_from_hf", "fields_to_hf", "prediction_tensors"]

TITLE = "DeepSeek-V3"
UNREAD = frozenset({"aux_loss_alpha", "seq_aux", "ep_size", "pretraining_tp", "auto_map"})
"""Fields of published files that are about training and code, or change no result."""
ALIASES = {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"}
LATENT_NORM_EPS = 1e-6
"""Epsilon of the norms within attention, whatever rms_norm_eps is."""
ONLY = {"moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
"""Fields that transformers does not read, and the value by which it computes. Other engines read them."""


@dataclasses.dataclass(frozen=True)
class DeepseekV3Fields(Fields):
    vocab_size: int = dataclasses.field(default=129280, metadata={"most": 2**24})
    hidden_size: int = dataclasses.field(default=7168, metadata={"most": 2**20})
    intermediate_size: int = dataclasses.field(default=18432, metadata={"most": 2**22})
    num_hidden_layers: int = dataclasses.field(default=61, metadata={"most": 2**10})
    num_attention_heads: int = dataclasses.field(default=128, metadata={"most": 2**16})
    num_key_value_heads: int | None = dataclasses.field(default=128, metadata={"most": 2**16})
    rms_norm_eps: float = 1e-6
    num_experts_per_tok: int = 8
    max_position_embeddings: int = dataclasses.field(default=4096, metadata={"most": 2**40})
    moe_intermediate_size: int = dataclasses.field(default=2048, metadata={"most": 2**22})
    n_shared_experts: int = dataclasses.field(default=1, metadata={"most": 2**14})
    n_routed_experts: int = dataclasses.field(default=256, metadata={"most": 2**14})
    routed_scaling_factor: float = dataclasses.field(default=2.5, metadata={"most": 1e9})
    kv_lora_rank: int = dataclasses.field(default=512, metadata={"most": 2**20})
    q_lora_rank: int | None = dataclasses.field(default=1536, metadata={"most": 2**20})
    qk_rope_head_dim: int = dataclasses.field(default=64, metadata={"most": 2**16})
    v_head_dim: int = dataclasses.field(default=128, metadata={"most": 2**16})
    qk_nope_head_dim: int = dataclasses.field(default=128, metadata={"most": 2**16})
    qk_head_dim: int | None = None
    n_group: int = 8
    topk_group: int = 4
    first_k_dense_replace: int = 3
    norm_topk_prob: bool | None = True
    rope_interleave: bool | None = True
    attention_bias: bool = False
    num_nextn_predict_layers: int = dataclasses.field(default=1, metadata={"most": 2**10})
    moe_layer_freq: int = ONLY["moe_layer_freq"]  # type: ignore[assignment]
    topk_method: str = ONLY["topk_method"]  # type: ignore[assignment]
    scoring_func: str = ONLY["scoring_func"]  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "v_head_dim", "qk_nope_head_dim")
        for name in (*positive, "moe_intermediate_size", "n_shared_experts", "routed_scaling_factor"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name}={value}: must be a number > 0")
        for name in ("first_k_dense_replace", "num_nextn_predict_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be a number >= 0")
        for name, value in ONLY.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be {value!r}, there is no other here")
        if self.kv_heads != self.num_attention_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads}: must be num_attention_heads="
                f"{self.num_attention_heads}, or null, as every head makes its own keys of the latent"
            )
        widths = {"head_dim": self.qk_rope_head_dim, "qk_head_dim": self.qk_nope_head_dim + self.qk_rope_head_dim}
        for name, width in widths.items():  # transformers takes its frequencies from head_dim
            if getattr(self, name) not in (None, width):
                parts = "qk_rope_head_dim" if name == "head_dim" else "qk_nope_head_dim + qk_rope_head_dim"
                raise ValueError(f"{name}={getattr(self, name)}: must be {parts}={width}, or absent")
        if self.first_k_dense_replace < self.num_hidden_layers:
            self._require_groups()

    def _require_groups(self) -> None:
        experts, top_k = self.n_routed_experts, self.num_experts_per_tok
        if self.n_group < 1 or experts < 2 * self.n_group or experts % self.n_group:
            raise ValueError(
                f"n_group={self.n_group}: must divide n_routed_experts={experts} into groups of 2 or more, as a group "
                "is judged by its best two"
            )
        if not 1 <= self.topk_group <= self.n_group:
            raise ValueError(f"topk_group={self.topk_group}: must be 1 to n_group={self.n_group}")
        reached = self.topk_group * experts // self.n_group
        if top_k > reached:
            raise ValueError(f"num_experts_per_tok={top_k}: must be 1 to {reached}, the experts of topk_group groups")
        if top_k == 1 and self.norm_topk_prob:
            raise ValueError(
                "num_experts_per_tok=1: must be 2 or more with norm_topk_prob=True, as every score is 1 and the router "
                "never learns"
            )

    @property
    def width_of_head(self) -> int:
        """Width of the part of a head that RoPE rotates."""
        return self.qk_rope_head_dim


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a config.json describes; missing fields have transformers' defaults.

    Raises:
        InputError: a field that is not known, or a value that cannot be represented.
    """
    fields = _fields(config)
    try:
        return _decoder_config(fields)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"config.json: {error}") from error


def _fields(config: Mapping[str, Any]) -> DeepseekV3Fields:
    return fields_of(DeepseekV3Fields, config, ALIASES, UNREAD, TITLE)


def _decoder_config(fields: DeepseekV3Fields) -> DecoderConfig:
    theta, scaling = read_rope(fields, 10000.0, fields.max_position_embeddings)
    pad, dense = fields.pad_token_id, min(fields.first_k_dense_replace, fields.num_hidden_layers)
    has_experts = dense < fields.num_hidden_layers
    mla = {name: getattr(fields, name) for name in ("kv_lora_rank", "q_lora_rank", "v_head_dim")}
    mla |= {name: getattr(fields, name) for name in ("qk_nope_head_dim", "qk_rope_head_dim")}
    mla["mscale_all_dim"] = (fields.rope_scaling or fields.rope_parameters or {}).get("mscale_all_dim") or 0.0
    router = {"type": "group_limited", "num_groups": fields.n_group, "top_groups": fields.topk_group}
    moe = {
        "num_experts": fields.n_routed_experts,
        "hidden_dim": fields.moe_intermediate_size,
        "top_k": fields.num_experts_per_tok,
        "shared_hidden_dim": fields.moe_intermediate_size * fields.n_shared_experts,
        "router": {**router, "scale": fields.routed_scaling_factor},
        "score_function": "sigmoid",
        "normalize_scores": bool(fields.norm_topk_prob),
        "score_before_experts": False,
        "expert_bias": True,
    }
    values = {
        "vocab_size": fields.vocab_size,
        "dim": fields.hidden_size,
        "num_layers": fields.num_hidden_layers,
        "hidden_dim": fields.intermediate_size,
        "norm_eps": fields.rms_norm_eps,
        "init_std": fields.initializer_range,
        "tie_embeddings": fields.tie_word_embeddings,
        "activation": ACTIVATION_OF[fields.hidden_act],
        "padding_token": None if pad is None else pad % fields.vocab_size,  # -1: the last
        "attention": {
            "num_heads": fields.num_attention_heads,
            "rope_theta": theta,
            "rope_scaling": None if scaling is None else to_mapping(scaling),
            "qk_norm": False,
            "bias": fields.attention_bias,
            "mla": {**mla, "interleaved": bool(fields.rope_interleave), "norm_eps": LATENT_NORM_EPS},
        },
        "moe": moe if has_experts else None,
        "interleave_moe_layer_step": int(has_experts),
        "first_dense_layers": dense if has_experts else 0,
        "nope_layer_interval": 0,
    }
    return from_mapping(DecoderConfig, values, "config.json")


def fields_to_hf(config: DecoderConfig, carried: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.json for this decoder, as far as they can say it: the inverse of `config_from_hf`.

    The files have no layers for multi-token prediction, whatever those of `carried` had.

    Args:
        carried: an imported config.json; of several ways to say the same its own is kept.
    """
    written: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "intermediate_size": config.hidden_dim,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "num_attention_heads": config.attention.num_heads,
        "num_key_value_heads": config.attention.num_heads,
        "attention_bias": config.attention.bias,
        "hidden_act": activation_name(config.activation, carried.get("hidden_act")),
        "pad_token_id": config.padding_token,
        "max_position_embeddings": carried.get("max_position_embeddings", _max_length(config)),
        "rope_parameters": write_rope(config.attention),
        "num_nextn_predict_layers": 0,
    }
    if config.init_std is not None:
        written["initializer_range"] = config.init_std
    if config.attention.mla is not None:
        written |= _mla_to_hf(config.attention.mla)
        written["rope_parameters"] |= _mscales(config, config.attention.mla)
    is_dense = [layer.ffn != "moe" for layer in config.layers]
    if config.moe is not None and not all(is_dense):
        written |= _moe_to_hf(config.moe) | {"first_k_dense_replace": is_dense.index(False)}
    else:
        written["first_k_dense_replace"] = config.num_layers
    defaults = {field.name: field.default for field in dataclasses.fields(DeepseekV3Fields)}
    unsaid = {"rope_theta", "rope_scaling"}
    return {name: x for name, x in defaults.items() if name not in unsaid} | written


def _mla_to_hf(mla: MLAConfig) -> dict[str, Any]:
    elsewhere = ("interleaved", "norm_eps", "mscale_all_dim")
    values = {name: x for name, x in dataclasses.asdict(mla).items() if name not in elsewhere}
    widths = {"head_dim": mla.qk_rope_head_dim, "qk_head_dim": mla.qk_nope_head_dim + mla.qk_rope_head_dim}
    return {**values, **widths, "rope_interleave": mla.interleaved}


def _mscales(config: DecoderConfig, mla: MLAConfig) -> dict[str, float]:
    """YaRN's m of the scores, and the m by which other engines than transformers know the amplitude."""
    if not mla.mscale_all_dim:
        return {}
    scaling = config.attention.rope_scaling
    growth = 0.0 if scaling is None else 0.1 * math.log(scaling.factor)
    if not isinstance(scaling, YarnRopeScaling) or not growth or scaling.attention_factor is None:
        return {"mscale_all_dim": mla.mscale_all_dim}
    mscale = round((scaling.amplitude * (growth * mla.mscale_all_dim + 1) - 1) / growth, 9)
    return {"attention_factor": scaling.amplitude, "mscale": mscale, "mscale_all_dim": mla.mscale_all_dim}


def _max_length(config: DecoderConfig) -> int:
    scaling = config.attention.rope_scaling
    length = DeepseekV3Fields.max_position_embeddings
    return length if scaling is None else round(scaling.original_length * scaling.factor)


def _moe_to_hf(moe: MoEConfig) -> dict[str, Any]:
    router: Mapping[str, Any] = moe.router if isinstance(moe.router, dict) else {}
    return {
        "moe_intermediate_size": moe.hidden_dim,
        "n_shared_experts": max(1, moe.shared_width // moe.hidden_dim),
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.normalize_scores,
        "n_group": router.get("num_groups", 1),
        "topk_group": router.get("top_groups", 1),
        "routed_scaling_factor": router.get("scale", 1.0),
    }


def prediction_tensors(config: Mapping[str, Any]) -> tuple[str, ...]:
    """How the names of tensors begin that predict further tokens: layers after the last one.

    transformers skips them too.
    """
    fields = _fields(config)
    last = fields.num_hidden_layers
    return tuple(f"model.layers.{i}." for i in range(last, last + fields.num_nextn_predict_layers))
