"""Windows and sinks, against an explicit mask and against transformers' gpt-oss."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.comparing import OutputSizes, assert_close, assert_gradients, redraw, run_with_gradients
from torch import Tensor
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding

from moesaic.layers import Attention, RotaryEmbedding, WindowedAttention
from moesaic.layers.windowed_attention import LEAST_QUERIES, visible_in_window, windowed_attention

DIM, HEADS, GROUPS, WIDTH = 12, 4, 2, 6


def build(window: int | None = 3, sinks: bool = True, dtype: torch.dtype = torch.float64) -> WindowedAttention:
    layer = WindowedAttention(
        DIM,
        num_heads=HEADS,
        num_kv_heads=GROUPS,
        head_dim=WIDTH,
        rotary=RotaryEmbedding(WIDTH, theta=100.0),
        window=window,
        sinks=sinks,
        bias=True,
        dtype=dtype,
    )
    return redraw(layer)  # type: ignore[return-value]


def explicit(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Tensor | None, mask: Tensor | None = None
) -> Tensor:
    """A whole (L, S) mask, and the sink as a column of logits."""
    queries, keys, copies = q.size(2), k.size(2), q.size(1) // k.size(1)
    k, v = (x.repeat_interleave(copies, dim=1) for x in (k, v))
    at, key_at = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
    visible = ((key_at <= at) & (key_at > at - (window or keys)))[None]
    if mask is not None:
        visible = (visible & mask[:, None]) | (key_at == at)
    logits = (q @ k.mT / q.size(-1) ** 0.5).masked_fill(~visible[:, None], -torch.inf)
    if sinks is None:
        return logits.softmax(dim=-1) @ v
    column = sinks[:, None, None].expand(*logits.shape[:3], 1)
    return torch.cat((logits, column), dim=-1).softmax(dim=-1)[..., :-1] @ v


@given(
    past=st.integers(0, 9),
    queries=st.integers(1, 10) | st.just(LEAST_QUERIES + 30),
    window=st.none() | st.integers(1, 12) | st.just(LEAST_QUERIES + 5),
    sinks=st.booleans(),
    padding=st.none() | st.integers(0, 5),
    groups=st.sampled_from([1, 2, 4]),
)
def test_equals_an_explicit_mask(
    past: int, queries: int, window: int | None, sinks: bool, padding: int | None, groups: int
) -> None:
    q = torch.randn(2, 4, queries, 3, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, groups, past + queries, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    sink = torch.randn(4, dtype=torch.float64, requires_grad=True) if sinks else None
    mask = None if padding is None else torch.arange(past + queries) >= torch.tensor([[0], [padding]])
    found = windowed_attention(q, k, v, window=window, sinks=sink, mask=mask)
    expected = explicit(q, k, v, window, sink, mask)
    assert_close(found, expected, 1e-12, "output")
    inputs, upstream = [x for x in (q, k, v, sink) if x is not None], torch.randn_like(expected)
    gradients = (torch.autograd.grad(y, inputs, upstream) for y in (found, expected))
    for name, ours, oracle in zip("qkvs", *gradients, strict=False):
        assert_close(ours, oracle, 1e-11, f"gradient of {name}")


def halves(weight: Tensor) -> Tensor:
    """Rows of neighboring pairs of each head -> rows of paired halves, as transformers stores them."""
    return weight.unflatten(0, (-1, WIDTH // 2, 2)).transpose(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("kind", ["sliding_attention", "full_attention"])
def test_equals_transformers_gpt_oss(kind: str, padded: bool) -> None:
    config = GptOssConfig(
        hidden_size=DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=WIDTH,
        sliding_window=3,
        layer_types=[kind],
        num_hidden_layers=1,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )
    config._attn_implementation = "eager"
    ours = build(window=3 if kind == "sliding_attention" else None, dtype=torch.float32)
    theirs = GptOssAttention(config, 0)
    state = ours.state_dict()
    rotated = {name: halves(x) for name, x in state.items() if name.startswith(("q_proj", "k_proj"))}
    theirs.load_state_dict(state | rotated)
    x, length = torch.randn(2, 9, DIM), 9
    mask = torch.arange(length) >= torch.tensor([[0], [4]]) if padded else None
    at = torch.arange(length)
    visible = (at <= at[:, None]) & (at > at[:, None] - (ours.window or length))
    visible = visible[None] if mask is None else (visible & mask[:, None]) | (at == at[:, None])
    added = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[:, None]
    angles = GptOssRotaryEmbedding(config)(x, at[None])
    real = torch.ones(2, length, 1) if mask is None else mask[:, :, None].float()
    expected, oracle = run_with_gradients(lambda: theirs(x, angles, added)[0] * real, theirs)
    found, gradients = run_with_gradients(lambda: ours(x, None, mask) * real, ours)
    assert_close(found, expected, 1e-6, "output")
    names = {name: halves(g) if name in rotated and g is not None else g for name, g in gradients.items()}
    assert_gradients(names, oracle, 1e-5)


splits = st.lists(st.integers(1, 6), min_size=1, max_size=8)


@given(splits=splits, window=st.none() | st.integers(1, 8), sinks=st.booleans(), padding=st.none() | st.integers(0, 4))
@torch.no_grad()
def test_cached_equals_uncached(splits: list[int], window: int | None, sinks: bool, padding: int | None) -> None:
    """However a text is cut into prefill, continuation and single tokens."""
    layer, length = build(window, sinks), sum(splits)
    x = torch.randn(2, length, DIM, dtype=torch.float64)
    mask = None if padding is None else torch.arange(length) >= torch.tensor([[0], [min(padding, length)]])
    real = torch.ones(2, length, 1, dtype=torch.bool) if mask is None else mask[:, :, None]
    cache, found, end = layer.make_cache(), [], 0
    for piece in x.split(splits, dim=1):
        end += piece.size(1)
        found.append(layer(piece, cache, None if mask is None else mask[:, :end]))
        assert cache.held == end if window is None else cache.held <= max(window - 1, 0)
    assert_close(torch.cat(found, dim=1) * real, layer(x, None, mask) * real, 1e-11, "output")


def test_a_window_of_all_tokens_is_full_attention() -> None:
    layer, full = (
        build(window=20, sinks=False),
        Attention(
            DIM,
            num_heads=HEADS,
            num_kv_heads=GROUPS,
            head_dim=WIDTH,
            rotary=RotaryEmbedding(WIDTH, theta=100.0),
            bias=True,
        ).double(),
    )
    full.load_state_dict(layer.state_dict())
    x = torch.randn(2, 20, DIM, dtype=torch.float64)
    assert torch.equal(layer(x), full(x))


@pytest.mark.parametrize("window", [None, 1, 3, 9, 30])
def test_visible_keys(window: int | None) -> None:
    counted = [min(t + 1, window or 99) for t in range(9)]
    assert visible_in_window(9, window) == pytest.approx(sum(counted) / 9)
    layer = build(window, sinks=False)
    matrices = 2 * sum(p.numel() for name, p in layer.named_parameters() if name.endswith("weight"))
    assert layer.flops_per_token(9) == pytest.approx(matrices + 4 * HEADS * WIDTH * sum(counted) / 9)
    assert layer.cache_bytes(9, torch.float32) == min(9, window or 9) * 2 * GROUPS * WIDTH * 4


def test_a_window_builds_nothing_quadratic() -> None:
    layer, length = build(window=64, dtype=torch.float32), 2048
    with OutputSizes() as sizes, torch.no_grad():
        layer(torch.randn(1, length, DIM))
    assert sizes.largest <= length * 2 * HEADS * 2 * WIDTH + 4 * LEAST_QUERIES**2


def test_a_loud_sink_silences_a_head() -> None:
    layer = build(sinks=True)
    with torch.no_grad():
        layer.sinks.fill_(50.0)  # type: ignore[union-attr]
    x = torch.randn(1, 7, DIM, dtype=torch.float64)
    assert_close(layer(x), layer.o_proj.bias.expand(1, 7, DIM), 1e-12, "output")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"window": 0}, "window=0: must be a number >= 1"),
    ({"window": 3, "attention_chunk_size": 4}, "attention_chunk_size=4: must be None with a window or with sinks"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WindowedAttention(8, num_heads=2, **arguments)
