"""The configuration of a decoder, and its depth pattern expanded to one entry per layer."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from moesaic.layers import ActivationName, AttentionTemperature, BackendName, QKNorm, RopeScaling, YarnRopeScaling
from moesaic.layers.clamped_experts import BACKENDS_WITH_BIASES
from moesaic.layers.router import ScoreFunction
from moesaic.layers.routers import RouterName

__all__ = [
    "FFN",
    "FORMAT",
    "WITH_ROPE",
    "AttentionConfig",
    "BaseShape",
    "CustomModule",
    "DecoderConfig",
    "ExpertsName",
    "LayerConfig",
    "MLAConfig",
    "Mixer",
    "MoEConfig",
]

Mixer = Literal["rope", "chunked_rope", "nope", "chunked_nope", "windowed_rope", "mla"]
"""Token mixers: RoPE on full or chunk-local attention or on a sliding window, no positions on full or chunk-local.

`mla` is `MultiHeadLatentAttention`, with RoPE on full attention.
"""

WITH_ROPE: frozenset[Mixer] = frozenset({"rope", "chunked_rope", "windowed_rope"})
"""The mixers of `Attention` that rotate queries and keys."""

FFN = Literal["dense", "moe", "dense_twin"]
"""Channel mixers. `dense_twin` is a dense FFN of the width that a token meets in the MoE layer: top_k * F + shared."""

ExpertsName = Literal["swiglu", "clamped_swiglu"]
"""Routed experts: those of `Experts`, with the model's activation, or those of `ClampedExperts`, with biases."""

CustomModule = dict[str, Any]
"""A user's own module: {"type": "package.module.Class", ...its keyword arguments}, see `moesaic.models.custom`.

For a router `type` may also be a name of `RouterName`, which then gets these arguments.
"""

FORMAT = 2
"""Version of the words of this file. In version 1, which carries no number, `rope` meant today's `chunked_rope`."""


@dataclasses.dataclass(frozen=True)
class MLAConfig:
    """Widths of the mixer `mla`: see `moesaic.layers.MultiHeadLatentAttention`."""

    kv_lora_rank: int = dataclasses.field(metadata={"most": 2**20})
    qk_nope_head_dim: int = dataclasses.field(metadata={"most": 2**16})
    qk_rope_head_dim: int = dataclasses.field(metadata={"most": 2**16})
    v_head_dim: int = dataclasses.field(metadata={"most": 2**16})
    q_lora_rank: int | None = dataclasses.field(default=None, metadata={"most": 2**20})
    interleaved: bool = True  # false: RoPE rotates the halves of a head, not neighbors
    norm_eps: float = 1e-6  # of the latents' norms
    # m of (0.1 m ln(rope_scaling.factor) + 1)^2, by which scores are multiplied; 0: by 1
    mscale_all_dim: float = dataclasses.field(default=0.0, metadata={"most": 1e3})

    def __post_init__(self) -> None:
        _positive(self, "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank")
        _within(self, "norm_eps", 1e-20, 1.0)
        if self.mscale_all_dim < 0:
            raise ValueError(f"mscale_all_dim={self.mscale_all_dim}: must be a number >= 0")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim={self.qk_rope_head_dim}: must be even, as RoPE rotates pairs")


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Attention of all layers; the depth pattern says which of them have positions and chunks."""

    num_heads: int = dataclasses.field(metadata={"most": 2**16})
    num_kv_heads: int | None = dataclasses.field(default=None, metadata={"most": 2**16})
    head_dim: int | None = dataclasses.field(default=None, metadata={"most": 2**16})
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    # true: after RoPE and on layers with RoPE only, as in Llama 4; those by name: before RoPE, on all layers
    qk_norm: bool | QKNorm = True
    clip_qkv: float | None = dataclasses.field(default=None, metadata={"most": 1e9})
    attention_chunk_size: int | None = None
    temperature: AttentionTemperature | None = None  # on layers without positions only
    bias: bool = False
    conv_width: int = dataclasses.field(default=0, metadata={"most": 2**10})
    window: int | None = None  # tokens that a query of a windowed layer sees, its own included
    sinks: bool = False  # on all layers: a learned logit per head in the softmax
    mla: MLAConfig | None = None  # of the mixer mla, which has no other of these but num_heads, rope_* and bias

    def __post_init__(self) -> None:
        _positive(self, "num_heads", "num_kv_heads", "head_dim", "attention_chunk_size", "rope_theta", "clip_qkv")
        _positive(self, "window")
        _within(self, "rope_theta", 1.0, 1e15)
        if self.rope_theta == 1 and isinstance(self.rope_scaling, YarnRopeScaling):
            raise ValueError(f"rope_theta={self.rope_theta}: must be a number > 1 with YaRN")
        if self.conv_width < 0:
            raise ValueError(f"conv_width={self.conv_width}: must be a number >= 0")
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ValueError(f"num_heads={self.num_heads}: must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.mla is not None:
            _require_nothing_beside_mla(self)


def _require_nothing_beside_mla(attention: AttentionConfig) -> None:
    """Refuse what the mixer `mla` does not have, and would leave aside without a word."""
    absent: dict[str, Any] = {"num_kv_heads": None, "head_dim": None, "qk_norm": False, "clip_qkv": None}
    absent |= {"attention_chunk_size": None, "temperature": None, "conv_width": 0, "window": None, "sinks": False}
    for name, allowed in absent.items():
        if (found := getattr(attention, name)) != allowed:
            meant = "null" if allowed is None else str(allowed).lower()
            raise ValueError(f"{name}={found}: must be {meant} beside attention.mla, which has no such thing")
    assert attention.mla is not None
    if attention.mla.mscale_all_dim and attention.rope_scaling is None:
        raise ValueError(f"mla.mscale_all_dim={attention.mla.mscale_all_dim}: must be 0 without rope_scaling")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The MoE layers. `hidden_dim` is the width of each routed expert, `shared_hidden_dim` that of the shared one."""

    num_experts: int = dataclasses.field(metadata={"most": 2**14})
    hidden_dim: int = dataclasses.field(metadata={"most": 2**22})
    top_k: int = 1
    # null: as hidden_dim; 0: no shared expert
    shared_hidden_dim: int | None = dataclasses.field(default=None, metadata={"most": 2**22})
    router: RouterName | CustomModule = "top_k"
    score_function: ScoreFunction = "sigmoid"
    normalize_scores: bool = False
    score_before_experts: bool = True
    expert_bias: bool = False
    backend: BackendName = "auto"
    dispatcher: Literal["local"] | CustomModule = "local"
    experts: ExpertsName | CustomModule = "swiglu"
    swiglu_alpha: float = dataclasses.field(default=1.702, metadata={"most": 1e6})  # these two of clamped_swiglu
    swiglu_limit: float = dataclasses.field(default=7.0, metadata={"most": 1e9})
    identity_experts: int = dataclasses.field(default=0, metadata={"most": 2**14})  # besides: return their input
    skip_experts: int = dataclasses.field(default=0, metadata={"most": 2**14})  # besides: return zero
    latent_dim: int | None = dataclasses.field(default=None, metadata={"most": 2**20})  # null: experts as wide as dim

    def __post_init__(self) -> None:
        _positive(self, "num_experts", "hidden_dim")
        _positive(self, "latent_dim", "swiglu_alpha", "swiglu_limit")
        for name in ("identity_experts", "skip_experts"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be a number >= 0")
        if not 1 <= self.top_k <= self.num_routed:
            besides = " and those without weights" if self.num_routed > self.num_experts else ""
            raise ValueError(f"top_k={self.top_k}: must be 1 to num_experts={self.num_experts}{besides}")
        if self.normalize_scores and self.top_k == 1:
            raise ValueError("normalize_scores=True: with top_k=1 every score is 1 and the router never learns")
        if self.shared_hidden_dim is not None and self.shared_hidden_dim < 0:
            raise ValueError(f"shared_hidden_dim={self.shared_hidden_dim}: must be a number >= 0, or null")
        if self.backend not in get_args(BackendName):
            raise ValueError(f"backend={self.backend!r}: must be one of {', '.join(get_args(BackendName))}")
        if self.experts == "clamped_swiglu" and self.backend not in BACKENDS_WITH_BIASES:
            raise ValueError(
                f"backend={self.backend!r}: must be one of {', '.join(BACKENDS_WITH_BIASES)} with "
                "experts=clamped_swiglu, whose biases the others have no place for"
            )
        _check_part("router", self.router)
        _check_part("dispatcher", self.dispatcher)
        _check_part("experts", self.experts)
        if self.expert_bias and self.router == "uniform":
            raise ValueError(
                "expert_bias=True: router=uniform has no selection bias; it must be top_k or a custom module"
            )

    @property
    def num_routed(self) -> int:
        """All that a router chooses from: the experts, and those without weights."""
        return self.num_experts + self.identity_experts + self.skip_experts

    @property
    def built_in_router(self) -> RouterName | None:
        """The name of the router; None for a custom module."""
        name = self.router["type"] if isinstance(self.router, dict) else self.router
        return name if name in get_args(RouterName) else None

    @property
    def shared_width(self) -> int:
        return self.hidden_dim if self.shared_hidden_dim is None else self.shared_hidden_dim

    @property
    def active_hidden_dim(self) -> int:
        """FFN width that one token meets, with equal loads: the width of the dense twin."""
        return self.top_k * self.num_experts * self.hidden_dim // self.num_routed + self.shared_width


@dataclasses.dataclass(frozen=True)
class BaseShape:
    """The model at which the settings of a parametrization that transfers are what the config says."""

    dim: int = dataclasses.field(metadata={"most": 2**20})
    num_layers: int = dataclasses.field(metadata={"most": 2**10})

    def __post_init__(self) -> None:
        _positive(self, "dim", "num_layers")


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """One entry of the depth pattern."""

    mixer: Mixer | CustomModule
    ffn: FFN | CustomModule

    def __post_init__(self) -> None:
        _check_part("mixer", self.mixer)
        _check_part("ffn", self.ffn)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer.

    The depth pattern is given either as `pattern`, a list of {mixer, ffn} tiled over the layers, or by Llama 4's two
    intervals: layer i (from 0) is a MoE layer if (i + 1) % interleave_moe_layer_step == 0 and has no positions if
    (i + 1) % nope_layer_interval == 0; 0 means never. The first `first_dense_layers` layers are dense all the same.
    With intervals all mixers are `mla` where `attention.mla` is given. `layers` is the expanded list either way.
    """

    vocab_size: int = dataclasses.field(metadata={"most": 2**24})
    dim: int = dataclasses.field(metadata={"most": 2**20})
    num_layers: int = dataclasses.field(metadata={"most": 2**10})
    attention: AttentionConfig
    hidden_dim: int = dataclasses.field(metadata={"most": 2**22})  # of the dense FFN
    moe: MoEConfig | None = None
    pattern: tuple[LayerConfig, ...] | None = None
    interleave_moe_layer_step: int | None = None
    nope_layer_interval: int | None = None
    first_dense_layers: int = dataclasses.field(default=0, metadata={"most": 2**10})  # with intervals: not MoE
    dense_twin: bool = False  # replace every MoE layer by its dense twin of equal active FLOPs
    activation: ActivationName = "silu"
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    init_std: float | None = dataclasses.field(default=0.02, metadata={"most": 100.0})  # null: 1 / sqrt(fan_in)
    padding_token: int | None = None  # its embedding gets no gradient
    parametrization: Literal["standard", "scaled_logits", "transfer"] = "standard"
    base: BaseShape | None = None  # of transfer; null: as transfer.base of the run
    format: int = FORMAT  # version of these words

    def __post_init__(self) -> None:
        _positive(self, "vocab_size", "dim", "num_layers", "hidden_dim", "norm_eps", "init_std")
        _within(self, "norm_eps", 1e-20, 1.0)
        if self.padding_token is not None and not 0 <= self.padding_token < self.vocab_size:
            raise ValueError(f"padding_token={self.padding_token}: must be a token id below {self.vocab_size}")
        intervals = {"interleave_moe_layer_step": self.interleave_moe_layer_step}
        intervals["nope_layer_interval"] = self.nope_layer_interval
        for name, interval in intervals.items():
            if interval is not None and interval < 0:
                raise ValueError(f"{name}={interval}: must be a number >= 0 (0: never)")
            if (interval is None) == (self.pattern is None):
                raise ValueError(
                    f"{name}={interval}: give either `pattern` or both intervals; beside a pattern both must be null "
                    "(model.interleave_moe_layer_step=null model.nope_layer_interval=null)"
                )
        if self.pattern is not None and not self.pattern:
            raise ValueError("pattern=[]: it needs at least one entry of {mixer, ffn}")
        if self.activation not in get_args(ActivationName):
            raise ValueError(f"activation={self.activation!r}: must be one of {', '.join(get_args(ActivationName))}")
        if self.first_dense_layers < 0 or (self.first_dense_layers and self.pattern is not None):
            raise ValueError(
                f"first_dense_layers={self.first_dense_layers}: must be a number >= 0, and 0 beside a pattern"
            )
        if self.attention.mla is None and self.attention.head_dim is None and self.dim % self.attention.num_heads:
            raise ValueError(
                f"attention.num_heads={self.attention.num_heads}: must divide dim={self.dim} where "
                "attention.head_dim is null"
            )
        mixers = {layer.mixer for layer in self.layers if isinstance(layer.mixer, str)}
        if self.head_dim % 2 and mixers & WITH_ROPE:
            raise ValueError(f"attention.head_dim={self.head_dim}: RoPE rotates pairs, head_dim must be even")
        _check_mla(self.attention.mla, mixers)
        if self.moe is None and any(layer.ffn in ("moe", "dense_twin") for layer in self.layers):
            raise ValueError("moe=None: the depth pattern has MoE layers, so `moe` is needed")
        chunk = self.attention.attention_chunk_size
        if chunk is None and (chunked := mixers & {"chunked_rope", "chunked_nope"}):
            raise ValueError(f"attention.attention_chunk_size=None: the depth pattern has {chunked.pop()} layers")
        if self.attention.window is None and "windowed_rope" in mixers:
            raise ValueError("attention.window=None: the depth pattern has windowed_rope layers")
        if self.attention.sinks and (chunked := mixers & {"chunked_rope", "chunked_nope"}):
            raise ValueError(f"attention.sinks=True: must be false, as the depth pattern has {chunked.pop()} layers")
        if any(layer.ffn == "dense_twin" for layer in self.layers) and self.moe and self.moe.latent_dim:
            raise ValueError(f"moe.latent_dim={self.moe.latent_dim}: must be null with a dense twin, which has no such")
        if self.parametrization == "transfer" and self.base is None:
            raise ValueError("base=None: parametrization=transfer needs {dim, num_layers} there")
        if self.parametrization != "transfer" and self.base is not None:
            raise ValueError(f"base: must be null with parametrization={self.parametrization}")
        if self.parametrization != "standard" and self.tie_embeddings:
            raise ValueError(
                f"tie_embeddings=True: must be false with parametrization={self.parametrization}, as no rule holds for "
                "an embedding and a head at once"
            )
        if self.format != FORMAT:
            raise ValueError(f"format={self.format}: must be {FORMAT}")

    @classmethod
    def check_mapping(cls, values: Mapping[str, Any]) -> None:
        """Refuse `rope` beside chunks in a config that does not say its format: it may be from before the renaming."""
        attention, pattern = values.get("attention"), values.get("pattern")
        for i, layer in enumerate(pattern if isinstance(pattern, (list, tuple)) else ()):
            if isinstance(layer, Mapping) and layer.get("mixer") == "full_rope":
                raise ValueError(f"pattern[{i}].mixer='full_rope': it is called rope now")
        if "format" in values or not isinstance(attention, Mapping) or not isinstance(pattern, (list, tuple)):
            return
        chunk = attention.get("attention_chunk_size")
        if chunk is not None and any(isinstance(x, Mapping) and x.get("mixer") == "rope" for x in pattern):
            raise ValueError(
                f"pattern: mixer rope beside attention.attention_chunk_size={chunk} meant chunk-local attention in "
                f"format 1 and means full attention now; say chunked_rope for the former, or format: {FORMAT} beside "
                f"the pattern (+model.format={FORMAT} on the command line) for the latter"
            )

    @property
    def head_dim(self) -> int:
        """Width of a head's queries and keys, and of its values but for `mla`."""
        if (mla := self.attention.mla) is not None:
            return mla.qk_nope_head_dim + mla.qk_rope_head_dim
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
            rope: Mixer = "rope" if self.attention.attention_chunk_size is None else "chunked_rope"
            if self.attention.mla is not None:
                rope = "mla"
            layers = [
                LayerConfig(
                    mixer="nope" if _every(self.nope_layer_interval, i) else rope,
                    ffn="moe"
                    if i >= self.first_dense_layers and _every(self.interleave_moe_layer_step, i)
                    else "dense",
                )
                for i in range(self.num_layers)
            ]
        if self.dense_twin:
            layers = [dataclasses.replace(x, ffn="dense_twin") if x.ffn == "moe" else x for x in layers]
        return tuple(layers)

    def chunk_of(self, mixer: Mixer) -> int | None:
        """Chunk size of a built-in mixer; None for full attention."""
        return self.attention.attention_chunk_size if mixer in ("chunked_rope", "chunked_nope") else None

    def window_of(self, mixer: Mixer) -> int | None:
        """Keys that a query of a built-in mixer sees at most, where they slide with it; None where they do not."""
        return self.attention.window if mixer == "windowed_rope" else None

    def ffn_width(self, ffn: FFN) -> int:
        """Inner width of a built-in dense FFN."""
        if ffn == "dense_twin":
            assert self.moe is not None  # checked at construction
            return self.moe.active_hidden_dim
        return self.hidden_dim


def _check_mla(mla: MLAConfig | None, mixers: set[Mixer]) -> None:
    """Refuse `mla` without its widths, and beside other built-in mixers, which need what it has not."""
    if mla is None and "mla" in mixers:
        raise ValueError("attention.mla=None: the depth pattern has mla layers, so their widths are needed")
    if mla is not None and (others := sorted(mixers - {"mla"})):
        raise ValueError(
            f"attention.mla: must be null where layers have the mixer {others[0]}; only custom mixers can stand beside "
            "the mixer mla (nope_layer_interval must be 0)"
        )


def _every(interval: int | None, i: int) -> bool:
    return bool(interval) and (i + 1) % (interval or 1) == 0


def _positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name}={value}: must be a number > 0")


def _within(config: Any, name: str, least: float, most: float) -> None:
    """Refuse what fp32 turns into zero or infinity: nobody trains with it, and what breaks then blames other keys."""
    if not least <= (value := getattr(config, name)) <= most:
        raise ValueError(f"{name}={value}: must be a number from {least:g} to {most:g}")


BUILT_IN = {
    "mixer": get_args(Mixer),
    "ffn": get_args(FFN),
    "router": get_args(RouterName),
    "dispatcher": ("local",),
    "experts": get_args(ExpertsName),
}


def _check_part(name: str, part: str | CustomModule) -> None:
    known = ", ".join(BUILT_IN[name])
    if isinstance(part, str) and part not in BUILT_IN[name]:
        meant = " (it is called rope now)" if part == "full_rope" else ""
        raise ValueError(f"{name}={part!r}{meant}: must be one of {known}, or a custom module {{type: dotted path}}")
    if isinstance(part, dict) and not isinstance(part.get("type"), str):
        raise ValueError(f"{name}={part}: a custom module needs `type: package.module.Class`; built-in are {known}")
    if name != "router" or not isinstance(part, dict) or set(".:") & set(part["type"]):
        return
    if part["type"] not in BUILT_IN[name]:
        raise ValueError(f"router.type={part['type']!r}: must be package.module.Class, or one of {known}")
