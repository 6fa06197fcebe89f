"""Decoders over the layers: configuration, construction, generation, accounting."""

from moesaic.models.accounting import Account, LayerAccount, account, kv_cache_bytes
from moesaic.models.config import AttentionConfig, DecoderConfig, LayerConfig, Mixer, MLAConfig, MoEConfig
from moesaic.models.decoder import Block, Decoder, DecoderOutput, build_decoder
from moesaic.models.generation import generate, sample
from moesaic.models.memory import MemoryEstimate, estimate_memory, trace_memory
from moesaic.models.multimodal import MultimodalDecoder, build_multimodal
from moesaic.models.multimodal_config import MultimodalConfig, VisionConfig
from moesaic.models.presets import (
    deepseek_v3,
    gpt_oss_20b,
    gpt_oss_120b,
    llama4_behemoth_guess,
    llama4_maverick,
    llama4_scout,
    llama4_toy,
    llama4_vision,
    mixtral_8x7b,
    muse_spark,
    olmoe_1b_7b,
    qwen3_30b_a3b,
    tiny_twin,
)
from moesaic.models.tiles import TileTokens, split_into_tiles, tile_grid
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
    "MultimodalConfig",
    "MultimodalDecoder",
    "TileTokens",
    "VisionConfig",
    "account",
    "build_decoder",
    "build_multimodal",
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
    "llama4_vision",
    "mixtral_8x7b",
    "muse_spark",
    "olmoe_1b_7b",
    "qwen3_30b_a3b",
    "sample",
    "split_into_tiles",
    "tile_grid",
    "tiny_twin",
    "trace_memory",
    "upcycle",
]
