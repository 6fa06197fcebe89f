import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from moesaic.errors import InputError
from moesaic.layers import AttentionCache, MoE
from moesaic.layers.attention import visible_keys
from moesaic.models import (
    DecoderConfig,
    LayerConfig,
    MLAConfig,
    MoEConfig,
    account,
    build_decoder,
    deepseek_v3,
    gpt_oss_20b,
    gpt_oss_120b,
    kv_cache_bytes,
    llama4_behemoth_guess,
    llama4_maverick,
    llama4_scout,
    llama4_toy,
    mixtral_8x7b,
    olmoe_1b_7b,
    qwen3_30b_a3b,
    tiny_twin,
)


def toy(attention: dict[str, Any] | None = None, moe: dict[str, Any] | None = None, **changes: Any) -> DecoderConfig:
    base = llama4_toy(vocab_size=50)
    assert base.moe is not None
    return dataclasses.replace(
        base,
        attention=dataclasses.replace(base.attention, **(attention or {})),
        moe=dataclasses.replace(base.moe, **{"backend": "loop", **(moe or {})}),
        **changes,
    )


def pattern(*layers: tuple[Any, Any]) -> dict[str, Any]:
    entries = tuple(LayerConfig(mixer, ffn) for mixer, ffn in layers)
    return {"pattern": entries, "interleave_moe_layer_step": None, "nope_layer_interval": None}


WITH_MLA = {"num_kv_heads": None, "head_dim": None, "qk_norm": False} | dict.fromkeys(
    ("attention_chunk_size", "temperature")
)


def on_loop(config: DecoderConfig) -> DecoderConfig:
    assert config.moe is not None
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, backend="loop"))


OWN_MIXER = {"type": "custom_samples.RunningMean"}
OWN_FFN = {"type": "custom_samples.TwoMatrices", "hidden_dim": 24}
OWN_ROUTER = {"type": "custom_samples.LinearRouter"}

CONFIGS = {
    "alternating": toy(),
    "MoE everywhere": toy(interleave_moe_layer_step=1),
    "dense only": toy(interleave_moe_layer_step=0),
    "top 3": toy(moe={"top_k": 3}),
    "QK norm per head": toy({"qk_norm": "per_head", "bias": True}),
    "QK norm over the full width": toy({"qk_norm": "full_width", "clip_qkv": 2.0}),
    "tiny Mixtral": tiny_twin(mixtral_8x7b()),
    "tiny Qwen3": tiny_twin(qwen3_30b_a3b()),
    "tiny OLMoE": tiny_twin(olmoe_1b_7b()),
    "tiny DeepSeek-V3": tiny_twin(deepseek_v3()),
    "latent attention, biases, no latent of the queries": toy(
        {"mla": MLAConfig(7, 5, 4, 6), "bias": True, **WITH_MLA}, nope_layer_interval=0, first_dense_layers=2
    ),
    "tiny gpt-oss": on_loop(tiny_twin(gpt_oss_20b())),
    "sinks and a window in every third layer": toy(
        {"sinks": True, "window": 5, "attention_chunk_size": None},
        **pattern(("windowed_rope", "dense"), ("rope", "moe"), ("nope", "moe")),
    ),
    "every expert": toy(moe={"top_k": 4}),
    "no shared expert": toy(moe={"shared_hidden_dim": 0}),
    "wide shared expert": toy(moe={"shared_hidden_dim": 48}),
    "expert bias": toy(moe={"expert_bias": True}),
    "uniform router": toy(moe={"router": "uniform"}),
    "FFN that asks for whole sequences": toy(**pattern(("rope", OWN_MIXER), ("nope", "dense"))),
    "tied": toy(tie_embeddings=True),
    "biases": toy({"bias": True}),
    "convolution": toy({"conv_width": 3}),
    "one kv head": toy({"num_kv_heads": 1}),
    "as many kv heads as heads": toy({"num_kv_heads": None}),
    "head_dim is not dim / heads": toy({"head_dim": 6}),
    "dense twin": toy(dense_twin=True, moe={"top_k": 2}),
    "every mixer": toy(
        **pattern(("chunked_rope", "dense"), ("rope", "moe"), ("nope", "dense_twin"), ("chunked_nope", "moe"))
    ),
    "custom modules": toy(moe={"router": OWN_ROUTER}, **pattern((OWN_MIXER, "moe"), ("chunked_rope", OWN_FFN))),
}


def active(module: torch.nn.Module) -> int:
    """Parameters but those of the experts that one token does not meet."""
    total = sum(p.numel() for p in module.parameters())
    for part in module.modules():
        if isinstance(part, MoE):
            one = sum(p.numel() for p in part.experts.parameters()) // part.experts.num_experts  # type: ignore[operator]
            total -= (part.experts.num_experts - part.router.top_k) * one  # type: ignore[operator]
    return total


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_equal_those_of_the_built_model(name: str) -> None:
    config = CONFIGS[name]
    found, decoder = account(config, 16), build_decoder(config, device="meta")
    for i, (layer, block) in enumerate(zip(found.layers, decoder.layers, strict=True)):
        assert layer.parameters == sum(p.numel() for p in block.parameters()), f"layer {i}"
        assert layer.active_parameters == active(block), f"layer {i}"
    assert found.parameters == sum(p.numel() for p in decoder.parameters())
    assert found.active_parameters == active(decoder)
    assert found.weight_bytes() == 4 * found.parameters
    assert found.weight_bytes(torch.bfloat16) == 2 * found.parameters


@pytest.mark.slow_but_for("olmoe")
@pytest.mark.parametrize(
    ("config", "total", "active_total"),
    [
        (llama4_scout(), 107.77, 17.17),
        (llama4_maverick(), 400.71, 17.18),
        (mixtral_8x7b(), 46.70, 12.88),  # published: 46.7 and 12.9
        (qwen3_30b_a3b(), 30.53, 3.35),  # published: 30.5 and 3.3
        (olmoe_1b_7b(), 6.92, 1.28),  # published: 6.9 and 1.3
        (deepseek_v3(), 671.03, 37.55),  # published: 671 and 37, as without the 0.93 of the embedding
        (gpt_oss_20b(), 20.91, 4.19),  # published: 20.91 and 3.61, without the 0.58 of the embedding
        (gpt_oss_120b(), 116.83, 5.71),  # published: 116.83 and 5.13, likewise
    ],
    ids=["scout", "maverick", "mixtral", "qwen3", "olmoe", "deepseek_v3", "gpt-oss 20b", "gpt-oss 120b"],
)
def test_published_models(config: DecoderConfig, total: float, active_total: float) -> None:
    found = account(config, 8192)
    assert round(found.parameters / 1e9, 2) == total
    assert round(found.active_parameters / 1e9, 2) == active_total
    decoder = build_decoder(config, device="meta")
    assert found.parameters == sum(p.numel() for p in decoder.parameters())
    assert found.active_parameters == active(decoder)
    routers = sum(p.numel() for name, p in decoder.named_parameters() if name.endswith("router.weight"))
    if 17 < active_total < 18:  # both Llama 4 models' "17B" without the routers
        assert round((found.active_parameters - routers) / 1e9, 2) == 17.17


@pytest.mark.parametrize(("config", "published"), [(gpt_oss_20b(), 3.61), (gpt_oss_120b(), 5.13)])
def test_gpt_oss_has_the_published_active_parameters_without_its_embedding(
    config: DecoderConfig, published: float
) -> None:
    embedding = config.vocab_size * config.dim
    assert round((account(config, 8192).active_parameters - embedding) / 1e9, 2) == published


@pytest.mark.slow
def test_the_guess_at_behemoth_meets_the_three_published_numbers() -> None:
    config = llama4_behemoth_guess()
    found = account(config, 8192)
    assert round(found.active_parameters / 1e9) == 288
    assert 1.95e12 < found.parameters < 2e12  # "nearly two trillion"
    assert config.moe is not None and config.moe.num_experts == 16
    assert found.parameters == sum(p.numel() for p in build_decoder(config, device="meta").parameters())


@pytest.mark.slow_but_for("no shared expert", "as many kv heads as heads", "dense twin", "QK norm per head")
@pytest.mark.parametrize("name", CONFIGS)
def test_matmul_flops_equal_the_flop_counter(name: str) -> None:
    """On the loop backend: torch's counter knows nothing of grouped_mm. CPU attention counts as zero there."""
    config, tokens = CONFIGS[name], torch.randint(50, (2, 12))
    decoder = build_decoder(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decoder(tokens)
    assert not any("attention" in str(op) for op in counter.get_flop_counts()["Global"])
    assert counter.get_total_flops() == account(config, 12).matmul_flops * tokens.numel()


def brute_force_keys(length: int, chunk: int | None) -> int:
    return sum(chunk is None or i // chunk == j // chunk for i in range(length) for j in range(i + 1))


@given(length=st.integers(1, 40), chunk=st.none() | st.integers(1, 45))
def test_visible_keys_equal_brute_force(length: int, chunk: int | None) -> None:
    assert visible_keys(length, chunk) * length == pytest.approx(brute_force_keys(length, chunk), rel=1e-12)


@pytest.mark.parametrize("seq_len", [1, 7, 8, 21])
def test_attention_flops(seq_len: int) -> None:
    """A multiply-add per channel of every query head, once for q k and once for p v."""
    config = CONFIGS["every mixer"]
    chunks = [8, None, None, 8]
    per_key = 2 * 2 * 4 * 8
    found = account(config, seq_len)
    for layer, chunk in zip(found.layers, chunks, strict=True):
        assert layer.attention_flops * seq_len == pytest.approx(per_key * brute_force_keys(seq_len, chunk))
    assert found.attention_flops == pytest.approx(sum(layer.attention_flops for layer in found.layers))
    assert found.forward_flops == found.matmul_flops + found.attention_flops
    assert found.training_flops == 3 * found.forward_flops


@pytest.mark.parametrize(
    "moe", [{"top_k": 1}, {"top_k": 2, "shared_hidden_dim": 0}, {"top_k": 3, "shared_hidden_dim": 8}]
)
def test_the_dense_twin_has_equal_active_flops_up_to_the_router(moe: dict[str, Any]) -> None:
    config = toy(moe=moe)
    sparse, twin = account(config, 16), account(dataclasses.replace(config, dense_twin=True), 16)
    router = 32 * 4
    assert sparse.matmul_flops - twin.matmul_flops == 2 * 2 * router, "two MoE layers"
    assert sparse.active_parameters - twin.active_parameters == 2 * router
    assert twin.parameters == twin.active_parameters
    assert sparse.attention_flops == twin.attention_flops


@pytest.mark.slow_but_for("every mixer")
@pytest.mark.parametrize("length", [1, 7, 8, 9, 21])
@pytest.mark.parametrize(
    "name", ["alternating", "one kv head", "head_dim is not dim / heads", "every mixer", "tiny gpt-oss"]
)
def test_kv_cache_bytes_equal_the_peak_of_what_decoding_reads(
    name: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIGS[name]
    peak: dict[int, int] = {}
    append = AttentionCache.append

    def recording(self: AttentionCache, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = append(self, k, v)
        peak[id(self)] = max(peak.get(id(self), 0), keys.nbytes + values.nbytes)
        return keys, values

    monkeypatch.setattr(AttentionCache, "append", recording)
    decoder = build_decoder(config)
    cache = decoder.make_cache()
    with torch.no_grad():
        for _ in range(length):
            decoder(torch.zeros(1, 1, dtype=torch.int64), cache)
    assert sum(peak.values()) == kv_cache_bytes(config, length)
    assert kv_cache_bytes(config, length, torch.bfloat16) * 2 == kv_cache_bytes(config, length)


def test_kv_cache_of_scout_is_bounded_on_chunked_layers() -> None:
    one_token = 2 * 8 * 128 * 2  # keys and values, kv heads, head_dim, bf16
    assert kv_cache_bytes(llama4_scout(), 10**6, torch.bfloat16) == one_token * (36 * 8192 + 12 * 10**6)


def test_layers_are_described() -> None:
    moe = MoEConfig(num_experts=4, hidden_dim=32, top_k=2, shared_hidden_dim=0)
    described = [(layer.mixer, layer.ffn) for layer in account(toy(moe=dataclasses.asdict(moe)), 16).layers]
    assert described == [
        ("RoPE, chunks of 8, QK norm", "dense 64"),
        ("RoPE, chunks of 8, QK norm", "MoE 4 x 32, top 2"),
        ("RoPE, chunks of 8, QK norm", "dense 64"),
        ("NoPE, full, temperature 0.1 / 8", "MoE 4 x 32, top 2"),
    ]
    assert [(x.mixer, x.ffn) for x in account(CONFIGS["custom modules"], 16).layers][:2] == [
        ("custom_samples.RunningMean", "MoE 4 x 32, top 1 + shared 32, router custom_samples.LinearRouter"),
        ("RoPE, chunks of 8, QK norm", "custom_samples.TwoMatrices"),
    ]


def test_bytes_equal_those_of_weights_and_of_the_optimizer_after_a_step() -> None:
    config = llama4_toy()
    decoder = build_decoder(config)
    optimizer = torch.optim.AdamW(decoder.parameters())
    decoder(torch.randint(0, 512, (2, 9))).logits.square().mean().backward()
    optimizer.step()
    accounted = account(config, 9)
    assert sum(p.nbytes for p in decoder.parameters()) == accounted.weight_bytes()
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert sum(moment.nbytes for moment in moments) == accounted.optimizer_bytes()
    assert accounted.backward_flops == 2 * accounted.forward_flops


def test_a_router_that_returns_something_else_is_named() -> None:
    with pytest.raises(InputError, match=r"Pair returned 2 values; must be logits, scores and expert_ids"):
        account(toy(moe={"router": {"type": "custom_samples.Pair"}}), 16)
