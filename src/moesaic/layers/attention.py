"""Causal self-attention (token mixer): grouped queries, RoPE or no positions, chunks, temperature, KV cache."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from moesaic.layers.checks import (
    differentiates_forward,
    has_values,
    require_choice,
    require_dtype,
    require_flags,
    require_kinds,
    require_last,
    require_numbers,
    require_sizes,
    require_tensor,
    require_weights_dtype,
)
from moesaic.layers.norm import RMSNorm
from moesaic.layers.parametrization import ParameterKind
from moesaic.layers.rotary import RotaryEmbedding

__all__ = [
    "Attention",
    "AttentionCache",
    "AttentionTemperature",
    "QKNorm",
    "ShortConvolution",
    "admit",
    "attend",
    "causal_attention",
    "lower_right_causal",
    "masked_attention",
    "visible_keys",
]

QKNorm = Literal["per_head", "full_width"]
"""Norms of queries and keys with a gain, before RoPE: of each head (Qwen3), or of all heads as one vector (OLMoE)."""


@dataclasses.dataclass(frozen=True)
class AttentionTemperature:
    """Llama 4's temperature: queries are scaled by 1 + attn_scale * log(1 + floor((position + 1) / floor_scale)).

    It sharpens attention over long contexts on layers without positions, and is 1 before position floor_scale - 1
    (transformers `Llama4TextAttention`; the idea is Scalable-Softmax, Nakanishi 2025, arXiv 2501.19399).

    With `scalable_softmax` = s the factor is that paper's s * log(position + 1) instead, whatever the two others say.
    Its s is learned per head; here s is a constant, and the query projection can learn any factor on top of it.
    """

    attn_scale: float = dataclasses.field(default=0.1, metadata={"most": 1e6})
    floor_scale: int = dataclasses.field(default=8192, metadata={"most": 2**40})
    scalable_softmax: float | None = dataclasses.field(default=None, metadata={"most": 1e6})

    def __post_init__(self) -> None:
        require_sizes(floor_scale=self.floor_scale)
        require_numbers(attn_scale=self.attn_scale)
        if self.scalable_softmax is not None:
            require_numbers(above=True, scalable_softmax=self.scalable_softmax)

    def __call__(self, positions: Tensor) -> Tensor:
        """positions (L,) -> factors (L,) in fp32."""
        if self.scalable_softmax is not None:
            return self.scalable_softmax * torch.log(positions.float() + 1)
        return 1 + self.attn_scale * torch.log1p(torch.floor((positions.float() + 1) / self.floor_scale))


class AttentionCache:
    """What one attention layer still needs of the past: keys, values and the tail of its convolution's input.

    A chunk-local layer keeps the current chunk only, so its cache never holds more than `chunk` keys. Under an
    attention mask chunks begin at different tokens in different rows; then it keeps the last chunk - 1 keys. So it does
    always where the chunk `slides`, as the window of `WindowedAttention`.
    """

    def __init__(self, chunk: int | None = None, *, slides: bool = False) -> None:
        self.chunk = chunk
        self.slides = slides
        self.length = 0
        """Tokens seen so far, also those no longer held."""
        self.masked = False
        """Whether the tokens seen so far came with an attention mask."""
        self.convolution_tail: Tensor | None = None
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._held = 0

    @property
    def held(self) -> int:
        """Tokens whose keys and values are in memory."""
        return self._held

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add k, v (B, G, L, H); return all keys and values that the new queries may see, the new ones included."""
        new = k.size(2)
        self._reserve(k, v, self._held + new)
        assert self._buffers is not None
        keys, values = self._buffers
        keys[:, :, self._held : self._held + new] = k
        values[:, :, self._held : self._held + new] = v
        self._held += new
        self.length += new
        visible = keys[:, :, : self._held], values[:, :, : self._held]
        if self.chunk is not None and self._held >= self.chunk:
            self._held = self.chunk - 1 if self.masked or self.slides else self.length % self.chunk
            # clones: `visible` still reads the old buffers, and a long prefill must not stay in memory
            self._buffers = (
                visible[0][:, :, visible[0].size(2) - self._held :].clone(),
                visible[1][:, :, visible[1].size(2) - self._held :].clone(),
            )
        return visible

    def _reserve(self, k: Tensor, v: Tensor, needed: int) -> None:
        """Grow by doubling, so that decoding token by token copies each key O(1) times."""
        if self._buffers is not None and self._buffers[0].size(2) >= needed:
            return
        capacity = max(needed, 2 * self._held)
        if self.chunk is not None and needed <= self.chunk:
            capacity = min(capacity, self.chunk)
        grown = tuple(new.new_empty(new.size(0), new.size(1), capacity, new.size(3)) for new in (k, v))
        if self._buffers is not None:
            for buffer, old in zip(grown, self._buffers, strict=True):
                buffer[:, :, : self._held] = old[:, :, : self._held]
        self._buffers = (grown[0], grown[1])


def visible_keys(seq_len: int, chunk: int | None = None) -> float:
    """Keys that a query sees under the causal (chunked) mask, averaged over seq_len positions."""
    if chunk is None or chunk >= seq_len:
        return (seq_len + 1) / 2
    whole, rest = divmod(seq_len, chunk)
    return (whole * chunk * (chunk + 1) / 2 + rest * (rest + 1) / 2) / seq_len


class ShortConvolution(nn.Module):
    """y[t] = x[t] + sum over i < width of weight[i] * x[t - i]: depthwise, causal, zero-initialized.

    The "Canon layer" of Allen-Zhu 2025 ("Physics of Language Models: Part 4.1"). Written as shifted products because
    a depthwise conv1d of this width is slower on CPUs.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_sizes(channels=channels, width=width)
        require_dtype(dtype)
        self.width = width
        self.weight = nn.Parameter(torch.zeros(width, channels, device=device, dtype=dtype))
        self.take_channels: Callable[[Tensor], Tensor] | None = None
        """What is left of the weight (width, C) on a rank that has some of the channels; None where all are here."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def parameter_kinds(self) -> dict[str, ParameterKind]:
        return {"weight": "vector"}

    def flops_per_token(self, seq_len: int) -> float:
        """0: elementwise work is not counted."""
        return 0.0

    def forward(self, x: Tensor, tail: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, L, C) after tail (B, width - 1, C) (None: zeros) -> y (B, L, C) and the next tail.

        Args:
            mask: (B, L) bool, False for padding. A real token then meets the real tokens before it, wherever padding
                stands, and the next tail is of each row's last real tokens. What comes out for padding means nothing.

        Raises:
            TypeError: x is no floating-point tensor, or the mask not of bool.
            ValueError: another shape.
        """
        weight = self.weight if self.take_channels is None else self.take_channels(self.weight)
        require_last(x, weight.size(1), "ShortConvolution")
        require_tensor("ShortConvolution", "x", x, (None, None, None))
        if tail is not None:
            require_tensor("ShortConvolution", "tail", tail, (x.size(0), self.width - 1, x.size(2)))
        if mask is not None:
            require_tensor("ShortConvolution", "mask", mask, (x.size(0), x.size(1)), torch.bool)
        before, length = self.width - 1, x.size(1)
        if mask is not None:
            x = x.masked_fill(~mask[:, :, None], 0)
        if tail is None:
            tail = x.new_zeros(x.size(0), before, x.size(2))
        known = torch.cat((tail, x), dim=1)
        if mask is not None:  # sorted to the front, before the tail, padding is out of every token's reach
            order = F.pad(mask, (before, 0), value=True).to(torch.uint8).argsort(dim=1, stable=True)
            known = known.gather(1, order[:, :, None].expand_as(known))
            x = known[:, before:]
        y = x
        for i in range(self.width):
            start = before - i
            y = torch.addcmul(y, weight[i].to(x.dtype), known[:, start : start + length])
        if mask is not None:
            place = order.argsort(dim=1)[:, before:].sub(before).clamp(min=0)
            y = y.gather(1, place[:, :, None].expand_as(y))
        return y, known[:, length:]


def admit(
    name: str, x: Tensor, projection: nn.Linear, cache: AttentionCache | None, attention_mask: Tensor | None
) -> tuple[Tensor, int, Tensor | None]:
    """What every attention layer does first: refuse what it cannot take, and hide what stands in padding.

    Args:
        name: of the layer, for messages.
        x: (B, L, D).
        projection: one of the layers that read x.
        cache, attention_mask: as for `Attention.forward`. The cache learns whether there is a mask.

    Returns:
        x (B, L, D) with ones in place of padding, the number of tokens in the cache, and where x is real, (B, L) bool
        or None.

    Raises:
        TypeError, ValueError: as `Attention.forward`.
    """
    require_last(x, None, name)
    if x.dim() != 3:
        raise ValueError(f"{name}: x of shape {tuple(x.shape)}; must be (batch, tokens, dim)")
    require_last(x, projection.in_features, name)
    require_weights_dtype(name, x, projection.weight)
    start = 0 if cache is None else cache.length
    if attention_mask is not None:
        require_tensor(name, "attention_mask", attention_mask, (None, None), torch.bool)
    if attention_mask is not None and attention_mask.shape != (x.size(0), start + x.size(1)):
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)}: must be (batch, tokens so far and new) = "
            f"{(x.size(0), start + x.size(1))}"
        )
    if cache is not None:
        if start and cache.masked != (attention_mask is not None):
            raise ValueError("attention_mask: give it to all calls on one cache, or to none")
        cache.masked = attention_mask is not None
    if attention_mask is None:
        return x, start, None
    is_real = attention_mask[:, start:]
    # a weight of 0 would not hide inf and nan; 1, because no norm divides by it
    return x.masked_fill(~is_real[:, :, None], 1), start, is_real


def causal_attention(q: Tensor, k: Tensor, v: Tensor, chunk: int | None = None) -> Tensor:
    """Softmax attention where the L queries are the last L of the S keys' positions.

    With `chunk`, a query sees only keys of its own chunk (Llama 4's chunked attention: block-diagonal, not a sliding
    window); key 0 must then be the first token of a chunk. Whole chunks are folded into the batch, so time and memory
    are linear in length and no (L, L) mask is built.

    Args:
        q: (B, N, L, H).
        k, v: (B, G, S, H), S >= L, N a multiple of G; kv head g serves query heads g*N/G, ..., (g+1)*N/G - 1.
        chunk: tokens per chunk; None lets every query see all earlier keys.

    Returns:
        (B, N, L, H).
    """
    queries, past = q.size(2), k.size(2) - q.size(2)
    if chunk is None or (not torch.compiler.is_exporting() and k.size(2) <= chunk):
        return lower_right_causal(q, k, v)
    if torch.compiler.is_exporting():  # one graph for every length cannot be cut into chunks
        key_at, query_at = (torch.arange(x.size(2), device=q.device) for x in (k, q))
        query_at = query_at[:, None] + past
        return attend(q, k, v, (key_at <= query_at) & (key_at // chunk == query_at // chunk))
    if past % chunk:  # finish the chunk that the cache has begun
        begin = past - past % chunk
        first = min(chunk - past % chunk, queries)
        head = lower_right_causal(q[:, :, :first], k[:, :, begin : past + first], v[:, :, begin : past + first])
        if first == queries:
            return head
        rest = causal_attention(q[:, :, first:], k[:, :, past + first :], v[:, :, past + first :], chunk)
        return torch.cat((head, rest), dim=2)
    k, v = k[:, :, past:], v[:, :, past:]
    whole = queries - queries % chunk
    pieces = []
    if whole:
        fold = "b n (c l) h -> (b c) n l h"
        folded = [rearrange(x[:, :, :whole], fold, l=chunk) for x in (q, k, v)]
        pieces.append(rearrange(lower_right_causal(*folded), "(b c) n l h -> b n (c l) h", b=q.size(0)))
    if whole < queries:
        pieces.append(lower_right_causal(q[:, :, whole:], k[:, :, whole:], v[:, :, whole:]))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, chunk: int | None = None) -> Tensor:
    """`causal_attention` where padding is not seen, with transformers' rules for it.

    A row's chunks are counted from its first real token, so they begin at different places in different rows. Queries
    are taken a chunk at a time, because each sees at most the chunk - 1 keys before it: no (L, S) mask is built for
    chunk-local attention. Padding sees itself, so that no row of weights is empty; what comes out for it means nothing.

    Args:
        q: (B, N, L, H), the last L of the S positions; finite, padding too.
        k, v: (B, G, S', H), the last S' <= S positions; finite, padding too.
        mask: (B, S) bool, False for padding.
        chunk: tokens per chunk; None lets every query see all earlier real keys.

    Returns:
        (B, N, L, H).
    """
    queries, total = q.size(2), mask.size(1)
    past, first_held = total - queries, total - k.size(2)
    first_real = (mask.cumsum(dim=1) == 0).sum(dim=1)
    pieces = []
    for start in range(0, queries, chunk or queries):
        end = min(queries, start + (chunk or queries))
        first = first_held if chunk is None else max(first_held, past + start - chunk + 1)
        query_at = torch.arange(past + start, past + end, device=q.device)
        key_at = torch.arange(first, past + end, device=q.device)
        visible = (key_at <= query_at[:, None]) & mask[:, None, first : past + end]
        if chunk is not None:
            begin = first_real[:, None, None]
            visible = visible & ((key_at - begin) // chunk == (query_at[:, None] - begin) // chunk)
        visible = visible | (key_at == query_at[:, None])
        keys = slice(first - first_held, past + end - first_held)
        piece = attend(q[:, :, start:end], k[:, :, keys], v[:, :, keys], visible[:, None])
        pieces.append(piece)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def lower_right_causal(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Attention of the last L of S positions, each to all up to its own: q (B, N, L, H), k and v (B, G, S, H)."""
    queries, keys = q.size(2), k.size(2)
    mask, is_causal = None, False
    if queries == keys:  # a branch, because a compiler's comparison is no bool, which the kernel wants
        is_causal = True
    elif queries > 1:  # several tokens after a cache; one query may see everything, equal lengths use is_causal
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return attend(q, k, v, mask, is_causal, scale)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """torch's attention, of q (B, N, L, H) to k and v (B, G, S, H), in the dtype that is fastest.

    Args:
        mask: bool, True for what is seen; it fits (B, N, L, S).
        scale: of the logits; None for 1 / sqrt(H).
    """
    dtype = q.dtype
    # On CPUs the half-precision backward is slower than casting to fp32 and back, up to 4 times on short sequences
    # (benchmarks/attention.py); the forward alone never is.
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if trains and q.device.type == "cpu" and dtype.itemsize == 2 and k.size(2) * k.size(3) <= 16384:
        q, k, v = q.float(), k.float(), v.float()
    shares_heads = True if q.size(1) != k.size(1) else False  # noqa: SIM210  (a compiler's comparison is no bool)
    # the one kernel that has forward-mode derivatives
    kernel = sdpa_kernel(SDPBackend.MATH) if differentiates_forward() else contextlib.nullcontext()
    with kernel, torch.autocast(q.device.type, enabled=False):  # it would cast back
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=shares_heads
        )
    if trains and has_values(q):
        next(each for each in (q, k, v) if each.requires_grad).register_hook(_refuse_second_derivatives)
    return y.to(dtype)


def _refuse_second_derivatives(gradient: Tensor) -> None:
    """Say what to take for a gradient that keeps its graph, where torch's kernel only says that it has no formula."""

    def refuse(gradients: tuple[Tensor, ...]) -> None:
        raise RuntimeError(
            "attention: torch's fast kernel has no second derivatives; the call must be within "
            "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
        )

    node = gradient.grad_fn
    if node is not None and node.name().endswith("NotImplemented"):
        node.register_prehook(refuse)


class Attention(nn.Module):
    """Causal self-attention with the options of Llama 4, Mixtral, Qwen3 and OLMoE, each on its own switch.

    Order of operations, as in transformers' `Llama4TextAttention`: project, (short convolution,) RoPE, QK norm,
    temperature, softmax(q k / sqrt(head_dim)) v, output projection. QK norms with a gain and then clipping come before
    RoPE instead, as in `Qwen3MoeAttention` and `OlmoeAttention`.

    Llama 4's two kinds of layer:

        rope = Attention(dim, num_heads=8, num_kv_heads=2, rotary=RotaryEmbedding(dim // 8), qk_norm=True,
                         attention_chunk_size=8192)
        nope = Attention(dim, num_heads=8, num_kv_heads=2, temperature=AttentionTemperature())

    Args:
        dim: model width D.
        num_heads: query heads N.
        num_kv_heads: key and value heads G, a divisor of N; None means N.
        head_dim: H; None means dim / num_heads.
        rotary: positions for queries and keys; None for a layer without positions (NoPE).
        qk_norm: True normalizes queries and keys per head after RoPE, without gain (Llama 4). A name of `QKNorm`
            normalizes them before RoPE, with a gain.
        clip_qkv: queries, keys and values are clipped to +-clip_qkv after such a norm (OLMoE); None for no clipping.
        attention_chunk_size: tokens per chunk of a chunk-local layer; None for full causal attention.
        temperature: scale of the queries by absolute position; None for none.
        bias: whether the four projections have a bias.
        conv_width: width of a `ShortConvolution` over queries, keys and values; 0 for none.
    """

    q_norm: RMSNorm | None
    k_norm: RMSNorm | None

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rotary: RotaryEmbedding | None = None,
        qk_norm: bool | QKNorm = False,
        clip_qkv: float | None = None,
        norm_eps: float = 1e-5,
        attention_chunk_size: int | None = None,
        temperature: AttentionTemperature | None = None,
        bias: bool = False,
        conv_width: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        require_sizes(dim=dim, num_heads=num_heads, num_kv_heads=num_kv_heads)
        require_sizes(0, conv_width=conv_width)
        require_flags(bias=bias)
        if isinstance(qk_norm, str):
            require_choice(get_args(QKNorm), qk_norm=qk_norm)
        else:
            require_flags(qk_norm=qk_norm)
        if clip_qkv is not None:
            require_numbers(above=True, clip_qkv=clip_qkv)
        require_numbers(norm_eps=norm_eps)
        require_kinds(RotaryEmbedding, rotary=rotary)
        require_kinds(AttentionTemperature, temperature=temperature)
        require_dtype(dtype)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads={num_heads}: must be a positive multiple of num_kv_heads={num_kv_heads}")
        if head_dim is None:
            if dim % num_heads:
                raise ValueError(f"num_heads={num_heads}: must divide dim={dim} where head_dim is not given")
            head_dim = dim // num_heads
        require_sizes(head_dim=head_dim)
        if rotary is not None and rotary.head_dim != head_dim:
            raise ValueError(f"rotary.head_dim={rotary.head_dim}: must equal head_dim={head_dim}")
        if attention_chunk_size is not None:
            require_sizes(attention_chunk_size=attention_chunk_size)
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.attention_chunk_size = attention_chunk_size
        self.temperature = temperature
        self.rotary = rotary
        self.qk_norm = RMSNorm(head_dim, eps=norm_eps, gain=False) if qk_norm is True else None
        self.clip_qkv = clip_qkv

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        self.q_proj = linear(dim, num_heads * head_dim)
        self.k_proj = linear(dim, num_kv_heads * head_dim)
        self.v_proj = linear(dim, num_kv_heads * head_dim)
        self.o_proj = linear(num_heads * head_dim, dim)
        channels = (num_heads + 2 * num_kv_heads) * head_dim
        self.conv = ShortConvolution(channels, conv_width, device=device, dtype=dtype) if conv_width else None
        for name, heads in (("q_norm", num_heads), ("k_norm", num_kv_heads)):
            width = head_dim if qk_norm == "per_head" else heads * head_dim
            has_gain = isinstance(qk_norm, str)
            setattr(self, name, RMSNorm(width, eps=norm_eps, device=device, dtype=dtype) if has_gain else None)

    def make_cache(self) -> AttentionCache:
        return AttentionCache(self.attention_chunk_size)

    def flops_per_token(self, seq_len: int) -> float:
        """Four projections, and q k and p v over the keys that a token really sees, averaged over the sequence."""
        projections = (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        matrices = 2 * sum(projection.weight.numel() for projection in projections)
        return matrices + 4 * self.num_heads * self.head_dim * self.keys_of(seq_len)

    def keys_of(self, seq_len: int) -> float:
        """Keys that a query sees, averaged over seq_len positions."""
        return visible_keys(seq_len, self.attention_chunk_size)

    def cache_bytes(self, length: int, dtype: torch.dtype) -> int:
        """Keys and values of `length` tokens; a chunk-local layer never holds more than those of one chunk."""
        held = length if self.attention_chunk_size is None else min(length, self.attention_chunk_size)
        return held * 2 * self.num_kv_heads * self.head_dim * dtype.itemsize

    def forward(self, x: Tensor, cache: AttentionCache | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """x (B, L, D) -> (B, L, D); with a cache, x continues the tokens that the cache has seen.

        Args:
            attention_mask: (B, S) bool over all S tokens so far, those in the cache and x; False for padding. Padding
                changes nothing at real tokens, whatever stands there. Positions count padding too, as in transformers'
                Llama 4. The short convolution does not: it takes the real tokens as if they stood side by side.

        Raises:
            TypeError: x is no floating-point tensor, or the mask not of bool.
            ValueError: another shape, or a mask that is given to some but not all of the calls on one cache.
        """
        x, start, is_real = admit("Attention", x, self.q_proj, cache, attention_mask)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.conv is not None:
            tail = None if cache is None else cache.convolution_tail
            qkv, tail = self.conv(torch.cat((q, k, v), dim=-1), tail, is_real)
            q, k, v = qkv.split((q.size(-1), k.size(-1), v.size(-1)), dim=-1)
            if cache is not None:
                cache.convolution_tail = tail
        if self.q_norm is not None and self.k_norm is not None:
            # gains in fp32 would leave queries and keys in another dtype than values under autocast
            q = rearrange(self.q_norm(_grouped(q, self.q_norm.dim)).to(q.dtype), "b l n h -> b l (n h)")
            k = rearrange(self.k_norm(_grouped(k, self.k_norm.dim)).to(k.dtype), "b l n h -> b l (n h)")
        if self.clip_qkv is not None:
            q, k, v = (y.clamp(-self.clip_qkv, self.clip_qkv) for y in (q, k, v))
        q, k, v = (_grouped(y, self.head_dim) for y in (q, k, v))
        if self.rotary is not None or self.temperature is not None:
            positions = torch.arange(start, start + x.size(1), device=x.device)
        if self.rotary is not None:
            q, k = self.rotary(q, positions), self.rotary(k, positions)
        if self.qk_norm is not None:
            q, k = self.qk_norm(q), self.qk_norm(k)
        if self.temperature is not None:
            q = (q * self.temperature(positions)[:, None, None]).to(q.dtype)
        q, k, v = (rearrange(y, "b l n h -> b n l h") for y in (q, k, v))
        if cache is not None:
            k, v = cache.append(k, v)
        return self.o_proj(rearrange(self.attend(q, k, v, attention_mask), "b n l h -> b l (n h)"))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None) -> Tensor:
        """q (B, N, L, H), k and v (B, G, S', H) after all that is done to each alone -> (B, N, L, H)."""
        if attention_mask is None:
            return causal_attention(q, k, v, self.attention_chunk_size)
        return masked_attention(q, k, v, attention_mask, self.attention_chunk_size)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"attention_chunk_size={self.attention_chunk_size}, temperature={self.temperature}"
        )


def _grouped(x: Tensor, width: int) -> Tensor:
    """(B, L, N * H) -> (B, L, N, H) with H = width."""
    return rearrange(x, "b l (n h) -> b l n h", h=width)
