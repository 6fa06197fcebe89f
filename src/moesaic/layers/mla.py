"""Multi-head latent attention (token mixer): keys and values of all heads are made of one small vector per token."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from moesaic.layers.attention import AttentionCache, admit, causal_attention, masked_attention, visible_keys
from moesaic.layers.checks import require_dtype, require_flags, require_kinds, require_numbers, require_sizes
from moesaic.layers.norm import RMSNorm
from moesaic.layers.rotary import RotaryEmbedding

__all__ = ["MultiHeadLatentAttention"]


class MultiHeadLatentAttention(nn.Module):
    """Causal attention whose cache holds a latent and one rotated key per token, whatever the number of heads.

    DeepSeek-V2 (arXiv 2405.04434, section 2.1) and V3, as in transformers' `DeepseekV3Attention`. A token is projected
    down to a latent of R numbers and to a key of P numbers. That key carries the position, and all heads have the same.
    From the normalized latent each head makes the rest of its key, C numbers without a position, and its value. Its
    queries have both parts too, and the scores are q k / sqrt(C + P), times a `softmax_factor`.

    Decoding makes keys and values of the whole context anew from the latents, so it saves memory and not work.

    Args:
        dim: model width D.
        num_heads: N.
        kv_lora_rank: R, width of the latent.
        qk_nope_head_dim: C.
        qk_rope_head_dim: P, even.
        v_head_dim: width of a head's value, V.
        rotary: positions, of P numbers.
        q_lora_rank: width of a latent from which the queries are made, with a norm on it; None for no such.
        interleaved: whether RoPE rotates the pairs (2j, 2j + 1), as in DeepSeek's weights; False: (j, j + P / 2).
        norm_eps: of the norms of the latents.
        softmax_factor: multiplies the scores. With YaRN, DeepSeek has (0.1 m ln(factor) + 1)^2 for `mscale_all_dim` m.
        bias: whether the projections from and to the model's width have a bias; queries have it with q_lora_rank only.
    """

    q_norm: RMSNorm | None

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        rotary: RotaryEmbedding,
        q_lora_rank: int | None = None,
        interleaved: bool = True,
        norm_eps: float = 1e-6,
        softmax_factor: float = 1.0,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_sizes(dim=dim, num_heads=num_heads, kv_lora_rank=kv_lora_rank)
        require_sizes(qk_nope_head_dim=qk_nope_head_dim, qk_rope_head_dim=qk_rope_head_dim, v_head_dim=v_head_dim)
        if q_lora_rank is not None:
            require_sizes(q_lora_rank=q_lora_rank)
        require_flags(interleaved=interleaved, bias=bias)
        require_numbers(norm_eps=norm_eps)
        require_numbers(above=True, softmax_factor=softmax_factor)
        if rotary is None:
            raise TypeError("rotary=None: must be a RotaryEmbedding")
        require_kinds(RotaryEmbedding, rotary=rotary)
        require_dtype(dtype)
        if rotary.head_dim != qk_rope_head_dim:
            raise ValueError(f"rotary.head_dim={rotary.head_dim}: must equal qk_rope_head_dim={qk_rope_head_dim}")
        self.num_heads = num_heads
        self.kv_lora_rank = kv_lora_rank
        self.qk_nope_head_dim = qk_nope_head_dim
        self.qk_rope_head_dim = qk_rope_head_dim
        self.v_head_dim = v_head_dim
        self.q_lora_rank = q_lora_rank
        self.interleaved = interleaved
        self.softmax_factor = softmax_factor
        self.rotary = rotary

        def linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        queries = num_heads * (qk_nope_head_dim + qk_rope_head_dim)
        if q_lora_rank is None:
            self.q_norm, self.q_proj = None, linear(dim, queries)
        else:
            self.q_down = linear(dim, q_lora_rank, bias)
            self.q_norm = RMSNorm(q_lora_rank, eps=norm_eps, device=device, dtype=dtype)
            self.q_up = linear(q_lora_rank, queries)
        self.kv_down = linear(dim, kv_lora_rank + qk_rope_head_dim, bias)
        self.kv_norm = RMSNorm(kv_lora_rank, eps=norm_eps, device=device, dtype=dtype)
        self.kv_up = linear(kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim))
        self.o_proj = linear(num_heads * v_head_dim, dim, bias)

    def make_cache(self) -> AttentionCache:
        """A cache whose "keys" are the latents and whose "values" are the rotated keys, as of one head."""
        return AttentionCache()

    def flops_per_token(self, seq_len: int) -> float:
        """All projections once, and q k and p v over the keys that a token sees, averaged over the sequence.

        Zeros that widen values or keys do not count.
        """
        matrices = sum(2 * each.weight.numel() for each in self.children() if isinstance(each, nn.Linear))
        widths = self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim
        return matrices + 2 * self.num_heads * widths * visible_keys(seq_len)

    def cache_bytes(self, length: int, dtype: torch.dtype) -> int:
        """The latents and rotated keys of `length` tokens."""
        return length * (self.kv_lora_rank + self.qk_rope_head_dim) * dtype.itemsize

    def forward(self, x: Tensor, cache: AttentionCache | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """x (B, L, D) -> (B, L, D); with a cache, x continues the tokens that the cache has seen.

        Args:
            attention_mask: as for `Attention.forward`. Positions count padding.

        Raises:
            TypeError, ValueError: as `Attention.forward`.
        """
        x, start, _ = admit("MultiHeadLatentAttention", x, self.kv_down, cache, attention_mask)
        positions = torch.arange(start, start + x.size(1), device=x.device)
        of_rope = (self.qk_nope_head_dim, self.qk_rope_head_dim)

        q = self.q_proj(x) if self.q_norm is None else self.q_up(self.q_norm(self.q_down(x)))
        q_nope, q_rope = rearrange(q, "b l (n h) -> b l n h", n=self.num_heads).split(of_rope, dim=-1)
        q = torch.cat((q_nope, self._rotated(q_rope, positions)), dim=-1)

        latent, k_rope = self.kv_down(x).split((self.kv_lora_rank, self.qk_rope_head_dim), dim=-1)
        latent, k_rope = self.kv_norm(latent), self._rotated(k_rope[:, :, None], positions)
        if cache is not None:
            held, rotated = cache.append(latent[:, None], k_rope.transpose(1, 2))
            latent, k_rope = held[:, 0], rotated.transpose(1, 2)

        kv = rearrange(self.kv_up(latent), "b s (n h) -> b s n h", n=self.num_heads)
        k_nope, v = kv.split((self.qk_nope_head_dim, self.v_head_dim), dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, -1, self.num_heads, -1)), dim=-1)
        # kernels whose memory is linear in the length want one width, and divide the scores by its root
        width = max(q.size(-1), self.v_head_dim)
        if (factor := self.softmax_factor * math.sqrt(width / q.size(-1))) != 1:
            q = q * factor
        q, k, v = (rearrange(_widened(y, width), "b l n h -> b n l h") for y in (q, k, v))
        y = causal_attention(q, k, v) if attention_mask is None else masked_attention(q, k, v, attention_mask)
        return self.o_proj(rearrange(y[..., : self.v_head_dim], "b n l h -> b l (n h)"))

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        """(B, L, heads, P) -> the same. Halves come out interleaved, in queries and keys alike: scores do not mind."""
        if not self.interleaved:
            x = rearrange(x, "b l n (two h) -> b l n (h two)", two=2)
        return self.rotary(x, positions)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, kv_lora_rank={self.kv_lora_rank}, q_lora_rank={self.q_lora_rank}, "
            f"qk_nope_head_dim={self.qk_nope_head_dim}, qk_rope_head_dim={self.qk_rope_head_dim}, "
            f"v_head_dim={self.v_head_dim}, interleaved={self.interleaved}, softmax_factor={self.softmax_factor}"
        )


def _widened(x: Tensor, width: int) -> Tensor:
    """(..., H) with zeros up to `width`."""
    return x if x.size(-1) == width else F.pad(x, (0, width - x.size(-1)))
