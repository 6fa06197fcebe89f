"""Sinkhorn routing: the batch decides on a bias that makes the soft loads even."""

import math
from typing import Unpack

import torch
from torch import Tensor

from moesaic.layers.checks import require_sizes
from moesaic.layers.router import TopKRouter
from moesaic.layers.routers.arguments import ScoreArguments

__all__ = ["SinkhornRouter"]


class SinkhornRouter(TopKRouter):
    """Top-k of logits that Sinkhorn iterations have balanced over the batch (S-BASE, Clark et al. 2022, 2202.01169).

    In training exp(logits) is scaled by rows and columns until each token gives 1 and each expert gets T / E. A factor
    of a row leaves its ranking, so what is left is a bias for each expert. Scores are those of the logits themselves.
    In evaluation it is plain top-k, and then causal. Padding takes part in training.

    Args:
        iterations: how often rows and columns are scaled.
        others: as for `TopKRouter`, but without a selection bias.
    """

    causal = False
    depends_on_batch = True

    def __init__(
        self, dim: int, num_experts: int, *, top_k: int = 1, iterations: int = 8, **others: Unpack[ScoreArguments]
    ) -> None:
        require_sizes(iterations=iterations)
        super().__init__(dim, num_experts, top_k=top_k, expert_bias=False, **others)
        self.iterations = iterations

    @torch.no_grad()
    def select(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        if self.training and logits.size(0):
            logits = logits + balancing_bias(logits, self.iterations)
        return super().select(logits, probabilities)


def balancing_bias(logits: Tensor, iterations: int) -> Tensor:
    """(E,), the logarithms of the columns' factors for exp(logits) (T, E)."""
    share = math.log(logits.size(0) / logits.size(1))
    bias = torch.zeros_like(logits[0])
    for _ in range(iterations):
        rows = -(logits + bias).logsumexp(dim=1, keepdim=True)
        bias = share - (logits + rows).logsumexp(dim=0)
    return bias
