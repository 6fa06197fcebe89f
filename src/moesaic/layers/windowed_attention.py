"""Attention over a sliding window of keys, and with sinks: the attention of gpt-oss."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.layers.attention import Attention, AttentionCache, attend, lower_right_causal
from moesaic.layers.checks import require_flags, require_sizes

__all__ = ["WindowedAttention", "sink_attention", "visible_in_window", "windowed_attention"]

LEAST_QUERIES = 128
"""Queries that are computed at once, at least: of narrower windows, masked keys cost less than more calls."""


class WindowedAttention(Attention):
    """`Attention` in which a query sees the newest keys only, or may look at none of them (transformers' GptOss).

    A layer without window and without sinks is an `Attention`.

    Args:
        window: how many keys a query sees, its own included; None for all earlier ones. Padding counts.
        sinks: whether each query head has a learned logit that takes part in the softmax and has no value.
    """

    sinks: nn.Parameter | None

    def __init__(self, dim: int, *, window: int | None = None, sinks: bool = False, **arguments: Any) -> None:
        super().__init__(dim, **arguments)
        require_flags(sinks=sinks)
        if window is not None:
            require_sizes(window=window)
        if self.attention_chunk_size is not None:
            raise ValueError(
                f"attention_chunk_size={self.attention_chunk_size}: must be None with a window or with sinks"
            )
        self.window = window
        like = self.q_proj.weight
        sink_of_head = torch.zeros(self.num_heads, device=like.device, dtype=like.dtype)
        self.sinks = nn.Parameter(sink_of_head) if sinks else None

    def make_cache(self) -> AttentionCache:
        return AttentionCache(self.window, slides=True)

    def keys_of(self, seq_len: int) -> float:
        return visible_in_window(seq_len, self.window)

    def cache_bytes(self, length: int, dtype: torch.dtype) -> int:
        """Keys and values of `length` tokens, or of the window."""
        held = length if self.window is None else min(length, self.window)
        return held * 2 * self.num_kv_heads * self.head_dim * dtype.itemsize

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None) -> Tensor:
        return windowed_attention(q, k, v, window=self.window, sinks=self.sinks, mask=attention_mask)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window={self.window}, sinks={self.sinks is not None}"


def visible_in_window(seq_len: int, window: int | None) -> float:
    """Keys that a query sees, averaged over seq_len positions."""
    width = seq_len if window is None else min(window, seq_len)
    return width * (2 * seq_len - width + 1) / (2 * seq_len)


def windowed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Causal softmax attention where a query sees the `window` newest keys up to its own, and perhaps a sink.

    Positions count padding, so a window is the same stretch of a row whatever is padding in it. Queries are taken a
    window at a time, because each sees at most the window - 1 keys before it: time and memory are linear in length.

    Args:
        q: (B, N, L, H), the last L of the S positions; finite, padding too.
        k, v: (B, G, S', H), the last S' <= S positions, N a multiple of G; finite, padding too.
        window: None lets every query see all earlier keys.
        sinks: (N,), see `sink_attention`; None for none.
        mask: (B, S) bool, False for padding. Padding sees itself; what comes out for it means nothing.

    Returns:
        (B, N, L, H).
    """
    is_exported = torch.compiler.is_exporting()
    if mask is None and (window is None or (not is_exported and k.size(2) <= window)):
        return lower_right_causal(q, k, v) if sinks is None else sink_attention(q, k, v, sinks)
    queries, total = q.size(2), k.size(2) if mask is None else mask.size(1)
    past, first_held = total - queries, total - k.size(2)
    # an exported graph is one for every length, which cannot be cut into pieces
    step = queries if window is None or is_exported else max(window, LEAST_QUERIES)
    pieces = []
    for start in range(0, queries, step):
        end = min(queries, start + step)
        first = first_held if window is None or is_exported else max(first_held, past + start - window + 1)
        query_at = torch.arange(past + start, past + end, device=q.device)[:, None]
        key_at = torch.arange(first, past + end, device=q.device)
        visible = (key_at <= query_at)[None]
        if window is not None:
            visible = visible & (key_at > query_at - window)
        if mask is not None:
            visible = (visible & mask[:, None, first : past + end]) | (key_at == query_at)
        held = slice(first - first_held, past + end - first_held)
        piece = q[:, :, start:end], k[:, :, held], v[:, :, held]
        if sinks is None:
            pieces.append(attend(*piece, visible[:, None]))
        else:
            pieces.append(sink_attention(*piece, sinks, visible))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def sink_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, visible: Tensor | None = None) -> Tensor:
    """Softmax attention in which each head may also look at its sink, a logit without a value (gpt-oss).

    y = sum over keys s of exp(l_s) v_s / (exp(sink) + sum over s of exp(l_s)), with l_s = q k_s / sqrt(H).

    The sink is one more key, whose value is 0. It is all 0 but for an additional dimension, where queries hold the
    logit and other keys 0. So torch's fast kernels do it, and the sinks get their gradient through the queries.

    Args:
        q: (B, N, L, H).
        k, v: (B, G, S, H), N a multiple of G.
        sinks: (N,), cast to the dtype of q.
        visible: (B or 1, L, S) bool; None for causal attention where the queries are the last L of the S positions.

    Returns:
        (B, N, L, H).
    """
    width, queries, keys = q.size(3), q.size(2), k.size(2)
    more = 8 - width % 8  # kernels on GPUs want multiples of 8
    root = width**0.5  # attention divides by that of the width
    logits = (sinks.to(q.dtype) * root)[:, None, None].expand(*q.shape[:3], 1)
    q = torch.cat((q, F.pad(logits, (0, more - 1))), dim=3)
    key_of_sink = F.pad(k.new_ones(1), (width, more - 1)).expand(*k.shape[:2], 1, width + more)
    k = torch.cat((key_of_sink, F.pad(k, (0, more))), dim=2)
    v = F.pad(v, (0, more, 1, 0))
    if visible is not None:
        y = attend(q, k, v, F.pad(visible, (1, 0), value=True)[:, None], scale=1 / root)
    elif queries == keys:  # a query before the first one makes them as many as keys again, which needs no mask
        y = attend(F.pad(q, (0, 0, 1, 0)), k, v, None, is_causal=True, scale=1 / root)[:, :, 1:]
    else:
        y = lower_right_causal(q, k, v, scale=1 / root)
    return y[..., :width]
