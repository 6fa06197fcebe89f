"""Experts of different widths in one layer."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moesaic.layers.backend_choice import BackendName
from moesaic.layers.checks import is_shape_only, require_last, require_sizes
from moesaic.layers.experts import Experts
from moesaic.layers.feed_forward import ActivationName

__all__ = ["UnequalExperts"]


class UnequalExperts(nn.Module):
    """Gated FFNs of different widths, so that the router also decides how much work a token is worth.

    Neighbors of equal width are one stack of `Experts`. The rows are cut between stacks at places that the host has to
    wait for (Wang et al. 2024, HMoE, arXiv 2408.10681).

    Args:
        dim: model width D.
        hidden_dims: width F of each of the E experts, in the order of their ids.
        num_experts: E, if it is known elsewhere too.
        activation: a name in `ACTIVATIONS`.
        backend: as of `Experts`.
    """

    def __init__(
        self,
        dim: int,
        hidden_dims: Sequence[int],
        *,
        num_experts: int | None = None,
        activation: ActivationName = "silu",
        backend: BackendName = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(hidden_dims, str) or not isinstance(hidden_dims, Sequence) or not hidden_dims:
            raise TypeError(f"hidden_dims={hidden_dims!r}: must be a list of widths, one for each expert")
        for i, width in enumerate(hidden_dims):
            require_sizes(**{f"hidden_dims[{i}]": width})
        if num_experts not in (None, len(hidden_dims)):
            raise ValueError(
                f"hidden_dims={list(hidden_dims)}: {len(hidden_dims)} widths; must be one for each of "
                f"num_experts={num_experts}"
            )
        self.dim = dim
        self.hidden_dims = tuple(int(width) for width in hidden_dims)
        self.num_experts = len(self.hidden_dims)
        runs = [(width, len(list(each))) for width, each in itertools.groupby(self.hidden_dims)]
        self.stacks = nn.ModuleList(
            Experts(count, dim, width, activation=activation, backend=backend, device=device, dtype=dtype)
            for width, count in runs
        )

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs of one row, in the mean over all experts: as if they had equal loads."""
        return self.flops_of([1] * self.num_experts) / self.num_experts

    def flops_of(self, rows_per_expert: Sequence[float]) -> float:
        """FLOPs of so many rows in each expert."""
        widths = zip(rows_per_expert, self.hidden_dims, strict=True)
        return 6.0 * self.dim * sum(number * width for number, width in widths)

    def forward(self, rows: Tensor, rows_per_expert: Tensor) -> Tensor:
        """rows (R, D) sorted by expert, rows_per_expert (E,) int64 that sums to R -> (R, D)."""
        require_last(rows, self.dim, "UnequalExperts")
        counts = rows_per_expert.split([int(stack.num_experts) for stack in self.stacks])  # type: ignore[arg-type]
        if is_shape_only(rows_per_expert):  # as if loads were equal
            ends = [0, *itertools.accumulate(rows.size(0) * each.numel() // self.num_experts for each in counts)]
            sizes = [*(b - a for a, b in itertools.pairwise(ends[:-1])), rows.size(0) - ends[-2]]
        else:
            sizes = torch.stack([each.sum() for each in counts]).tolist()
        parts = zip(self.stacks, rows.split(sizes), counts, strict=True)
        return torch.cat([stack(x, number) for stack, x, number in parts])

    def extra_repr(self) -> str:
        return f"{self.num_experts}, dim={self.dim}, hidden_dims={list(self.hidden_dims)}"
