"""The routed experts: stacked weights, run by any of the backends."""

from typing import get_args

import torch
from torch import Tensor, nn

from moesaic.layers.backend_choice import BackendName, choose_backend
from moesaic.layers.backends import Backend, run_experts
from moesaic.layers.checks import require_choice, require_dtype, require_last, require_sizes
from moesaic.layers.feed_forward import ACTIVATIONS, ActivationName
from moesaic.layers.local import held
from moesaic.layers.parametrization import Fans, Parametrization

__all__ = ["Experts"]


class Experts(nn.Module):
    """E gated FFNs with stacked weights.

    `gate_up_proj` is (E, D, 2F), gate first; `down_proj` is (E, F, D): the (in, out) layout of Llama 4's checkpoints
    and of grouped matmul kernels.

    Args:
        num_experts: E.
        dim: model width D.
        hidden_dim: width F of each expert.
        activation: a name in `ACTIVATIONS`.
        backend: "auto" or a name in `BACKENDS`; printing the module shows which one runs in the dtype of its weights.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        *,
        activation: ActivationName = "silu",
        backend: BackendName = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_sizes(num_experts=num_experts, dim=dim, hidden_dim=hidden_dim)
        require_dtype(dtype)
        require_choice(ACTIVATIONS, activation=activation)
        require_choice(get_args(BackendName), backend=backend)
        self.num_experts = num_experts
        self.dim = dim
        self.hidden_dim = hidden_dim
        self.activation = activation
        self.backend: BackendName | Backend = backend
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, dim, 2 * hidden_dim, device=device, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_dim, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.gate_up_proj, std=self.dim**-0.5)
        nn.init.normal_(self.down_proj, std=self.hidden_dim**-0.5)

    def initialize(self, parametrization: Parametrization) -> None:
        nn.init.normal_(self.gate_up_proj, std=parametrization.std("matrix", self.dim))
        nn.init.normal_(self.down_proj, std=parametrization.std("matrix", self.hidden_dim))

    def fans(self) -> dict[str, Fans]:
        return {"gate_up_proj": Fans(self.dim, 2 * self.hidden_dim), "down_proj": Fans(self.hidden_dim, self.dim)}

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs of one row in one expert."""
        return 2 * (self.gate_up_proj.numel() + self.down_proj.numel()) / self.num_experts

    def forward(self, rows: Tensor, rows_per_expert: Tensor) -> Tensor:
        """rows (R, D) sorted by expert, rows_per_expert (E,) int64 that sums to R -> (R, D).

        Where the experts are spread over ranks, the weights are DTensors, and E is the number of those on this rank.
        """
        require_last(rows, self.dim, "Experts")
        gate_up, down = held(self.gate_up_proj), held(self.down_proj)
        return run_experts(rows, gate_up, down, rows_per_expert, ACTIVATIONS[self.activation], self.backend)

    def extra_repr(self) -> str:
        sizes = f"{self.num_experts}, dim={self.dim}, hidden_dim={self.hidden_dim}"
        weight = self.down_proj
        if not isinstance(self.backend, str):
            return f"{sizes}, backend={self.backend}"
        runs, reason = choose_backend(weight.device, weight.dtype, self.dim, self.hidden_dim, self.backend)
        backend = self.backend if runs == self.backend else f"{self.backend} (runs {runs}: {reason})"
        return f"{sizes}, backend={backend}"
