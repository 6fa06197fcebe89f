"""Root-mean-square normalization."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.layers.checks import require_dtype, require_flags, require_last, require_numbers, require_sizes

__all__ = ["CenteredRMSNorm", "RMSNorm"]


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) over the last dimension, times a gain (Zhang & Sennrich 2019, arXiv 1910.07467).

    As in Llama: normalized in fp32, cast to the input's dtype, and only then multiplied by the gain. Without gain it
    is what Llama 4 calls the L2 norm of queries and keys.

    Args:
        dim: size of the last dimension.
        eps: added to the mean square.
        gain: whether to have a learned gain of shape (dim,), initialized to one.
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-5,
        gain: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_sizes(dim=dim)
        require_numbers(eps=eps)
        require_flags(gain=gain)
        require_dtype(dtype)
        self.dim = dim
        self.eps = eps
        if gain:
            self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        else:
            self.register_parameter("weight", None)

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim), same dtype.

        Raises:
            TypeError: x is no floating-point tensor.
            ValueError: another width.
        """
        require_last(x, self.dim, "RMSNorm")
        statistics_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        y = F.rms_norm(x.to(statistics_dtype), (self.dim,), None, self.eps).to(x.dtype)
        return y if self.weight is None else y * self.weight

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, gain={self.weight is not None}"


class CenteredRMSNorm(RMSNorm):
    """y = (1 + w) x / sqrt(mean(x^2) + eps) over the last dimension, in fp32 until the end (Muse Spark, Gemma).

    `weight` w (dim,) is what the gain has beyond one, initialized to zero: in bf16 it keeps digits that a gain near one
    would lose.

    Args:
        dim: size of the last dimension.
        eps: added to the mean square.
    """

    weight: nn.Parameter

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, eps=eps, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim), same dtype.

        Raises:
            TypeError: x is no floating-point tensor.
            ValueError: another width.
        """
        require_last(x, self.dim, "CenteredRMSNorm")
        precise = torch.float64 if x.dtype == torch.float64 else torch.float32
        return F.rms_norm(x.to(precise), (self.dim,), 1 + self.weight.to(precise), self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"
