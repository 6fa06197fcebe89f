"""Attention with every option, one query and one key at a time. Slow and obvious."""

import math

import torch
from torch import Tensor


def masked_attention(q: Tensor, k: Tensor, v: Tensor, chunk: int | None) -> Tensor:
    """q (B, N, L, H), k and v (B, G, S, H): the queries are the last L of the S positions; an explicit mask matrix."""
    queries, keys = q.size(2), k.size(2)
    mask = torch.zeros(queries, keys, dtype=torch.bool)
    for i in range(queries):
        position = keys - queries + i
        for j in range(keys):
            mask[i, j] = j <= position and (chunk is None or j // chunk == position // chunk)
    heads = []
    for n in range(q.size(1)):
        g = n // (q.size(1) // k.size(1))
        logits = torch.einsum("bqh,bkh->bqk", q[:, n], k[:, g]) / math.sqrt(q.size(3))
        heads.append(torch.softmax(logits.masked_fill(~mask, -torch.inf), dim=-1) @ v[:, g])
    return torch.stack(heads, dim=1)


def attention(
    weights: dict[str, Tensor],
    x: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    theta: float | None = None,
    qk_norm_eps: float | None = None,
    chunk: int | None = None,
    temperature: tuple[float, int] | None = None,
    gain_norm: str | None = None,
    clip: float = math.inf,
) -> Tensor:
    """x (B, L, D) -> (B, L, D); `weights` as in the state dict, convolution included if it is there."""
    batch, length, _ = x.shape

    def project(name: str, y: Tensor) -> Tensor:
        return y @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", torch.zeros((), dtype=x.dtype))

    qkv = torch.cat([project(f"{name}_proj", x) for name in "qkv"], dim=-1)
    if "conv.weight" in weights:
        convolved = []
        for t in range(length):
            y = qkv[:, t]
            for i in range(min(weights["conv.weight"].size(0), t + 1)):
                y = y + weights["conv.weight"][i] * qkv[:, t - i]
            convolved.append(y)
        qkv = torch.stack(convolved, dim=1)

    if gain_norm is not None:
        queries, keys, values = qkv.split([num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim], -1)
        normalized = []
        for name, y in (("q_norm", queries), ("k_norm", keys)):
            for part in y.split(head_dim, dim=-1) if gain_norm == "per_head" else [y]:
                mean_square = part.square().mean(-1, keepdim=True)
                normalized.append(part / (mean_square + 0.1).sqrt() * weights[f"{name}.weight"])
        qkv = torch.cat([*normalized, values], dim=-1)
    qkv = torch.where(qkv > clip, clip, torch.where(qkv < -clip, -clip, qkv))

    columns = qkv.split(head_dim, dim=-1)  # one (B, L, H) per head: queries, keys, values
    heads = []
    for n, head in enumerate(columns):
        is_query, is_key = n < num_heads, num_heads <= n < num_heads + num_kv_heads
        rows = []
        for t in range(length):
            y = head[:, t]
            if theta is not None and (is_query or is_key):
                y = _rotate(y, t, theta)
            if qk_norm_eps is not None and (is_query or is_key):
                y = y / (y.square().mean(-1, keepdim=True) + qk_norm_eps).sqrt()
            if temperature is not None and is_query:
                scale, floor = temperature
                y = y * float(1 + scale * torch.log1p(torch.tensor((t + 1) // floor, dtype=torch.float32)))
            rows.append(y)
        heads.append(torch.stack(rows, dim=1))
    q, k = heads[:num_heads], heads[num_heads : num_heads + num_kv_heads]
    v = heads[num_heads + num_kv_heads :]
    out = masked_attention(torch.stack(q, 1), torch.stack(k, 1), torch.stack(v, 1), chunk)
    return project("o_proj", out.transpose(1, 2).reshape(batch, length, -1))


def _rotate(y: Tensor, t: int, theta: float) -> Tensor:
    width = y.size(-1)
    angles = t * (1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
    turn = torch.complex(angles.cos().to(y.dtype), angles.sin().to(y.dtype))
    pairs = torch.complex(y[..., 0::2], y[..., 1::2]) * turn
    return torch.stack((pairs.real, pairs.imag), dim=-1).flatten(-2)
