"""Experts in groups, of which a token may use few: DeepSeek's group-limited and node-limited top-k."""

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.layers.checks import require_sizes
from moesaic.layers.router import TopKRouter
from moesaic.layers.routers.arguments import TopKArguments
from moesaic.layers.routing import at_least_fp32

__all__ = ["GroupLimitedRouter"]


class GroupLimitedRouter(TopKRouter):
    """The top_k experts within the best groups (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    Experts next to each other are a group, such as those of one node. A group is worth the sum of its best experts'
    scores, selection bias included. DeepSeek-V3 has sigmoid scores, normalized, times a `scale` of 2.5.

    Args:
        num_groups: into how many groups the experts are divided evenly.
        top_groups: how many groups a token may use.
        scored_by: how many experts a group is judged by: 2 in DeepSeek-V3, 1 in DeepSeek-V2.
        others: as for `TopKRouter`.

    Raises:
        ValueError: groups that do not divide the experts, or too few experts in the groups of a token.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        top_k: int = 1,
        num_groups: int,
        top_groups: int,
        scored_by: int = 2,
        **others: Unpack[TopKArguments],
    ) -> None:
        super().__init__(dim, num_experts, top_k=top_k, **others)
        require_sizes(num_groups=num_groups, top_groups=top_groups, scored_by=scored_by)
        if num_experts % num_groups:
            raise ValueError(f"num_groups={num_groups}: must divide num_experts={num_experts}")
        size = num_experts // num_groups
        if top_groups > num_groups:
            raise ValueError(f"top_groups={top_groups}: must be 1 to num_groups={num_groups}")
        if top_k > top_groups * size:
            raise ValueError(f"top_k={top_k}: must be at most {top_groups * size}, the experts of {top_groups} groups")
        if scored_by > size:
            raise ValueError(f"scored_by={scored_by}: must be 1 to {size}, the experts of a group")
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.scored_by = scored_by

    def logits_of(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, E), in fp32 or fp64 whatever the dtype of the weight, as DeepSeek's code."""
        bias = None if self.bias is None else at_least_fp32(self.bias)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(at_least_fp32(x), at_least_fp32(self.weight), bias)

    def select(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        ranking = probabilities.detach()
        if self.expert_bias is not None:
            ranking = ranking + self.expert_bias
        grouped = ranking.unflatten(1, (self.num_groups, -1))
        best = grouped.topk(self.scored_by, dim=-1).values.sum(dim=-1).topk(self.top_groups, dim=-1).indices
        is_out = best.new_ones(grouped.shape[:2]).scatter(1, best, 0).bool()
        return grouped.masked_fill(is_out[:, :, None], -float("inf")).flatten(1).topk(self.top_k, dim=-1).indices

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.top_groups} of {self.num_groups} groups, scored_by={self.scored_by}"
