"""Mixtures of experts, one row, one expert and one slot at a time. Slow and obvious."""

from collections.abc import Sequence

import torch
from torch import Tensor

Expert = tuple[Tensor, Tensor, Tensor]
"""Gate (D, F), up (D, F) and down (F, D)."""


def expert(x: Tensor, weights: Expert) -> Tensor:
    """x (D,) -> (D,), with SwiGLU."""
    gate, up, down = weights
    hidden = [torch.nn.functional.silu(x @ gate[:, j]) * (x @ up[:, j]) for j in range(gate.size(1))]
    return torch.stack(hidden) @ down


def experts(
    rows: Tensor, rows_per_expert: Sequence[int], weights: Sequence[Expert], gain: Tensor | None = None, eps: float = 0
) -> Tensor:
    """rows (R, D) sorted by expert -> (R, D); with a gain (D,), each result is scaled by it and then normalized."""
    made, waiting = [], list(rows)
    for number, each in zip(rows_per_expert, weights, strict=True):
        for _ in range(number):
            y = expert(waiting.pop(0), each)
            if gain is not None:
                scaled = gain * y
                y = scaled / (scaled.square().mean() + eps).sqrt()
            made.append(y)
    return torch.stack(made) if made else rows


def soft_moe(x: Tensor, phi: Tensor, scale: Tensor, weights: Sequence[Expert], slots: int) -> Tensor:
    """x (B, L, D), phi (D, E * slots) -> (B, L, D): equations 1 to 3 of the paper, normalized as in its section 2.3."""
    outputs = []
    for tokens in x:
        logits = torch.stack([scale * (t / t.norm()) @ (phi / phi.norm(dim=0)) for t in tokens])
        made = []
        for s in range(phi.size(1)):
            into = logits[:, s].exp() / logits[:, s].exp().sum()
            mean = sum(weight * token for weight, token in zip(into, tokens, strict=True))
            made.append(expert(mean, weights[s // slots]))
        for t in range(len(tokens)):
            out = logits[t].exp() / logits[t].exp().sum()
            outputs.append(sum(weight * y for weight, y in zip(out, made, strict=True)))
    return torch.stack(outputs).view_as(x)
