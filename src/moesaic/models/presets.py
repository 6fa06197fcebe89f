"""Configurations by name: published Llama 4 text models and other MoEs, and tiny models of their layouts."""

import dataclasses
from typing import Any

from moesaic.layers import AttentionTemperature, Llama3RopeScaling, YarnRopeScaling
from moesaic.models.config import AttentionConfig, DecoderConfig, LayerConfig, MLAConfig, MoEConfig
from moesaic.models.multimodal_config import MultimodalConfig, VisionConfig

__all__ = [
    "deepseek_v3",
    "gpt_oss_20b",
    "gpt_oss_120b",
    "llama4_behemoth_guess",
    "llama4_maverick",
    "llama4_scout",
    "llama4_toy",
    "llama4_vision",
    "mixtral_8x7b",
    "muse_spark",
    "olmoe_1b_7b",
    "qwen3_30b_a3b",
    "small",
    "tiny_twin",
]


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


def llama4_vision(text: DecoderConfig) -> MultimodalConfig:
    """Scout or Maverick with their vision encoder of 0.87B parameters, the same in both, and its projector.

    Whole, Scout has 108.64B parameters and Maverick 401.58B.
    """
    vision = VisionConfig(
        image_size=336,
        patch_size=14,
        dim=1408,
        num_layers=34,
        num_heads=16,
        hidden_dim=5632,
        output_dim=4096,
    )
    return MultimodalConfig(text, vision, image_token=200092)


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


def mixtral_8x7b() -> DecoderConfig:
    """Mixtral 8x7B: 46.70B parameters, 12.88B active; embedding and head, 0.13B each, count in both."""
    return _softmax_moe(
        vocab_size=32000,
        dim=4096,
        num_layers=32,
        attention=AttentionConfig(num_heads=32, num_kv_heads=8, head_dim=128, rope_theta=1e6, qk_norm=False),
        hidden_dim=14336,
        moe={"num_experts": 8, "hidden_dim": 14336, "top_k": 2, "normalize_scores": True},
    )


def qwen3_30b_a3b() -> DecoderConfig:
    """Qwen3-30B-A3B: 30.53B parameters, 3.35B active; embedding and head, 0.31B each, count in both."""
    return _softmax_moe(
        vocab_size=151936,
        dim=2048,
        num_layers=48,
        attention=AttentionConfig(num_heads=32, num_kv_heads=4, head_dim=128, rope_theta=1e6, qk_norm="per_head"),
        hidden_dim=6144,
        moe={"num_experts": 128, "hidden_dim": 768, "top_k": 8, "normalize_scores": True},
        norm_eps=1e-6,
    )


def olmoe_1b_7b() -> DecoderConfig:
    """OLMoE-1B-7B: 6.92B parameters, 1.28B active; embedding and head, 0.10B each, count in both."""
    return _softmax_moe(
        vocab_size=50304,
        dim=2048,
        num_layers=16,
        attention=AttentionConfig(
            num_heads=16, num_kv_heads=16, head_dim=128, rope_theta=10000.0, qk_norm="full_width"
        ),
        hidden_dim=1024,
        moe={"num_experts": 64, "hidden_dim": 1024, "top_k": 8},
        padding_token=1,
    )


def deepseek_v3() -> DecoderConfig:
    """DeepSeek-V3: 671.03B parameters, 37.55B active; embedding and head, 0.93B each, count in both.

    Published are 671B and 37B: without the embedding 36.63B are active. The 14B of the files' layer for multi-token
    prediction are in none of these.
    """
    return DecoderConfig(
        vocab_size=129280,
        dim=7168,
        num_layers=61,
        attention=AttentionConfig(
            num_heads=128,
            rope_theta=10000.0,
            rope_scaling=YarnRopeScaling(
                factor=40.0,
                original_length=4096,
                beta_fast=32.0,
                beta_slow=1.0,
                truncate=True,
                attention_factor=1.0,
            ),
            qk_norm=False,
            mla=MLAConfig(
                kv_lora_rank=512,
                qk_nope_head_dim=128,
                qk_rope_head_dim=64,
                v_head_dim=128,
                q_lora_rank=1536,
                mscale_all_dim=1.0,
            ),
        ),
        hidden_dim=18432,
        moe=MoEConfig(
            num_experts=256,
            hidden_dim=2048,
            top_k=8,
            shared_hidden_dim=2048,
            router={"type": "group_limited", "num_groups": 8, "top_groups": 4, "scale": 2.5},
            normalize_scores=True,
            score_before_experts=False,
            expert_bias=True,
        ),
        interleave_moe_layer_step=1,
        first_dense_layers=3,
        nope_layer_interval=0,
        norm_eps=1e-6,
    )


def gpt_oss_120b() -> DecoderConfig:
    """gpt-oss-120b: 116.83B parameters, 5.71B active; embedding and head, 0.58B each, count in both.

    Its model card (arXiv 2508.10925) says 116.83B and 5.13B: that counts the head as active, and the embedding not.
    """
    return DecoderConfig(
        vocab_size=201088,
        dim=2880,
        num_layers=36,
        attention=AttentionConfig(
            num_heads=64,
            num_kv_heads=8,
            head_dim=64,
            rope_theta=150000.0,
            rope_scaling=YarnRopeScaling(
                factor=32.0, original_length=4096, beta_fast=32.0, beta_slow=1.0, truncate=False
            ),
            qk_norm=False,
            bias=True,
            window=128,
            sinks=True,
        ),
        hidden_dim=2880,
        moe=MoEConfig(
            num_experts=128,
            hidden_dim=2880,
            top_k=4,
            shared_hidden_dim=0,
            router={"type": "top_k", "bias": True},
            score_function="softmax",
            normalize_scores=True,
            score_before_experts=False,
            experts="clamped_swiglu",
        ),
        pattern=(LayerConfig("windowed_rope", "moe"), LayerConfig("rope", "moe")),
        padding_token=199999,
    )


def gpt_oss_20b() -> DecoderConfig:
    """gpt-oss-20b: 20.91B parameters, 4.19B active; embedding and head, 0.58B each, count in both.

    Its model card (arXiv 2508.10925) says 20.91B and 3.61B: that counts the head as active, and the embedding not.
    """
    larger = gpt_oss_120b()
    assert larger.moe is not None
    return dataclasses.replace(larger, num_layers=24, moe=dataclasses.replace(larger.moe, num_experts=32))


def muse_spark() -> DecoderConfig:
    """Muse Spark Open's text model, as far as it is here: 815.83B parameters, 41.93B active.

    Embedding and head, 1.66B each, count in both. The MoE layers are whole. Missing are the sigmoid gates of attention
    (4.16B), norms on heads, the scale of queries, norms behind sublayers, gated residuals, the norm of the embedding
    and the cap of logits. Published are 816B and 42B, and not what they count. The whole text model of transformers has
    816.68B and 42.78B without embedding and head, and 819.99B and 46.09B with both.
    """
    return DecoderConfig(
        vocab_size=202048,
        dim=8192,
        num_layers=62,
        attention=AttentionConfig(num_heads=128, num_kv_heads=16, head_dim=64, rope_theta=500000.0, window=2048),
        hidden_dim=16384,
        moe=MoEConfig(
            num_experts=256,
            hidden_dim=4096,
            top_k=8,
            shared_hidden_dim=0,
            router={"type": "top_k", "logit_scale": 0.1767766952966369},
            normalize_scores=True,
            score_before_experts=False,
            expert_bias=True,
            experts="normed_swiglu",
            experts_norm_eps=1e-8,
            latent_dim=4096,
            latent_norm=True,
        ),
        # full attention without positions in every 4th layer, counted from the last of 62
        pattern=tuple(
            LayerConfig(mixer, "moe") for mixer in ("windowed_rope", "nope", "windowed_rope", "windowed_rope")
        ),
    )


def _softmax_moe(*, moe: dict[str, Any], **sizes: Any) -> DecoderConfig:
    """A model of MoE layers alone, which scale the output of the experts that a softmax chose."""
    moe |= {"shared_hidden_dim": 0, "score_function": "softmax", "score_before_experts": False}
    return DecoderConfig(moe=MoEConfig(**moe), interleave_moe_layer_step=1, nope_layer_interval=0, **sizes)


def tiny_twin(preset: DecoderConfig, vocab_size: int = 512) -> DecoderConfig:
    """A published model's layout at toy size: its norms, routing and ties, with 4 layers of 8 experts.

    The number of key-value heads keeps its ratio to that of queries, 1:1 or grouped. Of dense first layers one is left,
    and of DeepSeek-V3's 8 groups 4. A latent width is half of the model's, and Muse Spark's factor on the logits of
    routers is that of its own width.
    """
    assert preset.moe is not None
    if preset.attention.mla is not None:
        return _tiny_deepseek(preset, preset.attention.mla, preset.moe, vocab_size)
    grouped = preset.num_kv_heads < preset.attention.num_heads
    attention = dataclasses.replace(
        preset.attention, num_heads=4, num_kv_heads=2 if grouped else 4, head_dim=8, rope_theta=10000.0
    )
    if attention.window is not None:  # and small enough to be crossed
        attention = dataclasses.replace(attention, window=8)
    moe = dataclasses.replace(preset.moe, num_experts=8, hidden_dim=16, top_k=2)
    if moe.latent_dim is not None:
        moe = dataclasses.replace(moe, latent_dim=16)
    if isinstance(moe.router, dict) and "logit_scale" in moe.router:
        moe = dataclasses.replace(moe, router={**moe.router, "logit_scale": (32 / 256) ** -0.5})
    pad = preset.padding_token
    return dataclasses.replace(
        preset,
        attention=attention,
        moe=moe,
        vocab_size=vocab_size,
        dim=32,
        num_layers=4,
        hidden_dim=64,
        padding_token=None if pad is None else min(pad, vocab_size - 1),
    )


def _tiny_deepseek(preset: DecoderConfig, mla: MLAConfig, moe: MoEConfig, vocab_size: int) -> DecoderConfig:
    mla = dataclasses.replace(
        mla, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, q_lora_rank=12
    )
    router = {"type": "group_limited", "num_groups": 4, "top_groups": 2, "scale": 2.5}
    return dataclasses.replace(
        preset,
        attention=dataclasses.replace(preset.attention, num_heads=4, mla=mla),
        moe=dataclasses.replace(moe, num_experts=8, hidden_dim=16, shared_hidden_dim=16, top_k=2, router=router),
        vocab_size=vocab_size,
        dim=32,
        num_layers=4,
        hidden_dim=64,
        first_dense_layers=1,
    )
