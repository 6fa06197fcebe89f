"""Expert choice: experts take tokens."""

from typing import Unpack

import torch
from torch import Tensor

from moesaic.layers.routers.arguments import ScoreArguments
from moesaic.layers.routers.variable import VariableRouter

__all__ = ["ExpertChoiceRouter"]


class ExpertChoiceRouter(VariableRouter):
    """Each expert takes its T K / E best tokens of the batch (Zhou et al. 2022, arXiv 2202.09368).

    The load is even by construction. A token's experts depend on all other tokens, later ones included: a decoder that
    trains with it sees the future, and decodes otherwise than it trained. It is here as the bad example. Padding takes
    part in the choice.
    """

    causal = False
    depends_on_batch = True

    def __init__(self, dim: int, num_experts: int, *, top_k: int = 1, **others: Unpack[ScoreArguments]) -> None:
        super().__init__(dim, num_experts, top_k=top_k, expert_bias=False, **others)

    def choose(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        tokens = logits.size(0)
        quota = min(tokens, max(1, tokens * self.top_k // self.num_experts))
        # sorted by logit where that ranks tokens alike: a sigmoid saturates into ties
        ranking = logits if self.score_function != "softmax" else probabilities
        taken = ranking.topk(quota, dim=0).indices
        return torch.zeros_like(logits, dtype=torch.bool).scatter(0, taken, True)
