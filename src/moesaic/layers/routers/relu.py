"""ReLU routing: an expert sees a token if its logit is positive."""

from typing import Unpack

import torch
from torch import Tensor

from moesaic.layers.checks import require_numbers
from moesaic.layers.routers.arguments import LinearArguments
from moesaic.layers.routers.variable import VariableRouter
from moesaic.layers.routing import Routing, at_least_fp32, count_tokens

__all__ = ["ReluRouter"]


class ReluRouter(VariableRouter):
    """Score = relu(logit), and every expert with a positive one is used (ReMoE, Wang et al. 2024, arXiv 2412.14711).

    It is differentiable everywhere, also in the choice. An L1 loss on the scores keeps the number of experts at top_k
    in the mean. An expert's part in it is weighted by its load. Its coefficient `sparsity_weight` is multiplied or
    divided by `growth` after each optimizer step, as tokens have more or fewer than top_k experts. Here each layer has
    its own; in the paper all layers share one. At first about half of all experts are used.

    Args:
        top_k: K, the mean number of experts of a token.
        growth: how fast the coefficient follows; 1.2 in the paper.
        initial_weight: the coefficient at first; 1e-8 in the paper.
        others: as for `TopKRouter`.
    """

    sparsity_weight: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        top_k: int = 1,
        growth: float = 1.2,
        initial_weight: float = 1e-8,
        **others: Unpack[LinearArguments],
    ) -> None:
        require_numbers(1.0, growth=growth)
        require_numbers(above=True, initial_weight=initial_weight)
        super().__init__(
            dim,
            num_experts,
            top_k=top_k,
            score_function="sigmoid",
            normalize_scores=False,
            expert_bias=False,
            **others,
        )
        self.growth = growth
        weight = torch.full((), initial_weight, device=self.weight.device, dtype=torch.float32)
        self.register_buffer("sparsity_weight", weight)

    def probabilities(self, logits: Tensor) -> Tensor:
        return at_least_fp32(logits).relu()

    def choose(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        return logits > 0

    def auxiliary_loss(self, routing: Routing, valid: Tensor | None, num_valid: Tensor | int) -> Tensor:
        """The L1 loss of some tokens, weighted, as their share of the sum over all `num_valid` tokens of the step."""
        scores = self.probabilities(routing.logits)
        load = count_tokens(routing.expert_ids, self.num_experts, valid).to(scores)
        if valid is not None:
            scores = scores.masked_fill(~valid[:, None], 0)
        # E / (K T) times its tokens: 1 for an expert with its quota
        counted = scores.size(0) if valid is None else valid.sum()
        weights = load * self.num_experts / self.top_k / torch.as_tensor(counted).clamp(min=1)
        return self.sparsity_weight * (scores * weights).sum() / num_valid

    @torch.no_grad()
    def observe(self, routing: Routing, valid: Tensor | None) -> Tensor:
        """Two counts: experts of tokens, and tokens."""
        counts = count_tokens(routing.expert_ids, self.num_experts, valid)
        tokens = routing.logits.size(0) if valid is None else valid.sum()
        return torch.stack((counts.sum(), torch.as_tensor(tokens, device=counts.device)))

    @torch.no_grad()
    def end_step(self, observed: Tensor) -> None:
        chosen, tokens = observed
        self.sparsity_weight *= self.growth ** torch.sign(chosen - tokens * self.top_k)
