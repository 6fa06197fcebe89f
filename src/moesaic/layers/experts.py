"""The routed experts: stacked weights and interchangeable backends.

A backend is a pure function of rows sorted by expert; all of them share the weights and agree with `loop`, the oracle,
in outputs and every gradient. To add one, write the function and register it in `BACKENDS`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moesaic.layers.expert_backends import cannot_repeat, grouped, loop, padded, sliced, sliced_recompute
from moesaic.layers.feed_forward import ACTIVATIONS

__all__ = ["BACKENDS", "Experts", "choose_backend", "run_experts"]

Backend = Callable[[Tensor, Tensor, Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor]

BACKENDS: dict[str, Backend] = {
    "loop": loop,
    "padded": padded,
    "grouped": grouped,
    "sliced": sliced,
    "sliced_recompute": sliced_recompute,
}
CASTING_BACKENDS = {"sliced", "sliced_recompute"}
"""Those that cast weights themselves, one expert at a time."""
STRENGTHS = {
    "grouped": "no padding and no host synchronisation",
    "sliced": "on a CPU as fast as any, with the least memory",
}


def choose_backend(
    device: torch.device,
    dtype: torch.dtype,
    dim: int,
    hidden_dim: int,
    backend: str = "auto",
    activation: Callable[[Tensor], Tensor] | None = None,
) -> tuple[str, str]:
    """What really runs for rows of this dtype when `backend` is asked for, and why: (name, reason).

    A backend that cannot do it gives way to the next one, and the reason says what was in the way.

    Args:
        activation: with gradients, some backends cannot run one that has parameters or draws random numbers.
    """
    if torch.compiler.is_compiling() or device.type != "cpu":
        candidates = ["grouped", "padded"]
    else:
        candidates = ["sliced", "grouped", "loop"]
    if backend != "auto":
        candidates.insert(0, backend)
    reasons = []
    for name in candidates:
        obstacle = find_obstacle(name, device, dtype, dim, hidden_dim, activation)
        if obstacle is None:
            break
        reasons.append(obstacle)
    return name, "; ".join(reasons) or (STRENGTHS[name] if backend == "auto" else "as asked for")


def find_obstacle(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    dim: int,
    hidden_dim: int,
    activation: Callable[[Tensor], Tensor] | None,
) -> str | None:
    """Why a backend cannot do it, None if it can."""
    if backend == "grouped":
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"grouped_mm has no {dtype} kernel"
        if device.type not in ("cpu", "cuda"):
            return f"grouped_mm is not known to work on {device.type}"
        if device.type == "cuda" and dtype != torch.bfloat16:
            return f"grouped_mm on CUDA wants bfloat16, not {dtype}"
        if torch.compiler.is_compiling() and dtype != torch.bfloat16:
            return f"torch.compile traces grouped_mm in bfloat16 only, not {dtype}"
        if dim * dtype.itemsize % 16 or hidden_dim * dtype.itemsize % 16:
            return f"grouped_mm needs rows of a multiple of 16 bytes, not dim={dim}, hidden_dim={hidden_dim}"
    if backend in CASTING_BACKENDS:
        if torch.compiler.is_compiling():
            return f"{backend} depends on the numbers of rows, for which torch.compile would compile anew every time"
        if activation is not None:
            return cannot_repeat(activation, torch.zeros(1, hidden_dim, device=device, dtype=dtype))
    return None


def run_experts(
    rows: Tensor,
    gate_up: Tensor,
    down: Tensor,
    rows_per_expert: Tensor,
    activation: Callable[[Tensor], Tensor],
    backend: str = "auto",
) -> Tensor:
    """The experts as a function of their weights, on a backend by name, or on another that can: see `choose_backend`.

    Under autocast everything is computed in the autocast dtype, cast here or by the backend, because grouped_mm and
    bmm would not agree on what autocast means. Gradients are in the dtype of the weights.

    Args:
        rows: (R, D) sorted by expert.
        gate_up: (E, D, 2F), gate first; views such as a transposed (E, 2F, D) are fine.
        down: (E, F, D).
        rows_per_expert: (E,) int64 that sums to R.

    Returns:
        (R, D).

    Raises:
        ValueError: rows and weights differ in dtype, and not under autocast.
    """
    device = rows.device
    if torch.is_autocast_enabled(device.type):
        rows = rows.to(torch.get_autocast_dtype(device.type))
    elif not rows.dtype == gate_up.dtype == down.dtype:
        raise ValueError(
            f"rows are {rows.dtype}, gate_up {gate_up.dtype}, down {down.dtype}: only under autocast may they differ"
        )
    backend, _ = choose_backend(
        device, rows.dtype, rows.size(1), down.size(1), backend, activation if torch.is_grad_enabled() else None
    )
    if backend not in CASTING_BACKENDS:
        gate_up, down = gate_up.to(rows.dtype), down.to(rows.dtype)
        if rows.size(0) == 0:
            backend = "loop"
    return BACKENDS[backend](rows, gate_up, down, rows_per_expert, activation)


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
        activation: str = "silu",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r}: allowed are {', '.join(ACTIVATIONS)}")
        if backend != "auto" and backend not in BACKENDS:
            raise ValueError(f"backend={backend!r}: allowed are auto, {', '.join(BACKENDS)}")
        self.num_experts = num_experts
        self.dim = dim
        self.hidden_dim = hidden_dim
        self.activation = activation
        self.backend = backend
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, dim, 2 * hidden_dim, device=device, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_dim, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.gate_up_proj, std=self.dim**-0.5)
        nn.init.normal_(self.down_proj, std=self.hidden_dim**-0.5)

    def forward(self, rows: Tensor, rows_per_expert: Tensor) -> Tensor:
        """rows (R, D) sorted by expert, rows_per_expert (E,) int64 that sums to R -> (R, D)."""
        return run_experts(
            rows, self.gate_up_proj, self.down_proj, rows_per_expert, ACTIVATIONS[self.activation], self.backend
        )

    def extra_repr(self) -> str:
        weight = self.down_proj
        runs, reason = choose_backend(weight.device, weight.dtype, self.dim, self.hidden_dim, self.backend)
        backend = self.backend if runs == self.backend else f"{self.backend} (runs {runs}: {reason})"
        return f"{self.num_experts}, dim={self.dim}, hidden_dim={self.hidden_dim}, backend={backend}"
