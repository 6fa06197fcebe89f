"""The dense feed-forward network (channel mixer)."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.layers.backend_choice import CASTING_BACKENDS, BackendName, choose_backend
from moesaic.layers.backends import run_experts
from moesaic.layers.checks import require_choice, require_dtype, require_last, require_sizes, require_weights_dtype

__all__ = ["ACTIVATIONS", "ActivationName", "FeedForward", "runs_lean"]


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def linear(x: Tensor) -> Tensor:
    return x


ActivationName = Literal["silu", "gelu", "relu", "gelu_tanh", "quick_gelu", "relu2", "sigmoid", "linear"]
"""The keys of `ACTIVATIONS`."""

ACTIVATIONS: dict[ActivationName, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu2": relu2,
    "sigmoid": torch.sigmoid,
    "linear": linear,
}
"""Activations of the gate by name.

Shazeer 2020 compares silu (SwiGLU), gelu (GEGLU), relu (ReGLU), sigmoid (GLU) and linear (bilinear)."""


LEAN_ELEMENTS = 2**20
"""Hidden activations (tokens x width) from which on copying the weights of gate and up into one pays."""


class FeedForward(nn.Module):
    """Gated FFN: down(activation(gate(x)) * up(x)); SwiGLU by default (Shazeer 2020, arXiv 2002.05202).

    Large batches in fp32 on a CPU run as one expert of the backend "sliced", which keeps half as much for the backward.

    Args:
        dim: model width D.
        hidden_dim: inner width F (final: nothing is rounded or scaled).
        activation: a name in `ACTIVATIONS`.
        backend: "sliced_recompute" keeps little memory in every dtype; the other names of `BACKENDS` change nothing.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        activation: ActivationName = "silu",
        backend: BackendName = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_sizes(dim=dim, hidden_dim=hidden_dim)
        require_dtype(dtype)
        require_choice(ACTIVATIONS, activation=activation)
        require_choice(get_args(BackendName), backend=backend)
        self.activation = activation
        self.backend = backend
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=False, device=device, dtype=dtype)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False, device=device, dtype=dtype)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        require_last(x, self.gate_proj.in_features, "FeedForward")
        require_weights_dtype("FeedForward", x, self.gate_proj.weight)
        activation = ACTIVATIONS[self.activation]
        if not self.is_lean(x.numel() // x.size(-1), x.device, x.dtype):
            return self.down_proj(activation(self.gate_proj(x)) * self.up_proj(x))
        rows = x.reshape(-1, x.size(-1))
        gate_up = torch.cat((self.gate_proj.weight, self.up_proj.weight)).t()[None]
        down = self.down_proj.weight.t()[None]
        return run_experts(rows, gate_up, down, torch.tensor([rows.size(0)]), activation, self.backend).view_as(x)

    def is_lean(self, num_tokens: int, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether to run as one expert: where that is not slower, and if nobody replaced or hooked a projection."""
        if num_tokens * self.down_proj.in_features < LEAN_ELEMENTS:
            return False
        parts = (self.gate_proj, self.up_proj, self.down_proj)
        if any(type(part) is not nn.Linear or part._forward_hooks or part._forward_pre_hooks for part in parts):
            return False
        sizes = self.gate_proj.in_features, self.gate_proj.out_features
        return runs_lean(num_tokens, device, dtype, *sizes, self.backend, self.activation)

    def flops_per_token(self, seq_len: int) -> float:
        return 2.0 * sum(part.weight.numel() for part in (self.gate_proj, self.up_proj, self.down_proj))


def runs_lean(
    num_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    dim: int,
    width: int,
    backend: BackendName,
    activation: ActivationName,
) -> bool:
    """Whether a `FeedForward` of these sizes runs as one expert."""
    is_fp32 = dtype == torch.float32 and not torch.is_autocast_enabled(device.type)
    if num_tokens * width < LEAN_ELEMENTS or (not is_fp32 and backend != "sliced_recompute"):
        return False
    return choose_backend(device, dtype, dim, width, backend, ACTIVATIONS[activation])[0] in CASTING_BACKENDS
