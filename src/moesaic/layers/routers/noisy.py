"""Noisy top-k: exploration by noise whose size is learned."""

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.layers.checks import require_last
from moesaic.layers.parametrization import Fans, ParameterKind, Parametrization
from moesaic.layers.router import TopKRouter
from moesaic.layers.routers.arguments import TopKArguments
from moesaic.layers.routing import Routing

__all__ = ["NoisyTopKRouter"]


class NoisyTopKRouter(TopKRouter):
    """Top-k of logits with noise (Shazeer et al. 2017, arXiv 1701.06538, equations 3 to 5).

    In training a logit gets normal noise times softplus(x noise_weight), for the choice and for the score. The paper
    has normalized softmax scores. The logits of the `Routing` are those without noise. `noise_weight` begins as zeros.
    """

    def __init__(self, dim: int, num_experts: int, *, top_k: int = 1, **others: Unpack[TopKArguments]) -> None:
        super().__init__(dim, num_experts, top_k=top_k, **others)
        self.noise_weight = nn.Parameter(torch.zeros_like(self.weight))

    def initialize(self, parametrization: Parametrization) -> None:
        super().initialize(parametrization)
        nn.init.zeros_(self.noise_weight)

    def parameter_kinds(self) -> dict[str, ParameterKind]:
        return {**super().parameter_kinds(), "noise_weight": "output"}

    def fans(self) -> dict[str, Fans]:
        return {**super().fans(), "noise_weight": Fans(self.dim, self.num_experts)}

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs of training, where the noise has its matrix too."""
        return 2 * (self.weight.numel() + self.noise_weight.numel())

    def forward(self, x: Tensor, expert_ids: Tensor | None = None) -> Routing:
        """Route x (T, D), or score the experts in expert_ids (T, K') as if they had been chosen."""
        require_last(x, self.dim, "NoisyTopKRouter")
        logits = noisy = self.logits_of(x)
        if self.training:
            with torch.autocast(x.device.type, enabled=False):
                spread = F.softplus(F.linear(x.to(self.weight.dtype), self.noise_weight))
            noisy = logits + torch.randn_like(logits) * spread
        return self.decide(noisy, x.dtype, expert_ids)._replace(logits=logits)
