"""Experts with a norm on their output."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.layers.backend_choice import BackendName
from moesaic.layers.checks import require_numbers
from moesaic.layers.experts import Experts
from moesaic.layers.feed_forward import ActivationName

__all__ = ["NormedExperts"]


class NormedExperts(nn.Module):
    """Gated experts whose outputs are normalized before the router's scores weigh them, as in Muse Spark.

    y = z / sqrt(mean(z^2) + eps) with z = (1 + w) expert(x). The gain 1 + w (D,) is one for all experts and multiplies
    before the norm, so it sets the share of each feature and not its size. `norm_weight` is w, zero at first. Scores
    must come behind these experts: of a score on their input the norm would leave almost nothing.

    Args:
        num_experts: E.
        dim: model width D.
        hidden_dim: width F of each expert.
        norm_eps: added to the mean square.
        activation: a name in `ACTIVATIONS`.
        backend: as of `Experts`.
    """

    normalizes_output = True
    """`MoE` refuses scores on the input of such experts."""

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        *,
        norm_eps: float = 1e-5,
        activation: ActivationName = "silu",
        backend: BackendName = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_numbers(above=True, norm_eps=norm_eps)
        self.experts = Experts(
            num_experts, dim, hidden_dim, activation=activation, backend=backend, device=device, dtype=dtype
        )
        self.num_experts, self.dim, self.norm_eps = num_experts, dim, norm_eps
        self.norm_weight = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs of one row in one expert."""
        return self.experts.flops_per_token(seq_len)

    def forward(self, rows: Tensor, rows_per_expert: Tensor) -> Tensor:
        """rows (R, D) sorted by expert, rows_per_expert (E,) int64 that sums to R -> (R, D)."""
        y = self.experts(rows, rows_per_expert)
        precise = torch.float64 if y.dtype == torch.float64 else torch.float32
        scaled = (y.to(precise) * (1 + self.norm_weight.to(precise))).to(y.dtype)
        return F.rms_norm(scaled.to(precise), (self.dim,), None, self.norm_eps).to(y.dtype)

    def extra_repr(self) -> str:
        return f"norm_eps={self.norm_eps}"
