"""A mixture of experts the obvious way: every expert on every token, mixed by the scores. Slow, and easy to believe."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Expert", "ReferenceScore", "dense_moe", "gated_expert"]

Expert = Callable[[int, Tensor], Tensor]
"""`expert(e, rows)`: rows (T, D) through expert e -> (T, D)."""

ReferenceScore = Literal["sigmoid", "softmax", "sqrt_softplus", "relu"]


def gated_expert(gate_up: Tensor, down: Tensor, activation: Callable[[Tensor], Tensor] = F.silu) -> Expert:
    """Gated experts without biases from stacked weights: gate_up (E, D, 2F), gate first, and down (E, F, D)."""

    def run(e: int, rows: Tensor) -> Tensor:
        gate, up = (rows @ gate_up[e]).chunk(2, dim=-1)
        return (activation(gate) * up) @ down[e]

    return run


def dense_moe(
    x: Tensor,
    router_weight: Tensor,
    expert: Expert,
    *,
    top_k: int,
    score_function: ReferenceScore = "softmax",
    normalize_scores: bool = False,
    score_before_experts: bool = False,
    scale: float = 1.0,
    router_bias: Tensor | None = None,
    expert_bias: Tensor | None = None,
    expert_ids: Tensor | None = None,
    router_input: Tensor | None = None,
    shared_expert: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The sum over a token's experts e of score_e * expert_e(token), plus the shared expert's output.

    Args:
        x: (T, D).
        router_weight: (E, D); logits are x @ router_weight.T.
        expert: see `gated_expert`; write your own for experts with biases or another shape.
        normalize_scores: divide the scores of the chosen experts by their sum.
        score_before_experts: expert_e(score_e * token) instead (Llama 4).
        scale: multiplies the scores at the end.
        router_bias: (E,), added to the logits.
        expert_bias: (E,), added to the scores for the selection only (Wang et al. 2024, arXiv 2408.15664). Without
            it, the logits are ranked.
        expert_ids: (T, K) int64, the experts of each token in place of the top_k best, each at most once; E is none.
        router_input: what the router's weight multiplies, if that is not x.

    Returns:
        (T, D).
    """
    logits = (x if router_input is None else router_input) @ router_weight.T
    if router_bias is not None:
        logits = logits + router_bias
    probabilities = _scores(logits, score_function)
    if expert_ids is None:
        ranking = logits if expert_bias is None else probabilities + expert_bias
        expert_ids = ranking.topk(top_k, dim=-1).indices
    with_none = torch.zeros(logits.size(0), logits.size(1) + 1, dtype=torch.bool, device=x.device)
    chosen = with_none.scatter(1, expert_ids, True)[:, :-1]
    scores = probabilities.masked_fill(~chosen, 0.0)
    if normalize_scores:
        scores = scores / scores.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    scores = scores * scale
    y = torch.zeros_like(x) if shared_expert is None else shared_expert(x)
    for e in range(router_weight.size(0)):
        score = scores[:, e, None]
        out = expert(e, x * score) if score_before_experts else expert(e, x) * score
        y = y + out * chosen[:, e, None]  # an expert with biases makes something of a zero input as well
    return y


def _scores(logits: Tensor, function: ReferenceScore) -> Tensor:
    if function == "softmax":
        return logits.softmax(dim=-1)
    if function == "sigmoid":
        return logits.sigmoid()
    return logits.relu() if function == "relu" else F.softplus(logits).sqrt()
