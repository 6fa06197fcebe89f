"""Routers that choose without looking at the tokens: for benchmarks, and as arms to compare with."""

import torch
from torch import Tensor

from moesaic.layers.router import TopKRouter

__all__ = ["UniformRouter"]


class UniformRouter(TopKRouter):
    """Sends token t to experts t*K, t*K + 1, ... modulo E, whatever the logits say: perfectly balanced.

    Scores still come from the logits, so every gradient exists. A token's place in the batch decides, and nothing else.
    """

    depends_on_batch = True

    def select(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        slots = torch.arange(logits.size(0) * self.top_k, device=logits.device)
        return (slots % self.num_experts).view(-1, self.top_k)
