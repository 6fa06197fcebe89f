"""Hash routing: the token's id says which experts see it."""

from typing import Unpack

import torch
from torch import Tensor

from moesaic.layers.checks import require_last, require_sizes
from moesaic.layers.parametrization import Parametrization
from moesaic.layers.router import TopKRouter
from moesaic.layers.routers.arguments import ScoreArguments
from moesaic.layers.routing import Routing

__all__ = ["HashRouter"]


class HashRouter(TopKRouter):
    """A fixed table gives each token id its experts (Roller et al. 2021, arXiv 2106.04426); only scores are learned.

    DeepSeek-V4 (arXiv 2606.19348) has it in its first MoE layers, with normalized sqrt_softplus scores. The table
    `token_experts` (V, K) is drawn with the weights, K different experts for each id, and is part of the state dict.

    Args:
        vocab_size: V.
        others: as for `TopKRouter`, but without a selection bias.
    """

    token_experts: Tensor

    def __init__(
        self, dim: int, num_experts: int, *, top_k: int = 1, vocab_size: int, **others: Unpack[ScoreArguments]
    ) -> None:
        require_sizes(vocab_size=vocab_size)
        super().__init__(dim, num_experts, top_k=top_k, expert_bias=False, **others)
        self.vocab_size = vocab_size
        table = torch.empty(vocab_size, top_k, dtype=torch.int64, device=self.weight.device)
        self.register_buffer("token_experts", table)
        self._draw()

    def initialize(self, parametrization: Parametrization) -> None:
        super().initialize(parametrization)
        self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        if not self.token_experts.is_meta:
            drawn = torch.rand(self.vocab_size, self.num_experts, device=self.token_experts.device)
            self.token_experts.copy_(drawn.topk(self.top_k, dim=-1).indices)

    @property
    def may_skip(self) -> bool:
        return False

    def forward(self, x: Tensor, expert_ids: Tensor | None = None, token_ids: Tensor | None = None) -> Routing:
        """Route x (T, D) by token_ids (T,) int64, or score the experts in expert_ids (T, K') instead.

        Raises:
            ValueError: neither is given.
        """
        require_last(x, self.dim, "HashRouter")
        if expert_ids is None:
            if token_ids is None:
                raise ValueError(
                    "HashRouter: token_ids=None: must be the ids (T,) of the tokens; Decoder hands them to its layers, "
                    "MoE takes them as forward(x, token_ids=...)"
                )
            expert_ids = self.token_experts[token_ids]
        return self.decide(self.logits_of(x), x.dtype, expert_ids)
