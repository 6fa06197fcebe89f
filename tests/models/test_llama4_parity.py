"""The whole decoder against the slow re-implementation of Llama 4 in tests/reference/llama4.py."""

import dataclasses
from typing import Any

import pytest
import torch
from reference import llama4
from reference.comparing import assert_close, assert_gradients, redraw, run_with_gradients

from moesaic.layers import AttentionTemperature, Llama3RopeScaling
from moesaic.models import DecoderConfig, build_decoder, llama4_toy

LENGTH = 11
NO_BAND = Llama3RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_length=16)
# at head_dim 8 and theta 5e5: one pair kept, one interpolated, two slowed down
BAND = Llama3RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=256)


def config(
    *, attention: dict[str, Any] | None = None, moe: dict[str, Any] | None = None, **changes: Any
) -> DecoderConfig:
    """Maverick's layout with chunks of 4 and a temperature floor of 3; `attention` and `moe` are further changes."""
    toy = llama4_toy(vocab_size=37, num_layers=4)
    assert toy.moe is not None
    base = {"attention_chunk_size": 4, "temperature": AttentionTemperature(attn_scale=0.5, floor_scale=3)}
    changed = {
        "dim": 16,
        "hidden_dim": 24,
        "attention": dataclasses.replace(toy.attention, **{**base, **(attention or {})}),
        "moe": dataclasses.replace(toy.moe, **{"hidden_dim": 12, **(moe or {})}),
        **changes,
    }
    return dataclasses.replace(toy, **changed)


SCOUT = {"interleave_moe_layer_step": 1, "nope_layer_interval": 4}
CASES = {
    "maverick": config(attention={"qk_norm": False}),
    "scout, RoPE scaling without band": config(attention={"rope_scaling": NO_BAND}, **SCOUT),
    "scout, RoPE scaling with band": config(attention={"rope_scaling": BAND, "qk_norm": False}, **SCOUT),
    "top 2": config(moe={"top_k": 2}, num_layers=2),
    "every expert": config(moe={"top_k": 4}, num_layers=2),
    "one expert": config(moe={"num_experts": 1}, num_layers=2),
    "one kv head per query head": config(attention={"num_kv_heads": 4}),
    "one kv head": config(attention={"num_kv_heads": 1}),
    "head_dim is not dim / heads": config(attention={"head_dim": 6}),
    "biases": config(attention={"bias": True}),
    "tied head": config(tie_embeddings=True, num_layers=2),
    "chunks of one": config(attention={"attention_chunk_size": 1}),
    "last chunk one token": config(attention={"attention_chunk_size": 5}, num_layers=2),
    "one chunk exactly": config(attention={"attention_chunk_size": LENGTH}, num_layers=2),
    "chunk longer than the text": config(attention={"attention_chunk_size": 64}, num_layers=2),
    "floor at every token": config(attention={"temperature": AttentionTemperature(attn_scale=1.0, floor_scale=1)}),
    "no temperature": config(attention={"temperature": None}),
    "no positions anywhere": config(nope_layer_interval=1, num_layers=2),
    "no positions on odd layers": config(nope_layer_interval=2),
    "positions everywhere": config(nope_layer_interval=0),
    "dense only": config(interleave_moe_layer_step=0, num_layers=2),
    "MoE every third layer": config(interleave_moe_layer_step=3),
    "large epsilon": config(norm_eps=0.3),
}


def settings(config: DecoderConfig) -> llama4.Llama4Settings:
    attention, temperature = config.attention, config.attention.temperature
    scaling = attention.rope_scaling
    assert scaling is None or isinstance(scaling, Llama3RopeScaling)
    assert config.moe is not None and attention.attention_chunk_size is not None
    assert config.interleave_moe_layer_step is not None and config.nope_layer_interval is not None
    return llama4.Llama4Settings(
        num_hidden_layers=config.num_layers,
        num_attention_heads=attention.num_heads,
        num_key_value_heads=attention.num_kv_heads or attention.num_heads,
        head_dim=attention.head_dim or config.dim // attention.num_heads,
        num_experts_per_tok=config.moe.top_k,
        interleave_moe_layer_step=config.interleave_moe_layer_step,
        no_rope_layer_interval=config.nope_layer_interval,
        attention_chunk_size=attention.attention_chunk_size,
        use_qk_norm=attention.qk_norm,
        rope_theta=attention.rope_theta,
        rope_scaling=None
        if scaling is None
        else llama4.RopeScaling(
            scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_length
        ),
        attn_temperature_tuning=temperature is not None,
        attn_scale=0.0 if temperature is None else temperature.attn_scale,
        floor_scale=1 if temperature is None else temperature.floor_scale,
        rms_norm_eps=config.norm_eps,
    )


def compare(config: DecoderConfig, dtype: torch.dtype, tolerance: float, gradient_tolerance: float) -> None:
    decoder = redraw(build_decoder(config, dtype=dtype))
    tokens = torch.randint(config.vocab_size, (2, LENGTH))
    found, found_gradients = run_with_gradients(lambda: decoder(tokens).logits, decoder)
    assert found.std() > 0.5, "logits this small hide mistakes"
    weights = {llama4.transformers_name(name): p for name, p in decoder.named_parameters()}
    expected, expected_gradients = run_with_gradients(lambda: llama4.logits(settings(config), weights, tokens), decoder)
    assert_close(found, expected, tolerance, "logits")
    assert_gradients(found_gradients, expected_gradients, gradient_tolerance)


@pytest.mark.slow_but_for("every expert", "one chunk exactly", "MoE every third layer")
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_in_float64(name: str) -> None:
    compare(CASES[name], torch.float64, 1e-9, 1e-8)


@pytest.mark.slow_but_for("top 2")
@pytest.mark.parametrize(
    "name", ["maverick", "scout, RoPE scaling without band", "top 2", "biases", "head_dim is not dim / heads"]
)
def test_equals_the_reference_in_float32(name: str) -> None:
    """On the backend that `auto` chooses."""
    compare(CASES[name], torch.float32, 1e-5, 1e-4)


def test_the_band_case_has_all_three_kinds_of_pairs() -> None:
    plain = 500000.0 ** -(torch.arange(0, 8, 2) / 8)
    ratio = BAND.apply(plain, 500000.0) / plain
    assert ratio[0] == 1 and 1 / 8 < ratio[1] < 1
    torch.testing.assert_close(ratio[2:], torch.full((2,), 1 / 8))
