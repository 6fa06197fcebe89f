"""Routers: which experts see a token, and with what score."""

from collections.abc import Callable
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.layers.checks import (
    require_choice,
    require_dtype,
    require_flags,
    require_last,
    require_numbers,
    require_sizes,
)
from moesaic.layers.parametrization import Fans, ParameterKind, Parametrization
from moesaic.layers.routing import Routing, at_least_fp32

__all__ = ["ScoreFunction", "TopKRouter"]

ScoreFunction = Literal["sigmoid", "softmax", "sqrt_softplus"]


class TopKRouter(nn.Module):
    """Linear router that picks the top_k experts of each token.

    "sigmoid" (Llama 4): score = sigmoid(logit) of the chosen expert, not normalized. "softmax" (Switch, Mixtral,
    Qwen): softmax over all experts; `normalize_scores` divides by the sum over the chosen ones. Both together are the
    softmax over the chosen logits alone (gpt-oss). "sqrt_softplus" is the square root of softplus (DeepSeek-V4).

    With `expert_bias`, a buffer `expert_bias` (E,) is added to the scores for the selection only (Wang et al. 2024,
    arXiv 2408.15664, loss-free balancing); the returned scores stay without it. Training moves it with
    `moesaic.losses.balance.update_expert_bias`; the router itself never does.

    The logits are computed in the dtype of `weight`, also under autocast: near-ties decided in bf16 would differ
    from those decided in fp32.

    Args:
        dim: model width D.
        num_experts: E.
        top_k: K, at most E.
        scale: multiplies the scores at the end (DeepSeek-V3's routed_scaling_factor).
        bias: adds a learned bias to the logits (gpt-oss).
    """

    expert_bias: Tensor | None
    bias: nn.Parameter | None

    causal: ClassVar[bool] = True
    """Whether no token's experts and scores depend on later tokens of its sequence."""
    depends_on_batch: ClassVar[bool] = False
    """Whether a token's experts or scores depend on the other sequences of its batch."""

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        top_k: int = 1,
        score_function: ScoreFunction = "sigmoid",
        normalize_scores: bool = False,
        expert_bias: bool = False,
        scale: float = 1.0,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_sizes(dim=dim, num_experts=num_experts, top_k=top_k)
        require_flags(normalize_scores=normalize_scores, expert_bias=expert_bias, bias=bias)
        require_numbers(above=True, scale=scale)
        require_dtype(dtype)
        require_choice(get_args(ScoreFunction), score_function=score_function)
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k}: must be 1 to num_experts={num_experts}")
        if normalize_scores and top_k == 1:
            raise ValueError("normalize_scores=True: with top_k=1 every score is 1 and the router never learns")
        self.dim = dim
        self.num_experts = num_experts
        self.top_k = top_k
        self.score_function = score_function
        self.normalize_scores = normalize_scores
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None
        # fp32 whatever the model's dtype: its steps of about 1e-3 would be lost in bf16
        moved = torch.zeros(num_experts, device=device, dtype=torch.float32) if expert_bias else None
        self.register_buffer("expert_bias", moved)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.dim**-0.5)
        for each in (self.bias, self.expert_bias):
            if each is not None:
                nn.init.zeros_(each)

    def initialize(self, parametrization: Parametrization) -> None:
        nn.init.normal_(self.weight, std=parametrization.std("output", self.dim))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def parameter_kinds(self) -> dict[str, ParameterKind]:
        return {"weight": "output"}

    def fans(self) -> dict[str, Fans]:
        return {"weight": Fans(self.dim, self.num_experts)}

    def flops_per_token(self, seq_len: int) -> float:
        return 2 * self.weight.numel()

    @property
    def experts_per_token(self) -> float | None:
        """K, or None if only running it can tell."""
        return None if self.may_skip else self.top_k

    @property
    def may_skip(self) -> bool:
        """Whether `MoE` has to look for slots without an expert: only a `select` of somebody else may leave some."""
        return not type(self).select.__module__.startswith("moesaic.layers.")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TopKRouter":
        """`.to(bfloat16)` and the like leave a bias or a threshold in fp32, where its small steps are not lost."""
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                self._buffers[name] = buffer.float()
        return self

    def forward(self, x: Tensor, expert_ids: Tensor | None = None) -> Routing:
        """Route x (T, D), or score the experts in expert_ids (T, K') as if they had been chosen."""
        require_last(x, self.dim, type(self).__name__)
        return self.decide(self.logits_of(x), x.dtype, expert_ids)

    def logits_of(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, E), in the dtype of the weight."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.weight.dtype), self.weight, self.bias)

    def decide(self, logits: Tensor, dtype: torch.dtype, expert_ids: Tensor | None) -> Routing:
        """Choose experts by the logits (T, E), unless they are given, and score them in `dtype`."""
        probabilities = self.probabilities(logits)
        is_given = expert_ids is not None
        if expert_ids is None:
            expert_ids = self.select(logits, probabilities)
        if is_given or self.may_skip:
            is_none = expert_ids == self.num_experts
            scores = probabilities.gather(1, expert_ids.masked_fill(is_none, 0)).masked_fill(is_none, 0)
        else:
            scores = probabilities.gather(1, expert_ids)
        if self.normalize_scores:
            # clamped: sigmoids of very negative logits are all 0
            scores = scores / scores.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
        if self.scale != 1:
            scores = scores * self.scale
        return Routing(logits, scores.to(dtype), expert_ids)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Scores of all experts (T, E), from which those of the chosen ones are taken; in fp32 or fp64."""
        precise = at_least_fp32(logits)
        if self.score_function == "softmax":
            return precise.softmax(dim=-1)
        return precise.sigmoid() if self.score_function == "sigmoid" else F.softplus(precise).clamp(min=1e-38).sqrt()

    def select(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        """Expert ids (T, K) from logits and probabilities (T, E); the place to override for another selection."""
        # logits, not probabilities, where there is no bias: a sigmoid saturates into ties
        ranking = (logits if self.expert_bias is None else probabilities + self.expert_bias).detach()
        if self.top_k == 1:  # three times faster on CPUs
            return ranking.max(dim=-1, keepdim=True).indices
        return ranking.topk(self.top_k, dim=-1).indices

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, num_experts={self.num_experts}, top_k={self.top_k}, {self.score_function}, "
            f"expert_bias={self.expert_bias is not None}"
        )
