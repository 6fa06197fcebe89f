"""Experts without weights, which cost nothing: those that return their input, and those that return zero."""

import torch
from torch import Tensor, nn

from moesaic.layers.checks import is_shape_only, require_sizes
from moesaic.layers.part import flops_per_token

__all__ = ["FreeExperts"]


class FreeExperts(nn.Module):
    """Experts, followed by some that compute nothing, so that the router decides how much work a token is worth.

    The ids of `experts` come first. Then come `identity` ones, which return their rows (LongCat-Flash, arXiv
    2509.01322), and `skip` ones, which return zeros (ZAYA1, arXiv 2511.17127). With the score of its row, an identity
    expert adds score * x to the output. All of them have logits, scores and a load as any other expert.

    The rows are cut at a place that the host has to wait for.

    Args:
        experts: the ones with weights, E of them; anything that `MoE` takes.
        identity: how many return their rows.
        skip: how many return zeros.
    """

    def __init__(self, experts: nn.Module, *, identity: int = 0, skip: int = 0) -> None:
        super().__init__()
        require_sizes(0, identity=identity, skip=skip)
        self.experts = experts
        self.identity = identity
        self.skip = skip
        self.with_weights = int(experts.num_experts)  # type: ignore[arg-type]
        self.num_experts = self.with_weights + identity + skip
        self.dim = int(experts.dim)  # type: ignore[arg-type]

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs of one row, in the mean over all experts: as if they had equal loads."""
        rows = [seq_len // self.with_weights + (i < seq_len % self.with_weights) for i in range(self.with_weights)]
        evenly = torch.tensor(rows, device="cpu")
        of_one = flops_per_token(self.experts, seq_len, seq_len, self.dim, further=(evenly,))
        shared_by = self.with_weights if of_one.source == "assumed" else 1
        return of_one.per_token / shared_by * self.with_weights / self.num_experts

    def forward(self, rows: Tensor, rows_per_expert: Tensor) -> Tensor:
        """rows (R, D) sorted by expert, rows_per_expert (E + identity + skip,) int64 that sums to R -> (R, D)."""
        if is_shape_only(rows_per_expert):
            worked = rows.size(0) * self.with_weights // self.num_experts
            kept = rows.size(0) * (self.with_weights + self.identity) // self.num_experts
        else:
            ends = rows_per_expert.cumsum(dim=0)[[self.with_weights - 1, self.with_weights + self.identity - 1]]
            worked, kept = ends.tolist()
        done = self.experts(rows[:worked], rows_per_expert[: self.with_weights])
        return torch.cat((done, rows[worked:kept], torch.zeros_like(rows[kept:])))

    def extra_repr(self) -> str:
        return f"identity={self.identity}, skip={self.skip}"
