"""A narrower width for the experts of a MoE layer."""

from typing import Any

import torch
from torch import Tensor, nn

from moesaic.layers.checks import require_dtype, require_sizes
from moesaic.layers.norm import CenteredRMSNorm

__all__ = ["Latent"]


class Latent(nn.Module):
    """Projections around the experts of a MoE layer: tokens go down to a latent width once, their sum comes up again.

    Experts of width `latent_dim` cost less, and so do the rows that travel to them (LatentMoE, arXiv 2601.18089:
    Nemotron 3, Muse Spark). The router and a shared expert see the full width. Scores multiply in the latent width.

    Args:
        dim: model width D.
        latent_dim: width of the experts.
        norm_eps: of a `CenteredRMSNorm` behind the projection down (Muse Spark); None for no norm (Nemotron 3).
    """

    def __init__(
        self,
        dim: int,
        latent_dim: int,
        *,
        norm_eps: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_sizes(dim=dim, latent_dim=latent_dim)
        require_dtype(dtype)
        self.down_proj = nn.Linear(dim, latent_dim, bias=False, device=device, dtype=dtype)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = None if norm_eps is None else CenteredRMSNorm(latent_dim, eps=norm_eps, **where)
        self.up_proj = nn.Linear(latent_dim, dim, bias=False, device=device, dtype=dtype)

    def flops_per_token(self, seq_len: int) -> float:
        return 2 * (self.down_proj.weight.numel() + self.up_proj.weight.numel())

    def down(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, latent_dim)."""
        x = self.down_proj(x)
        return x if self.norm is None else self.norm(x)

    def up(self, x: Tensor) -> Tensor:
        """(T, latent_dim) -> (T, D)."""
        return self.up_proj(x)
