"""Shapes of a decoder's parameters, from its config alone: only a router is built, so any size is answered at once."""

import math
from typing import Any, NamedTuple

from moesaic.layers.parametrization import ParameterKind
from moesaic.models.config import DecoderConfig, LayerConfig, MLAConfig
from moesaic.models.routers import router_parameters

__all__ = [
    "Shape",
    "attention_shapes",
    "decoder_shapes",
    "feed_forward_shapes",
    "num_parameters",
    "uncounted",
]


class Shape(NamedTuple):
    """One parameter."""

    sizes: tuple[int, ...]
    kind: ParameterKind

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


def decoder_shapes(config: DecoderConfig) -> list[Shape]:
    """All parameters of `build_decoder(config)`, without those of its custom modules. A tied head counts once."""
    sizes = (config.vocab_size, config.dim)
    head = [] if config.tie_embeddings else [Shape(sizes, "output")]
    layers = [shape for layer in config.layers for shape in _layer_shapes(config, layer)]
    return [Shape(sizes, "embedding"), *layers, Shape((config.dim,), "vector"), *head]


def _layer_shapes(config: DecoderConfig, layer: LayerConfig) -> list[Shape]:
    """One block: its norms, and what of its mixer and its feed-forward layer is built in."""
    norm = Shape((config.dim,), "vector")
    shapes = [norm, norm]
    if isinstance(layer.mixer, str):
        shapes += attention_shapes(config)
    if layer.ffn == "moe":
        shapes += _moe_shapes(config)
    elif isinstance(layer.ffn, str):
        shapes += feed_forward_shapes(config.dim, config.ffn_width(layer.ffn))
    return shapes


def attention_shapes(config: DecoderConfig) -> list[Shape]:
    attention, dim = config.attention, config.dim
    if attention.mla is not None:
        return _mla_shapes(config, attention.mla)
    queries, keys = attention.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    matrices = [(queries, dim), (keys, dim), (keys, dim), (dim, queries)]
    shapes = [Shape(sizes, "matrix") for sizes in matrices]
    if attention.sinks:
        shapes.append(Shape((attention.num_heads,), "vector"))
    if attention.bias:
        shapes += [Shape((outputs,), "vector") for outputs, _ in matrices]
    if isinstance(attention.qk_norm, str):
        one_head = (config.head_dim, config.head_dim)
        shapes += [
            Shape((width,), "vector") for width in (one_head if attention.qk_norm == "per_head" else (queries, keys))
        ]
    if attention.conv_width:
        shapes.append(Shape((attention.conv_width, queries + 2 * keys), "vector"))
    return shapes


def _mla_shapes(config: DecoderConfig, mla: MLAConfig) -> list[Shape]:
    dim, heads, bias = config.dim, config.attention.num_heads, config.attention.bias
    queries, rank = heads * config.head_dim, mla.q_lora_rank
    down = mla.kv_lora_rank + mla.qk_rope_head_dim
    matrices = [(queries, rank or dim), (down, dim)]
    matrices += [(heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank), (dim, heads * mla.v_head_dim)]
    vectors = [mla.kv_lora_rank, *([down, dim] if bias else [])]
    if rank is not None:
        matrices.append((rank, dim))
        vectors += [rank, *([rank] if bias else [])]
    return [Shape(sizes, "matrix") for sizes in matrices] + [Shape((size,), "vector") for size in vectors]


def feed_forward_shapes(dim: int, width: int) -> list[Shape]:
    return [Shape((width, dim), "matrix"), Shape((width, dim), "matrix"), Shape((dim, width), "matrix")]


def _moe_shapes(config: DecoderConfig) -> list[Shape]:
    moe, dim = config.moe, config.dim
    assert moe is not None  # checked by the config
    shapes = []
    if isinstance(moe.experts, str):
        width = moe.latent_dim or dim
        shapes.append(Shape((moe.num_experts, width, 2 * moe.hidden_dim), "matrix"))
        shapes.append(Shape((moe.num_experts, moe.hidden_dim, width), "matrix"))
    if moe.experts == "clamped_swiglu":
        shapes += [Shape((moe.num_experts, outputs), "vector") for outputs in (2 * moe.hidden_dim, width)]
    if moe.experts == "normed_swiglu":
        shapes.append(Shape((width,), "vector"))
    if moe.latent_norm and moe.latent_dim:
        shapes.append(Shape((moe.latent_dim,), "vector"))
    if moe.latent_dim:
        shapes += [Shape((moe.latent_dim, dim), "matrix"), Shape((dim, moe.latent_dim), "matrix")]
    if moe.shared_width:
        shapes += feed_forward_shapes(dim, moe.shared_width)
    return shapes + [Shape(*each) for each in router_parameters(config)]


def num_parameters(config: DecoderConfig) -> int:
    """Number of all parameters, without those of custom modules."""
    return sum(shape.numel for shape in decoder_shapes(config))


def uncounted(config: DecoderConfig) -> tuple[str, ...]:
    """Dotted paths of the custom modules whose parameters only building them can tell."""
    parts: list[Any] = [part for layer in config.layers for part in (layer.mixer, layer.ffn)]
    if config.moe is not None and any(layer.ffn == "moe" for layer in config.layers):
        parts += [*([] if config.moe.built_in_router else [config.moe.router]), config.moe.experts]
    return tuple(dict.fromkeys(part["type"] for part in parts if isinstance(part, dict)))
