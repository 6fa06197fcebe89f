"""Layers for your own models; they need torch and einops only.

Shapes use one legend in the whole package: B batch, L length, T = B*L tokens, D dim, N query heads, G key/value heads,
H head_dim, F FFN width, E experts, K top_k, R = T*K routed rows, V vocabulary.
"""

from moesaic.layers.attention import (
    Attention,
    AttentionCache,
    AttentionTemperature,
    ShortConvolution,
    causal_attention,
    masked_attention,
)
from moesaic.layers.benchmark import benchmark_layer
from moesaic.layers.dispatch import DispatchContext, Dispatcher, LocalDispatcher
from moesaic.layers.experts import BACKENDS, Experts, choose_backend, run_experts
from moesaic.layers.feed_forward import ACTIVATIONS, FeedForward
from moesaic.layers.moe import MoE, RoutedLayer, mix_experts
from moesaic.layers.norm import RMSNorm
from moesaic.layers.rotary import Llama3RopeScaling, RotaryEmbedding
from moesaic.layers.router import Routing, TopKRouter, UniformRouter, count_tokens

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "Attention",
    "AttentionCache",
    "AttentionTemperature",
    "DispatchContext",
    "Dispatcher",
    "Experts",
    "FeedForward",
    "Llama3RopeScaling",
    "LocalDispatcher",
    "MoE",
    "RMSNorm",
    "RotaryEmbedding",
    "RoutedLayer",
    "Routing",
    "ShortConvolution",
    "TopKRouter",
    "UniformRouter",
    "benchmark_layer",
    "causal_attention",
    "choose_backend",
    "count_tokens",
    "masked_attention",
    "mix_experts",
    "run_experts",
]
