"""Layers for your own models; they need torch and einops only.

Shapes use one legend in the whole package: B batch, L length, T = B * L tokens, D dim, N query heads, G key/value
heads, H head_dim, F FFN width, E experts, K top_k, R = T * K routed rows, V vocabulary.
"""

from moesaic.layers.attention import (
    Attention,
    AttentionCache,
    AttentionTemperature,
    QKNorm,
    ShortConvolution,
    causal_attention,
    masked_attention,
)
from moesaic.layers.backend_choice import BackendName, choose_backend
from moesaic.layers.backends import BACKENDS, run_experts
from moesaic.layers.clamped_experts import ClampedExperts, clamped_swiglu
from moesaic.layers.collect import collect_routings
from moesaic.layers.control_routers import UniformRouter
from moesaic.layers.dispatch import Dispatched, Dispatcher, LocalDispatcher
from moesaic.layers.experts import Experts
from moesaic.layers.feed_forward import ACTIVATIONS, ActivationName, FeedForward
from moesaic.layers.fp8 import Fp8Recipe
from moesaic.layers.fp8_emulation import emulating_fp8
from moesaic.layers.free_experts import FreeExperts
from moesaic.layers.latent import Latent
from moesaic.layers.mla import MultiHeadLatentAttention
from moesaic.layers.moe import MoE, RoutedLayer, mix_experts
from moesaic.layers.norm import RMSNorm
from moesaic.layers.normed_experts import NormedExperts
from moesaic.layers.parametrization import (
    Fans,
    ParameterKind,
    Parametrization,
    ScaledLogits,
    Scales,
    Transfer,
    parameter_fans,
)
from moesaic.layers.part import Flops, Part, parameter_kinds
from moesaic.layers.rotary import Llama3RopeScaling, RopeScaling, RotaryEmbedding, YarnRopeScaling
from moesaic.layers.router import TopKRouter
from moesaic.layers.routers import (
    ROUTERS,
    CapacityRouter,
    ExpertChoiceRouter,
    GroupLimitedRouter,
    HashRouter,
    MlpRouter,
    NoisyTopKRouter,
    QuantileRouter,
    ReluRouter,
    SinkhornRouter,
    ThresholdRouter,
    TopPRouter,
)
from moesaic.layers.routers.moving import MovingRouter
from moesaic.layers.routing import Routing, count_tokens
from moesaic.layers.soft_moe import SoftMoE
from moesaic.layers.unequal_experts import UnequalExperts
from moesaic.layers.vision import (
    PixelShuffleAdapter,
    RotaryEmbedding2d,
    VisionAttention,
    VisionBlock,
    VisionEncoder,
    VisionFeedForward,
    VisionTransformer,
    pixel_shuffle,
    to_patches,
)
from moesaic.layers.windowed_attention import WindowedAttention

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "ROUTERS",
    "ActivationName",
    "Attention",
    "AttentionCache",
    "AttentionTemperature",
    "BackendName",
    "CapacityRouter",
    "ClampedExperts",
    "Dispatched",
    "Dispatcher",
    "ExpertChoiceRouter",
    "Experts",
    "Fans",
    "FeedForward",
    "Flops",
    "Fp8Recipe",
    "FreeExperts",
    "GroupLimitedRouter",
    "HashRouter",
    "Latent",
    "Llama3RopeScaling",
    "LocalDispatcher",
    "MlpRouter",
    "MoE",
    "MovingRouter",
    "MultiHeadLatentAttention",
    "NoisyTopKRouter",
    "NormedExperts",
    "ParameterKind",
    "Parametrization",
    "Part",
    "PixelShuffleAdapter",
    "QKNorm",
    "QuantileRouter",
    "RMSNorm",
    "ReluRouter",
    "RopeScaling",
    "RotaryEmbedding",
    "RotaryEmbedding2d",
    "RoutedLayer",
    "Routing",
    "ScaledLogits",
    "Scales",
    "ShortConvolution",
    "SinkhornRouter",
    "SoftMoE",
    "ThresholdRouter",
    "TopKRouter",
    "TopPRouter",
    "Transfer",
    "UnequalExperts",
    "UniformRouter",
    "VisionAttention",
    "VisionBlock",
    "VisionEncoder",
    "VisionFeedForward",
    "VisionTransformer",
    "WindowedAttention",
    "YarnRopeScaling",
    "causal_attention",
    "choose_backend",
    "clamped_swiglu",
    "collect_routings",
    "count_tokens",
    "emulating_fp8",
    "masked_attention",
    "mix_experts",
    "parameter_fans",
    "parameter_kinds",
    "pixel_shuffle",
    "run_experts",
    "to_patches",
]
