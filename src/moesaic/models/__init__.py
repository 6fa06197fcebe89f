"""Decoders over the layers: configuration, construction, generation, accounting."""

from moesaic.models.accounting import Account, LayerAccount, account, kv_cache_bytes
from moesaic.models.config import AttentionConfig, DecoderConfig, LayerConfig, MoEConfig
from moesaic.models.decoder import Block, Decoder, DecoderOutput, build_decoder
from moesaic.models.generation import generate, sample
from moesaic.models.memory import MemoryEstimate, estimate_memory, trace_memory
from moesaic.models.multimodal import MultimodalDecoder, build_multimodal
from moesaic.models.multimodal_config import MultimodalConfig, VisionConfig
from moesaic.models.presets import (
    llama4_behemoth_guess,
    llama4_maverick,
    llama4_scout,
    llama4_toy,
    llama4_vision,
    mixtral_8x7b,
    olmoe_1b_7b,
    qwen3_30b_a3b,
    tiny_twin,
)
from moesaic.models.tiles import TileTokens, split_into_tiles, tile_grid

__all__ = [
    "Account",
    "AttentionConfig",
    "Block",
    "Decoder",
    "DecoderConfig",
    "DecoderOutput",
    "LayerAccount",
    "LayerConfig",
    "MemoryEstimate",
    "MoEConfig",
    "MultimodalConfig",
    "MultimodalDecoder",
    "TileTokens",
    "VisionConfig",
    "account",
    "build_decoder",
    "build_multimodal",
    "estimate_memory",
    "generate",
    "kv_cache_bytes",
    "llama4_behemoth_guess",
    "llama4_maverick",
    "llama4_scout",
    "llama4_toy",
    "llama4_vision",
    "mixtral_8x7b",
    "olmoe_1b_7b",
    "qwen3_30b_a3b",
    "sample",
    "split_into_tiles",
    "tile_grid",
    "tiny_twin",
    "trace_memory",
]
