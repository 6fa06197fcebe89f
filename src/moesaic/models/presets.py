"""Configurations by name: the published Llama 4 text models, and a tiny model of exactly their layout."""

import dataclasses
from typing import Any

from moesaic.layers import AttentionTemperature, Llama3RopeScaling
from moesaic.models.config import AttentionConfig, DecoderConfig, MoEConfig

__all__ = ["llama4_behemoth_guess", "llama4_maverick", "llama4_scout", "llama4_toy", "small"]


def llama4_scout() -> DecoderConfig:
    """Llama 4 Scout 17B-16E (text): 107.77B parameters, 17.17B active.

    RoPE scaling as in Meta's release of 2025-04-08; files in circulation differ, so read yours from its file.
    """
    maverick = llama4_maverick()
    assert maverick.moe is not None
    return dataclasses.replace(
        maverick,
        attention=dataclasses.replace(
            maverick.attention,
            qk_norm=True,
            rope_scaling=Llama3RopeScaling(
                factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_length=8192
            ),
        ),
        moe=dataclasses.replace(maverick.moe, num_experts=16),
        interleave_moe_layer_step=1,
    )


def llama4_maverick() -> DecoderConfig:
    """Llama 4 Maverick 17B-128E (text): 400.71B parameters, 17.18B active (17.17B without its routers)."""
    return DecoderConfig(
        vocab_size=202048,
        dim=5120,
        num_layers=48,
        attention=AttentionConfig(
            num_heads=40,
            num_kv_heads=8,
            head_dim=128,
            rope_theta=500000.0,
            qk_norm=False,
            attention_chunk_size=8192,
            temperature=AttentionTemperature(attn_scale=0.1, floor_scale=8192),
        ),
        hidden_dim=16384,
        moe=MoEConfig(num_experts=128, hidden_dim=8192),
        interleave_moe_layer_step=2,
        nope_layer_interval=4,
    )


def llama4_behemoth_guess() -> DecoderConfig:
    """A shape of ours that meets the three published numbers of Llama 4 Behemoth, and nothing more: a guess.

    Published are 288B active parameters, 16 experts and "nearly two trillion" parameters. This one has 287.6B active of
    1,986B; widths, depth and everything else are made up: Scout's layout, experts 1.5 times as wide as the model.
    """
    scout = llama4_scout()
    assert scout.moe is not None
    return dataclasses.replace(
        scout,
        dim=20480,
        num_layers=60,
        attention=dataclasses.replace(scout.attention, num_heads=160, rope_scaling=None),
        hidden_dim=61440,
        moe=dataclasses.replace(scout.moe, hidden_dim=30720),
    )


def small(vocab_size: int) -> DecoderConfig:
    """The default model of runs: Llama 4's layout at a size for two CPU cores, plus short convolutions."""
    return DecoderConfig(
        vocab_size=vocab_size,
        dim=96,
        num_layers=4,
        attention=AttentionConfig(
            num_heads=4,
            num_kv_heads=2,
            head_dim=24,
            rope_theta=10000.0,
            attention_chunk_size=128,
            temperature=AttentionTemperature(attn_scale=0.4, floor_scale=256),
            conv_width=3,
        ),
        hidden_dim=384,
        moe=MoEConfig(num_experts=8, hidden_dim=192),
        interleave_moe_layer_step=2,
        nope_layer_interval=4,
    )


def llama4_toy(vocab_size: int = 512, **changes: Any) -> DecoderConfig:
    """Maverick's layout at toy size, with chunks and temperature small enough to be crossed; for tests and examples."""
    tiny = DecoderConfig(
        vocab_size=vocab_size,
        dim=32,
        num_layers=4,
        attention=AttentionConfig(
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            attention_chunk_size=8,
            temperature=AttentionTemperature(attn_scale=0.1, floor_scale=8),
        ),
        hidden_dim=64,
        moe=MoEConfig(num_experts=4, hidden_dim=32),
        interleave_moe_layer_step=2,
        nope_layer_interval=4,
    )
    return dataclasses.replace(tiny, **changes)
