"""Expert-threshold routing: expert choice without looking at other tokens."""

from typing import Unpack

import torch
from torch import Tensor

from moesaic.layers.checks import require_numbers
from moesaic.layers.routers.arguments import LinearArguments
from moesaic.layers.routers.histogram import count_values, quantiles
from moesaic.layers.routers.variable import VariableRouter
from moesaic.layers.routing import Routing

__all__ = ["ThresholdRouter"]

BINS = 4096


class ThresholdRouter(VariableRouter):
    """Each expert takes every token whose score exceeds its threshold (Expert Threshold routing, arXiv 2603.11535).

    A threshold is a running mean over optimizer steps of the score that T K / E tokens of the step exceed. So an expert
    has its quota in the mean, and no token needs to know of another. Before the first step tokens have their top K.

    The scores are sigmoids, which do not depend on other experts. Quantiles come from 4096 bins between 0 and 1.

    Args:
        top_k: K, the mean number of experts of a token that thresholds aim at.
        decay: what is left of a threshold in the running mean after one step.
        others: as for `TopKRouter`.
    """

    thresholds: Tensor
    steps: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        top_k: int = 1,
        decay: float = 0.9,
        **others: Unpack[LinearArguments],
    ) -> None:
        require_numbers(decay=decay)
        if decay >= 1:
            raise ValueError(f"decay={decay}: must be a number >= 0 and < 1")
        super().__init__(
            dim,
            num_experts,
            top_k=top_k,
            score_function="sigmoid",
            normalize_scores=False,
            expert_bias=False,
            **others,
        )
        self.decay = decay
        self.register_buffer("thresholds", torch.zeros(num_experts, device=self.weight.device, dtype=torch.float32))
        self.register_buffer("steps", torch.zeros((), device=self.weight.device, dtype=torch.int64))

    def choose(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        best = logits.topk(self.top_k, dim=-1).indices
        is_best = torch.zeros_like(logits, dtype=torch.bool).scatter(1, best, True)
        return torch.where(self.steps > 0, probabilities > self.thresholds, is_best)

    @torch.no_grad()
    def observe(self, routing: Routing, valid: Tensor | None) -> Tensor:
        """Counts (E, bins) of scores."""
        return count_values(self.probabilities(routing.logits), 0.0, 1.0, BINS, valid)

    @torch.no_grad()
    def end_step(self, observed: Tensor) -> None:
        found = quantiles(observed, 1 - self.top_k / self.num_experts)
        running = torch.where(self.steps > 0, self.decay * self.thresholds + (1 - self.decay) * found, found)
        is_any = observed.sum() > 0
        self.thresholds.copy_(torch.where(is_any, running, self.thresholds))
        self.steps += is_any
