"""Quantile balancing: a selection bias that is solved for, rather than nudged."""

from typing import Unpack

import torch
from torch import Tensor

from moesaic.layers.checks import require_choice
from moesaic.layers.router import TopKRouter
from moesaic.layers.routers.arguments import ScoreArguments
from moesaic.layers.routers.histogram import count_values, quantiles
from moesaic.layers.routing import Routing

__all__ = ["QuantileRouter"]

BINS = 1000


class QuantileRouter(TopKRouter):
    """Top-k with a selection bias that gives each expert its quota of T K / E tokens (Kimi K3, section 2.3.3).

    A token's cutoff is its best biased score outside the top K. An expert with the bias b gets the tokens whose cutoff
    less the expert's score is below b. So after each optimizer step its bias becomes the K / E quantile of that
    difference over all tokens of the step, less the mean over experts. The quantile comes from 1000 bins (appendix D).
    Cutoffs move with the biases, so the load on frozen logits is even after a few steps.

    Args:
        score_function: "sigmoid" or "softmax", whose scores are 0 to 1.
        others: as for `TopKRouter`.
    """

    expert_bias: Tensor

    def __init__(self, dim: int, num_experts: int, *, top_k: int = 1, **others: Unpack[ScoreArguments]) -> None:
        super().__init__(dim, num_experts, top_k=top_k, expert_bias=True, **others)
        require_choice(("sigmoid", "softmax"), score_function=self.score_function)

    @torch.no_grad()
    def observe(self, routing: Routing, valid: Tensor | None) -> Tensor:
        """Counts (E, bins) of cutoffs less scores; zeros if every token has all experts."""
        scores = self.probabilities(routing.logits)
        if self.top_k == self.num_experts:
            return torch.zeros(self.num_experts, BINS, dtype=torch.int64, device=scores.device)
        cutoff = (scores + self.expert_bias).topk(self.top_k + 1, dim=-1).values[:, -1:]
        return count_values(cutoff - scores, *self._range(), BINS, valid)

    @torch.no_grad()
    def end_step(self, observed: Tensor) -> None:
        low, high = self._range()
        solved = low + (high - low) * quantiles(observed, self.top_k / self.num_experts)
        # a step without any token leaves it as it is
        self.expert_bias.copy_(torch.where(observed.sum() > 0, solved - solved.mean(), self.expert_bias))

    def _range(self) -> tuple[Tensor, Tensor]:
        """What a cutoff less a score is between."""
        return self.expert_bias.min() - 1, self.expert_bias.max() + 1
