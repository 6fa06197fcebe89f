import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from reference import attention as reference
from reference.comparing import OutputSizes, assert_close, assert_gradients, redraw, run_with_gradients
from torch import Tensor

from moesaic.layers import (
    Attention,
    AttentionTemperature,
    RotaryEmbedding,
    ShortConvolution,
    causal_attention,
)

DIM, LENGTH = 8, 9


@dataclasses.dataclass(frozen=True)
class Case:
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 4
    theta: float | None = 100.0
    qk_norm: Any = False
    clip_qkv: float | None = None
    chunk: int | None = None
    temperature: tuple[float, int] | None = None
    bias: bool = False
    conv_width: int = 0

    def build(self, dtype: torch.dtype = torch.float64) -> Attention:
        layer = Attention(
            DIM,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            rotary=None if self.theta is None else RotaryEmbedding(self.head_dim, theta=self.theta),
            qk_norm=self.qk_norm,
            clip_qkv=self.clip_qkv,
            norm_eps=0.1,
            attention_chunk_size=self.chunk,
            temperature=None if self.temperature is None else AttentionTemperature(*self.temperature),
            bias=self.bias,
            conv_width=self.conv_width,
            dtype=dtype,
        )
        return redraw(layer)  # type: ignore[return-value]

    def oracle(self, layer: Attention, x: Tensor) -> Tensor:
        return reference.attention(
            dict(layer.named_parameters()),
            x,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            theta=self.theta,
            qk_norm_eps=0.1 if self.qk_norm is True else None,
            gain_norm=self.qk_norm if isinstance(self.qk_norm, str) else None,
            clip=math.inf if self.clip_qkv is None else self.clip_qkv,
            chunk=self.chunk,
            temperature=self.temperature,
        )


CASES = {
    "full": Case(),
    "chunks of 1": Case(chunk=1),
    "chunks of 3": Case(chunk=3),
    "chunks of 4, the last of one token": Case(chunk=4),
    "one chunk exactly": Case(chunk=LENGTH),
    "chunk one token short of the text": Case(chunk=LENGTH - 1),
    "chunk longer than the text": Case(chunk=100),
    "one kv head": Case(num_kv_heads=1),
    "one kv head, chunks": Case(num_kv_heads=1, chunk=4),
    "six heads on three": Case(num_heads=6, num_kv_heads=3),
    "as many kv heads as heads": Case(num_kv_heads=4),
    "head_dim is not dim / heads": Case(head_dim=6),
    "no positions": Case(theta=None),
    "no positions, chunks": Case(theta=None, chunk=4),
    "temperature": Case(theta=None, temperature=(0.7, 3)),
    "temperature with positions": Case(temperature=(0.7, 2)),
    "QK norm": Case(qk_norm=True),
    "QK norm without positions": Case(qk_norm=True, theta=None),
    "QK norm per head with a gain": Case(qk_norm="per_head"),
    "QK norm per head with a gain, no positions": Case(qk_norm="per_head", theta=None),
    "QK norm over the full width": Case(qk_norm="full_width"),
    "QK norm over the full width, clipped": Case(qk_norm="full_width", clip_qkv=0.6, num_kv_heads=1, bias=True),
    "clipped": Case(clip_qkv=0.6),
    "a gain and all else": Case(
        qk_norm="per_head", clip_qkv=1.1, chunk=4, temperature=(0.7, 3), bias=True, conv_width=2
    ),
    "biases": Case(bias=True),
    "convolution": Case(conv_width=3),
    "convolution over chunks": Case(conv_width=3, chunk=4),
    "convolution of width 1": Case(conv_width=1),
    "convolution longer than the text": Case(conv_width=LENGTH + 2),
    "everything": Case(chunk=4, qk_norm=True, temperature=(0.7, 3), bias=True, conv_width=2),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_explicit_attention(name: str) -> None:
    case = CASES[name]
    layer = case.build()
    x = torch.randn(2, LENGTH, DIM, dtype=torch.float64)
    results = []
    for run in (layer, lambda x: case.oracle(layer, x)):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        grads = {key: p.grad if p.grad is None else p.grad.clone() for key, p in layer.named_parameters()}
        results.append((y.detach(), {"x": leaf.grad, **grads}))
    assert_close(results[0][0], results[1][0], 1e-11, "output")
    assert_gradients(results[0][1], results[1][1], 1e-9)


def test_head_dim_and_kv_heads_by_default() -> None:
    layer = Attention(12, num_heads=3)
    assert (layer.head_dim, layer.num_kv_heads) == (4, 3)
    assert [tuple(p.shape) for p in layer.parameters()] == [(12, 12)] * 4


@given(
    past=st.integers(0, 9),
    queries=st.integers(1, 10),
    chunk=st.none() | st.integers(1, 12),
    groups=st.sampled_from([1, 2, 4]),
)
def test_causal_attention_equals_an_explicit_mask(past: int, queries: int, chunk: int | None, groups: int) -> None:
    q = torch.randn(2, 4, queries, 3, dtype=torch.float64)
    k, v = torch.randn(2, 2, groups, past + queries, 3, dtype=torch.float64)
    expected = reference.masked_attention(q, k, v, chunk)
    assert_close(causal_attention(q, k, v, chunk), expected, 1e-12, "output")


@pytest.mark.parametrize("name", ["full", "chunks of 3", "convolution over chunks", "everything"])
def test_causality(name: str) -> None:
    layer = CASES[name].build()
    x = torch.randn(1, LENGTH, DIM, dtype=torch.float64)
    y = layer(x)
    for t in range(LENGTH):
        changed = x.clone()
        changed[:, t] += 1
        difference = (layer(changed) - y).abs().amax(dim=(0, 2))
        assert difference[:t].max() <= 1e-12 if t else True, f"token {t} is seen before it comes"
        assert difference[t] > 1e-3, f"token {t} does not see itself"


def test_a_chunk_does_not_see_the_one_before() -> None:
    layer = CASES["chunks of 3"].build()
    x = torch.randn(1, LENGTH, DIM, dtype=torch.float64)
    changed = x.clone()
    changed[:, 4] += 1
    difference = (layer(changed) - layer(x)).abs().amax(dim=(0, 2))
    assert (difference > 1e-6).tolist() == [False] * 4 + [True] * 2 + [False] * 3


def test_batch_rows_are_independent() -> None:
    layer = CASES["everything"].build()
    x = torch.randn(3, LENGTH, DIM, dtype=torch.float64)
    assert_close(layer(x)[1:2], layer(x[1:2]), 1e-12, "output")


splits = st.lists(st.integers(1, 6), min_size=1, max_size=8)


@given(
    splits=splits,
    chunk=st.none() | st.integers(1, 8),
    conv_width=st.sampled_from([0, 1, 3]),
    name=st.sampled_from(["full", "temperature", "everything"]),
)
@torch.no_grad()
def test_cached_equals_uncached(splits: list[int], chunk: int | None, conv_width: int, name: str) -> None:
    """However a text is cut into prefill, continuation and single tokens."""
    layer = dataclasses.replace(CASES[name], chunk=chunk, conv_width=conv_width).build()
    x = torch.randn(2, sum(splits), DIM, dtype=torch.float64)
    cache = layer.make_cache()
    pieces = [layer(piece, cache) for piece in x.split(splits, dim=1)]
    assert_close(torch.cat(pieces, dim=1), layer(x), 1e-11, "output")
    assert cache.length == sum(splits)


def bytes_held(cache: Any) -> int:
    """Memory behind every tensor that `cache` refers to."""
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, (tuple, list)):
            for item in value:
                visit(item)

    for value in vars(cache).values():
        visit(value)
    return sum(storages.values())


@given(splits=st.lists(st.integers(1, 30), min_size=1, max_size=8), chunk=st.integers(1, 8))
@example(splits=[1] * 12, chunk=6)  # token by token, where buffers grow by doubling
@torch.no_grad()
def test_a_chunk_local_cache_holds_one_chunk_at_most(splits: list[int], chunk: int) -> None:
    layer = Case(chunk=chunk).build()
    cache = layer.make_cache()
    per_token = 2 * 2 * 4 * 8  # keys and values, kv heads, head_dim, bytes
    for size in splits:
        layer(torch.randn(1, size, DIM, dtype=torch.float64), cache)
        assert cache.held <= chunk
        # the current chunk, or the unfinished one: nothing of a long prefill stays in memory
        assert bytes_held(cache) <= per_token * chunk


@torch.no_grad()
def test_a_full_cache_holds_everything_and_grows_by_doubling() -> None:
    layer = Case().build()
    cache = layer.make_cache()
    per_token = 2 * 2 * 4 * 8
    sizes = set()
    for t in range(64):
        layer(torch.randn(1, 1, DIM, dtype=torch.float64), cache)
        assert cache.held == cache.length == t + 1
        assert per_token * (t + 1) <= bytes_held(cache) <= 2 * per_token * (t + 1)
        sizes.add(bytes_held(cache))
    assert len(sizes) <= 8, "it reallocates at every token"


@pytest.mark.parametrize("cached", [False, True])
def test_chunked_attention_builds_nothing_quadratic(cached: bool) -> None:
    chunk, length = 8, 128
    layer = Case(chunk=chunk, num_heads=2, num_kv_heads=1).build(torch.float32)
    x = torch.randn(1, length, DIM)
    with torch.set_grad_enabled(not cached), OutputSizes() as sizes:
        y = layer(x, layer.make_cache()) if cached else layer(x)
        if not cached:
            y.sum().backward()
    assert sizes.largest < length * length / 4
    # the recorder does see masks: the one of several tokens after a cache
    with torch.no_grad(), OutputSizes() as sizes:
        full = Case().build(torch.float32)
        cache = full.make_cache()
        full(x, cache)
        full(x, cache)
    assert (length, 2 * length) in sizes.shapes


def test_published_temperatures() -> None:
    factors = AttentionTemperature()(torch.tensor([0, 8190, 8191, 16382, 16383, 131071]))
    torch.testing.assert_close(factors, torch.tensor([1.0, 1.0, 1.0693, 1.0693, 1.1099, 1.2833]), rtol=0, atol=5e-5)
    assert factors[1] == 1 and factors.dtype == torch.float32


def test_scalable_softmax_multiplies_scores_by_s_log_n() -> None:
    factors = AttentionTemperature(scalable_softmax=0.5)(torch.tensor([0, 1, 7, 1023]))
    expected = 0.5 * torch.tensor([1.0, 2.0, 8.0, 1024.0]).log()
    torch.testing.assert_close(factors, expected)
    assert factors.dtype == torch.float32


def test_the_convolution_is_the_identity_at_first() -> None:
    x = torch.randn(2, 5, 3)
    y, tail = ShortConvolution(3, 4)(x)
    assert torch.equal(y, x)
    assert torch.equal(tail, x[:, 2:])


@given(length=st.integers(1, 6), width=st.integers(1, 5))
def test_convolution_after_a_tail(length: int, width: int) -> None:
    convolution = redraw(ShortConvolution(3, width, dtype=torch.float64))
    x = torch.randn(2, 4 + length, 3, dtype=torch.float64)
    whole, _ = convolution(x)
    first, tail = convolution(x[:, :4])
    rest, _ = convolution(x[:, 4:], tail)
    assert_close(torch.cat((first, rest), dim=1), whole, 1e-13, "output")


def test_bfloat16_autocast() -> None:
    layer = CASES["everything"].build(torch.float32)
    x = torch.randn(2, LENGTH, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert_close(y, layer(x), 0.05, "output")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 0}, "num_heads=0: must be a number >= 1"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads=4: must be a positive multiple of num_kv_heads=3"),
        ({"num_heads": 4, "num_kv_heads": 0}, "num_kv_heads=0: must be a number >= 1"),
        ({"num_heads": 3}, "num_heads=3: must divide dim=8 where head_dim is not given"),
        ({"num_heads": 2, "rotary": RotaryEmbedding(6)}, "rotary.head_dim=6: must equal head_dim=4"),
        (
            {"num_heads": 2, "attention_chunk_size": 0},
            "attention_chunk_size=0: must be a number >= 1",
        ),
        ({"num_heads": 2, "conv_width": -1}, "conv_width=-1: must be a number >= 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(DIM, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"floor_scale": 0}, "floor_scale=0: must be a number >= 1"),
        ({"attn_scale": -0.1}, "attn_scale=-0.1: must be a number >= 0"),
        ({"scalable_softmax": 0.0}, "scalable_softmax=0.0: must be a number > 0"),
    ],
)
def test_bad_temperature(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionTemperature(**arguments)


def test_bad_convolution_width() -> None:
    with pytest.raises(ValueError, match="width=0: must be a number >= 1"):
        ShortConvolution(4, 0)


@pytest.mark.parametrize("chunk", [None, 4])
def test_an_attention_mask_hides_padding(chunk: int | None) -> None:
    """A padded row is the row without padding, where positions do not matter: chunks begin at its first real token."""
    attention = redraw(Attention(8, num_heads=2, attention_chunk_size=chunk, dtype=torch.float64))
    x = torch.randn(1, 11, 8, dtype=torch.float64)
    padded = torch.cat((torch.randn(1, 3, 8, dtype=torch.float64), x), dim=1)
    mask = (torch.arange(14) >= 3)[None]
    assert_close(attention(padded, attention_mask=mask)[:, 3:], attention(x), 1e-12, "output")


def test_an_attention_mask_of_another_shape_is_refused() -> None:
    attention = Attention(8, num_heads=2)
    with pytest.raises(ValueError, match=r"attention_mask of shape \(2, 4\).*= \(2, 5\)"):
        attention(torch.randn(2, 5, 8), attention_mask=torch.ones(2, 4, dtype=torch.bool))


def test_a_mask_for_some_calls_on_a_cache_is_refused() -> None:
    attention = Attention(8, num_heads=2)
    cache = attention.make_cache()
    attention(torch.randn(2, 5, 8), cache)
    with pytest.raises(ValueError, match="attention_mask: give it to all calls on one cache, or to none"):
        attention(torch.randn(2, 1, 8), cache, torch.ones(2, 6, dtype=torch.bool))


def test_masked_chunks_build_no_square_mask() -> None:
    attention = Attention(8, num_heads=1, attention_chunk_size=4)
    length = 64
    with OutputSizes() as sizes:
        attention(torch.randn(1, length, 8), attention_mask=torch.ones(1, length, dtype=torch.bool))
    assert sizes.largest < length * length / 2


def test_the_cache_under_a_mask_holds_less_than_a_chunk() -> None:
    attention = Attention(8, num_heads=1, attention_chunk_size=4)
    cache = attention.make_cache()
    for start, end in ((0, 10), (10, 11), (11, 17), (17, 18)):
        attention(torch.randn(1, end - start, 8), cache, torch.ones(1, end, dtype=torch.bool))
        assert cache.held == 3


@pytest.mark.parametrize("masked", [False, True])
def test_short_bf16_attention_trains_in_fp32_on_a_cpu(masked: bool) -> None:
    """There the bf16 backward is slower; what comes out is bf16 either way, and without gradients nothing is cast."""
    attention = redraw(Attention(8, num_heads=2, num_kv_heads=1, dtype=torch.bfloat16))
    x = torch.randn(2, 6, 8, dtype=torch.bfloat16)
    mask = torch.ones(2, 6, dtype=torch.bool) if masked else None
    casts = []
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), OutputSizes() as sizes:
            y = attention(x, attention_mask=mask)
        assert y.dtype == torch.bfloat16
        casts.append(sizes.calls.get("aten::_to_copy", 0))
    assert casts == [4, 0]  # queries, keys, values, and the result


@pytest.mark.parametrize("qk_norm", [False, True, "per_head", "full_width"])
def test_attention_under_autocast_is_that_in_fp32_up_to_rounding(qk_norm: Any) -> None:
    attention = redraw(Attention(32, num_heads=4, num_kv_heads=2, qk_norm=qk_norm))
    x = torch.randn(2, 20, 32)
    expected, expected_gradients = run_with_gradients(lambda: attention(x), attention)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, found_gradients = run_with_gradients(lambda: attention(x), attention)
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), expected, 0.05, "output")
    assert_gradients(found_gradients, expected_gradients, 0.05)
