"""The configuration of a decoder, and its depth pattern expanded to one entry per layer."""

import dataclasses
from typing import Any, Literal, get_args

from moesaic.layers import ACTIVATIONS, BACKENDS, AttentionTemperature, Llama3RopeScaling

__all__ = [
    "FFN",
    "AttentionConfig",
    "DecoderConfig",
    "LayerConfig",
    "Mixer",
    "MoEConfig",
]

Mixer = Literal["rope", "full_rope", "nope", "chunked_nope"]
"""Token mixers: RoPE on chunk-local or on full attention, no positions on full or on chunk-local attention."""

FFN = Literal["dense", "moe", "dense_twin"]
"""Channel mixers. `dense_twin` is a dense FFN of the width that a token meets in the MoE layer: top_k * F + shared."""

OwnPart = dict[str, Any]
"""A user's own module: {"type": "package.module.Class", ...its keyword arguments}; it is called with dim= as well."""


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Attention of all layers; the depth pattern says which of them have positions and chunks."""

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float = 500000.0
    rope_scaling: Llama3RopeScaling | None = None
    qk_norm: bool = True  # on layers with RoPE only, as in Llama 4
    attention_chunk_size: int | None = None
    temperature: AttentionTemperature | None = None  # on layers without positions only
    bias: bool = False
    conv_width: int = 0

    def __post_init__(self) -> None:
        _positive(self, "num_heads", "num_kv_heads", "head_dim", "attention_chunk_size", "rope_theta")
        if self.conv_width < 0:
            raise ValueError(f"conv_width={self.conv_width}: allowed are numbers >= 0")
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ValueError(f"num_heads={self.num_heads}: must be a multiple of num_kv_heads={self.num_kv_heads}")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The MoE layers. `hidden_dim` is the width of each routed expert, `shared_hidden_dim` that of the shared one."""

    num_experts: int
    hidden_dim: int
    top_k: int = 1
    shared_hidden_dim: int | None = None  # null: as hidden_dim; 0: no shared expert
    router: Literal["top_k", "uniform"] | OwnPart = "top_k"
    score_function: Literal["sigmoid", "softmax"] = "sigmoid"
    normalize_scores: bool = False
    score_before_experts: bool = True
    expert_bias: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        _positive(self, "num_experts", "hidden_dim")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k={self.top_k}: allowed are 1 to num_experts={self.num_experts}")
        if self.normalize_scores and self.top_k == 1:
            raise ValueError("normalize_scores=True: with top_k=1 every score is 1 and the router never learns")
        if self.shared_hidden_dim is not None and self.shared_hidden_dim < 0:
            raise ValueError(f"shared_hidden_dim={self.shared_hidden_dim}: allowed are numbers >= 0, or null")
        if self.backend != "auto" and self.backend not in BACKENDS:
            raise ValueError(f"backend={self.backend!r}: allowed are auto, {', '.join(BACKENDS)}")
        _check_own_part("router", self.router)
        if self.expert_bias and self.router != "top_k":
            raise ValueError(f"expert_bias=True: router={self.router!r} has no selection bias; it needs router=top_k")

    @property
    def shared_width(self) -> int:
        return self.hidden_dim if self.shared_hidden_dim is None else self.shared_hidden_dim

    @property
    def active_hidden_dim(self) -> int:
        """FFN width that one token meets: the width of the dense twin."""
        return self.top_k * self.hidden_dim + self.shared_width


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """One entry of the depth pattern."""

    mixer: Mixer | OwnPart
    ffn: FFN | OwnPart

    def __post_init__(self) -> None:
        _check_own_part("mixer", self.mixer)
        _check_own_part("ffn", self.ffn)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer.

    The depth pattern is given either as `pattern`, a list of {mixer, ffn} tiled over the layers, or by Llama 4's two
    intervals: layer i (from 0) is a MoE layer if (i + 1) % interleave_moe_layer_step == 0 and has no positions if
    (i + 1) % nope_layer_interval == 0; 0 means never. `layers` is the expanded list either way.
    """

    vocab_size: int
    dim: int
    num_layers: int
    attention: AttentionConfig
    hidden_dim: int  # of the dense FFN
    moe: MoEConfig | None = None
    pattern: tuple[LayerConfig, ...] | None = None
    interleave_moe_layer_step: int | None = None
    nope_layer_interval: int | None = None
    dense_twin: bool = False  # replace every MoE layer by its dense twin of equal active FLOPs
    activation: str = "silu"
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    init_std: float | None = 0.02  # null: 1 / sqrt(fan_in)
    padding_token: int | None = None  # its embedding gets no gradient

    def __post_init__(self) -> None:
        _positive(self, "vocab_size", "dim", "num_layers", "hidden_dim", "norm_eps", "init_std")
        if self.padding_token is not None and not 0 <= self.padding_token < self.vocab_size:
            raise ValueError(f"padding_token={self.padding_token}: allowed are token ids below {self.vocab_size}")
        intervals = {"interleave_moe_layer_step": self.interleave_moe_layer_step}
        intervals["nope_layer_interval"] = self.nope_layer_interval
        for name, interval in intervals.items():
            if interval is not None and interval < 0:
                raise ValueError(f"{name}={interval}: allowed are numbers >= 0 (0: never)")
            if (interval is None) == (self.pattern is None):
                raise ValueError(
                    f"{name}={interval}: give either `pattern` or both intervals, not both and not neither"
                )
        if self.pattern is not None and not self.pattern:
            raise ValueError("pattern=[]: it needs at least one entry of {mixer, ffn}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r}: allowed are {', '.join(ACTIVATIONS)}")
        if self.attention.head_dim is None and self.dim % self.attention.num_heads:
            raise ValueError(
                f"attention.num_heads={self.attention.num_heads}: must divide dim={self.dim} where "
                "attention.head_dim is null"
            )
        mixers = {layer.mixer for layer in self.layers if isinstance(layer.mixer, str)}
        if self.head_dim % 2 and mixers & {"rope", "full_rope"}:
            raise ValueError(f"attention.head_dim={self.head_dim}: RoPE rotates pairs, head_dim must be even")
        if self.moe is None and any(layer.ffn in ("moe", "dense_twin") for layer in self.layers):
            raise ValueError("moe=None: the depth pattern has MoE layers, so `moe` is needed")
        if "chunked_nope" in mixers and self.attention.attention_chunk_size is None:
            raise ValueError("attention.attention_chunk_size=None: the depth pattern has chunked_nope layers")

    @property
    def head_dim(self) -> int:
        return self.attention.head_dim or self.dim // self.attention.num_heads

    @property
    def num_kv_heads(self) -> int:
        return self.attention.num_kv_heads or self.attention.num_heads

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        """The depth pattern, one entry per layer."""
        if self.pattern is not None:
            layers = [self.pattern[i % len(self.pattern)] for i in range(self.num_layers)]
        else:
            layers = [
                LayerConfig(
                    mixer="nope" if _every(self.nope_layer_interval, i) else "rope",
                    ffn="moe" if _every(self.interleave_moe_layer_step, i) else "dense",
                )
                for i in range(self.num_layers)
            ]
        if self.dense_twin:
            layers = [dataclasses.replace(x, ffn="dense_twin") if x.ffn == "moe" else x for x in layers]
        return tuple(layers)

    def chunk_of(self, mixer: Mixer) -> int | None:
        """Chunk size of a built-in mixer; None for full attention."""
        return self.attention.attention_chunk_size if mixer in ("rope", "chunked_nope") else None

    def ffn_width(self, ffn: FFN) -> int:
        """Inner width of a built-in dense FFN."""
        if ffn == "dense_twin":
            assert self.moe is not None  # checked at construction
            return self.moe.active_hidden_dim
        return self.hidden_dim


def _every(interval: int | None, i: int) -> bool:
    return bool(interval) and (i + 1) % (interval or 1) == 0


def _positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name}={value}: allowed are numbers > 0")


def _check_own_part(name: str, part: str | OwnPart) -> None:
    built_in = {"mixer": get_args(Mixer), "ffn": get_args(FFN), "router": ("top_k", "uniform")}[name]
    if isinstance(part, str) and part not in built_in:
        raise ValueError(f"{name}={part!r}: allowed are {', '.join(built_in)}, or an own part")
    if isinstance(part, dict) and not isinstance(part.get("type"), str):
        raise ValueError(
            f"{name}={part}: an own part needs `type: package.module.Class`; built-in are {', '.join(built_in)}"
        )
