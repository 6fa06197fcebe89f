"""The dense feed-forward network (channel mixer)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "FeedForward"]


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def linear(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu2": relu2,
    "sigmoid": torch.sigmoid,
    "linear": linear,
}
"""Of the gate. Shazeer 2020 compares silu (SwiGLU), gelu (GEGLU), relu (ReGLU), sigmoid (GLU) and linear (bilinear)."""


class FeedForward(nn.Module):
    """Gated FFN: down(activation(gate(x)) * up(x)); SwiGLU by default (Shazeer 2020, arXiv 2002.05202).

    Args:
        dim: model width D.
        hidden_dim: inner width F (final: nothing is rounded or scaled).
        activation: a name in `ACTIVATIONS`.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        activation: str = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r}: allowed are {', '.join(ACTIVATIONS)}")
        self.activation = activation
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=False, device=device, dtype=dtype)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False, device=device, dtype=dtype)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.down_proj(ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))
