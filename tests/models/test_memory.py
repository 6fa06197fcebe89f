"""Memory by formula and by tracing, against the peak that the profiler sees in a real step."""

import dataclasses
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.errors import InputError
from moesaic.layers import AttentionCache, AttentionTemperature, parameter_kinds
from moesaic.layers.sliced import make_tiles, tiles_of
from moesaic.losses import linear_cross_entropy
from moesaic.models import (
    AttentionConfig,
    Decoder,
    DecoderConfig,
    LayerConfig,
    MLAConfig,
    MoEConfig,
    account,
    build_decoder,
    kv_cache_bytes,
    llama4_behemoth_guess,
    llama4_maverick,
    llama4_scout,
)
from moesaic.models.memory import LiveBytes, MemoryEstimate, estimate_memory, trace_memory
from moesaic.models.shapes import decoder_shapes, num_parameters
from moesaic.training.config import OptimizerConfig
from moesaic.training.optimizers import build_optimizer
from moesaic.training.summary import activation_bytes

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import peak_memory

CPU = torch.device("cpu")
VOCABULARY, BATCH, LENGTH = 1024, 2, 320


def small(attention: dict[str, Any] | None = None, moe: dict[str, Any] | None = None, **changes: Any) -> DecoderConfig:
    """Large enough that what a kernel takes within itself hardly counts; routing is even, as the estimates assume."""
    base = DecoderConfig(
        vocab_size=VOCABULARY,
        dim=96,
        num_layers=2,
        attention=AttentionConfig(
            num_heads=4,
            num_kv_heads=2,
            head_dim=24,
            attention_chunk_size=64,
            temperature=AttentionTemperature(0.1, 128),
        ),
        hidden_dim=256,
        moe=MoEConfig(num_experts=8, hidden_dim=128, router="uniform"),
        interleave_moe_layer_step=2,
        nope_layer_interval=2,
    )
    assert base.moe is not None
    return dataclasses.replace(
        base,
        attention=dataclasses.replace(base.attention, **(attention or {})),
        moe=dataclasses.replace(base.moe, **(moe or {})),
        **changes,
    )


WITH_MLA: dict[str, Any] = {"num_kv_heads": None, "head_dim": None, "qk_norm": False, "attention_chunk_size": None}
WITH_MLA["temperature"] = None
CONFIGS = {
    "alternating": small(num_layers=4, nope_layer_interval=4),
    "dense": small(interleave_moe_layer_step=0),
    "MoE everywhere": small(interleave_moe_layer_step=1),
    "full attention": small({"attention_chunk_size": None, "qk_norm": False, "temperature": None}),
    "an unfinished chunk": small({"attention_chunk_size": 200}, nope_layer_interval=0),
    "convolution": small({"conv_width": 3, "bias": True}),
    "QK norm per head": small({"qk_norm": "per_head"}),
    "QK norm over the full width, clipped": small({"qk_norm": "full_width", "clip_qkv": 2.0}),
    "top 2, scores after": small({}, {"top_k": 2, "score_before_experts": False, "score_function": "softmax"}),
    "no shared expert, many": small({}, {"num_experts": 40, "shared_hidden_dim": 0}, interleave_moe_layer_step=1),
    "latent attention": small(
        {"mla": MLAConfig(48, 16, 8, 20, q_lora_rank=64), **WITH_MLA},
        nope_layer_interval=0,
        interleave_moe_layer_step=1,
        first_dense_layers=1,
    ),
    "recomputed": small({}, {"backend": "sliced_recompute"}, activation="gelu"),
    "windows and sinks, clamped": small(
        {"attention_chunk_size": None, "qk_norm": False, "window": 64, "sinks": True},
        {"top_k": 2, "score_before_experts": False, "experts": "clamped_swiglu", "shared_hidden_dim": 0},
        pattern=(LayerConfig("windowed_rope", "moe"), LayerConfig("rope", "moe")),
        interleave_moe_layer_step=None,
        nope_layer_interval=None,
    ),
    "experts in a latent width, normed": small(
        {},
        {
            "top_k": 4,
            "num_experts": 8,
            "normalize_scores": True,
            "score_before_experts": False,
            "shared_hidden_dim": 0,
            "latent_dim": 48,
            "latent_norm": True,
            "experts": "normed_swiglu",
        },
        interleave_moe_layer_step=1,
    ),
    "windows without sinks": small(
        {"attention_chunk_size": None, "window": 200},
        pattern=(LayerConfig("windowed_rope", "dense"),),
        interleave_moe_layer_step=None,
        nope_layer_interval=None,
    ),
    "loop": small({}, {"backend": "loop"}, activation="relu"),
    "large vocabulary, tied": small(vocab_size=20000, tie_embeddings=True),
    "weights outweigh activations": small(dim=320, interleave_moe_layer_step=1),
}
"""Without checkpoints most peak in the loss, with them in the last block."""


def measured_step(config: DecoderConfig, dtype: torch.dtype, checkpoint: bool, length: int = LENGTH) -> int:
    decoder = build_decoder(config, checkpoint_activations=checkpoint, dtype=dtype)
    tokens = torch.randint(config.vocab_size, (BATCH, length))

    def loss() -> torch.Tensor:
        hidden, _ = decoder.hidden_states(tokens)
        return linear_cross_entropy(hidden.flatten(0, 1), decoder.head.weight, tokens.flatten())

    loss().backward()  # the first time takes what later ones find
    decoder.zero_grad()
    return peak_memory(lambda: loss().backward(), CPU)


def estimates(config: DecoderConfig, dtype: torch.dtype, checkpoint: bool = False) -> tuple[MemoryEstimate, ...]:
    sizes: dict[str, Any] = {"batch_size": BATCH, "seq_len": LENGTH, "dtype": dtype}
    sizes["checkpoint_activations"] = checkpoint
    return estimate_memory(config, **sizes), trace_memory(config, **sizes)


@pytest.mark.slow_but_for("dense-dtype1")
@pytest.mark.parametrize(
    ("name", "dtype", "checkpoint"),
    [
        *[(name, torch.float32, False) for name in CONFIGS],
        *[(name, torch.bfloat16, True) for name in ("alternating", "MoE everywhere", "recomputed")],
        ("large vocabulary, tied", torch.float32, True),
        ("alternating", torch.bfloat16, False),
    ],
)
def test_both_are_within_5_percent_of_a_real_step(name: str, dtype: torch.dtype, checkpoint: bool) -> None:
    config = CONFIGS[name]
    measured = measured_step(config, dtype, checkpoint)
    formula, traced = estimates(config, dtype, checkpoint)
    assert formula.step == pytest.approx(measured, rel=0.05)
    assert traced.step == pytest.approx(measured, rel=0.05)
    assert formula.activations == pytest.approx(traced.activations, rel=0.01)
    assert formula.loss == pytest.approx(traced.loss, rel=0.02)
    assert (formula.weights, formula.gradients) == (traced.weights, traced.gradients)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("alternating", torch.float32), ("recomputed", torch.bfloat16), ("MoE everywhere", torch.bfloat16)],
)
@pytest.mark.slow
def test_a_lean_shared_expert_is_counted(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    before = estimates(CONFIGS[name], dtype)[0]
    monkeypatch.setattr("moesaic.layers.feed_forward.LEAN_ELEMENTS", 0)
    test_both_are_within_5_percent_of_a_real_step(name, dtype, False)
    is_lean = dtype == torch.float32 or name == "recomputed"
    assert (estimates(CONFIGS[name], dtype)[0].activations < before.activations) == is_lean


@pytest.mark.slow
def test_few_tokens_peak_where_all_gradients_are_there() -> None:
    config, length = small(vocab_size=4000, interleave_moe_layer_step=1), 32
    formula = estimate_memory(config, batch_size=BATCH, seq_len=length)
    assert formula.gradients < formula.step < 1.02 * formula.gradients
    measured = measured_step(config, torch.float32, False, length)
    assert formula.step == pytest.approx(measured, rel=0.05)
    assert trace_memory(config, batch_size=BATCH, seq_len=length).step == pytest.approx(measured, rel=0.05)


def test_checkpointing_and_dtype_matter() -> None:
    """So that 5% above is not within reach of a constant."""
    config = CONFIGS["alternating"]
    sizes = {"batch_size": BATCH, "seq_len": LENGTH}
    step = estimate_memory(config, **sizes).step
    assert estimate_memory(config, **sizes, checkpoint_activations=True).step < 0.6 * step
    assert estimate_memory(config, **sizes, dtype=torch.bfloat16).step < 0.8 * step


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "name", "dtype"),
    [
        ("large vocabulary, tied", "adamw", torch.float32),
        ("large vocabulary, tied", "muon", torch.bfloat16),
        ("convolution", "adamw", torch.bfloat16),
        ("convolution", "muon", torch.float32),
    ],
)
def test_optimizer_against_the_real_one(config: str, name: str, dtype: torch.dtype) -> None:
    chosen = OptimizerConfig(name=name)  # type: ignore[arg-type]

    def make(decoder: Decoder) -> torch.optim.Optimizer:
        return build_optimizer(decoder, chosen)

    decoder = build_decoder(CONFIGS[config], dtype=dtype)
    optimizer = make(decoder)

    def step_with_gradients() -> None:  # together, because the profiler sees only that memory freed that it saw taken
        for parameter in decoder.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    step_with_gradients()
    decoder.zero_grad()
    state = sum(x.nbytes for of_one in optimizer.state.values() for x in of_one.values())
    step = peak_memory(step_with_gradients, CPU)
    sizes: dict[str, Any] = {"batch_size": BATCH, "seq_len": LENGTH, "dtype": dtype}
    formula = estimate_memory(CONFIGS[config], **sizes, optimizer=name)
    traced = trace_memory(CONFIGS[config], **sizes, make_optimizer=make)
    assert formula.optimizer == traced.optimizer == state
    assert formula.optimizer_step == pytest.approx(step, rel=0.05)
    assert traced.optimizer_step == pytest.approx(step, rel=0.05)
    assert formula.total == formula.weights + state + max(formula.step, formula.optimizer_step)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 65])
@pytest.mark.parametrize("name", ["alternating", "latent attention"])
def test_kv_cache_against_a_real_one(name: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS[name]
    most: dict[int, int] = {}
    append = AttentionCache.append

    def recording(self: AttentionCache, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = append(self, k, v)
        most[id(self)] = max(most.get(id(self), 0), keys.nbytes + values.nbytes)
        return keys, values

    decoder = build_decoder(config)
    cache = decoder.make_cache()
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(AttentionCache, "append", recording)
        for _ in range(length):
            decoder(torch.zeros(3, 1, dtype=torch.int64), cache)
    sizes = {"batch_size": 3, "seq_len": length}
    formula, traced = estimate_memory(config, **sizes), trace_memory(config, **sizes)
    assert formula.kv_cache == traced.kv_cache == sum(most.values()) == 3 * kv_cache_bytes(config, length)
    assert formula.decoding == formula.weights + formula.kv_cache


@pytest.mark.parametrize("preset", [llama4_scout, llama4_maverick, llama4_behemoth_guess])
def test_presets(preset: Any) -> None:
    config, counted = preset(), account(preset(), 8192)
    sizes: dict[str, Any] = {"batch_size": 1, "seq_len": 8192, "dtype": torch.bfloat16, "checkpoint_activations": True}
    found = estimate_memory(config, **sizes)
    assert found.weights == found.gradients == 2 * counted.parameters
    assert found.optimizer == pytest.approx(4 * counted.parameters)
    # a block's input for each layer; the final norm's input in fp32, its output, and that with the gain
    assert found.activations == pytest.approx(8192 * config.dim * (2 * config.num_layers + 4 + 2 + 2), rel=1e-4)
    assert found.step > found.gradients
    assert found.kv_cache == kv_cache_bytes(config, 8192, torch.bfloat16)


@pytest.mark.slow
def test_a_model_that_fits_nowhere_is_traced() -> None:
    """Two layers of Scout, for the time."""
    config = dataclasses.replace(llama4_scout(), num_layers=2, nope_layer_interval=2, vocab_size=20000)
    sizes: dict[str, Any] = {"batch_size": 1, "seq_len": 8192, "dtype": torch.bfloat16}
    traced, formula = [], estimate_memory(config, **sizes, optimizer=None)
    held = peak_memory(lambda: traced.append(trace_memory(config, **sizes)), CPU)
    assert traced[0].weights == 2 * account(config, 8192).parameters > 8e9
    assert held < 10e6
    for field in dataclasses.fields(MemoryEstimate):
        assert getattr(formula, field.name) == pytest.approx(getattr(traced[0], field.name), rel=0.01), field.name


@pytest.mark.slow
def test_custom_modules_are_traced_and_left_out_of_the_formula() -> None:
    entries = (
        LayerConfig({"type": "custom_samples.RunningMean"}, "moe"),
        LayerConfig("chunked_rope", {"type": "custom_samples.TwoMatrices", "hidden_dim": 300}),
    )
    pattern = {"pattern": entries, "interleave_moe_layer_step": None, "nope_layer_interval": None}
    config = small(**pattern)
    measured = measured_step(config, torch.float32, False)
    assert trace_memory(config, batch_size=BATCH, seq_len=LENGTH).step == pytest.approx(measured, rel=0.05)
    formula = estimate_memory(config, batch_size=BATCH, seq_len=LENGTH)
    assert formula.uncounted == ("custom_samples.RunningMean", "custom_samples.TwoMatrices")
    built = build_decoder(config)
    ours = [
        p.numel() for name, p in built.named_parameters() if not name.startswith(("layers.0.mixer.", "layers.1.ffn."))
    ]
    assert formula.weights == 4 * sum(ours), "the rest is counted"


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_are_those_of_the_built_model(name: str) -> None:
    decoder = build_decoder(CONFIGS[name], device="meta")
    kinds = parameter_kinds(decoder)
    built = [(tuple(parameter.shape), kinds[path]) for path, parameter in decoder.named_parameters()]
    assert sorted(built) == sorted((shape.sizes, shape.kind) for shape in decoder_shapes(CONFIGS[name]))
    assert num_parameters(CONFIGS[name]) == account(CONFIGS[name], 8).parameters


@pytest.mark.parametrize("multiple", [1, 16])
def test_tiles_are_counted_without_making_them(multiple: int) -> None:
    draw = random.Random(multiple)
    for _ in range(300):
        counts = [draw.choice([0, 1, 15, 511, 512, 513, draw.randrange(3000)]) for _ in range(draw.randrange(1, 9))]
        sizes = [tile.size for tile in make_tiles(counts, multiple)]
        assert tiles_of(counts, multiple) == (sum(sizes), max(sizes, default=0)), counts


def test_any_size_is_answered() -> None:
    found = estimate_memory(llama4_scout(), batch_size=10**12, seq_len=10**15, dtype=torch.bfloat16)
    assert found.total > 10**30
    with pytest.raises(InputError, match=r"seq_len=1000000000000000: .* at most 16777216 tokens"):
        trace_memory(small(), batch_size=1, seq_len=10**15)


@pytest.mark.parametrize("function", [estimate_memory, trace_memory])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: must be a number >= 1"),
        ({"seq_len": -1}, "seq_len=-1: must be a number >= 1"),
        ({"dtype": torch.int64}, "dtype=torch.int64: must be a floating-point type"),
    ],
)
def test_impossible_sizes(function: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        function(small(), **{"batch_size": 1, "seq_len": 8, **changes})


def test_what_cannot_be_estimated_is_refused() -> None:
    with pytest.raises(InputError, match="optimizer='sgd': must be one of adamw, muon, None"):
        estimate_memory(small(), batch_size=1, seq_len=8, optimizer="sgd")
    with pytest.raises(InputError, match=r"backend='grouped', dtype=torch\.float32: .* in bfloat16 only"):
        trace_memory(small({}, {"backend": "grouped"}), batch_size=1, seq_len=8)


def test_live_bytes_counts_storages_once_and_until_they_are_gone() -> None:
    outside = torch.zeros(1000)
    with LiveBytes([outside]) as live:
        a = torch.zeros(1000, dtype=torch.float64)
        view = a[:10].view(2, 5)
        assert live.current == 8000
        del a
        assert live.current == 8000, "the view needs it"
        b = outside + 1
        outside.add_(1)
        assert live.current == 12000
        del view, b
        assert (live.current, live.peak) == (0, 12000)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_run_summary_shows_the_same_activations(checkpoint: bool) -> None:
    decoder = build_decoder(CONFIGS["alternating"], checkpoint_activations=checkpoint)
    formula = estimate_memory(
        CONFIGS["alternating"], batch_size=BATCH, seq_len=LENGTH, checkpoint_activations=checkpoint
    )
    assert activation_bytes(decoder, BATCH, LENGTH) == pytest.approx(formula.activations, rel=0.02)
