"""Decoders over the layers: configuration, construction, generation, accounting."""

from moesaic.models.accounting import Account, LayerAccount, account, kv_cache_bytes
from moesaic.models.config import AttentionConfig, DecoderConfig, LayerConfig, Mixer, MLAConfig, MoEConfig
from moesaic.models.decoder import Block, Decoder, DecoderOutput, build_decoder
from moesaic.models.generation import generate, sample
from moesaic.models.memory import MemoryEstimate, estimate_memory, trace_memory
from moesaic.models.presets import (
    deepseek_v3,
    gpt_oss_20b,
    gpt_oss_120b,
    llama4_behemoth_guess,
    llama4_maverick,
    llama4_scout,
    llama4_toy,
    mixtral_8x7b,
    olmoe_1b_7b,
    qwen3_30b_a3b,
    tiny_twin,
)
from moesaic.models.upcycling import upcycle

__all__ = [
    "Account",
    "AttentionConfig",
    "Block",
    "Decoder",
    "DecoderConfig",
    "DecoderOutput",
    "LayerAccount",
    "LayerConfig",
    "MLAConfig",
    "MemoryEstimate",
    "Mixer",
    "MoEConfig",
    "account",
    "build_decoder",
    "deepseek_v3",
    "estimate_memory",
    "generate",
    "gpt_oss_20b",
    "gpt_oss_120b",
    "kv_cache_bytes",
    "llama4_behemoth_guess",
    "llama4_maverick",
    "llama4_scout",
    "llama4_toy",
    "mixtral_8x7b",
    "olmoe_1b_7b",
    "qwen3_30b_a3b",
    "sample",
    "tiny_twin",
    "trace_memory",
    "upcycle",
]
