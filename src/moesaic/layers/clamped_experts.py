"""The routed experts of gpt-oss: a clamped SwiGLU between two linear maps with biases."""

from collections.abc import Callable
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.layers.backend_choice import BackendName, find_obstacle
from moesaic.layers.checks import require_choice, require_last, require_numbers, require_one_dtype
from moesaic.layers.experts import Experts
from moesaic.layers.local import held
from moesaic.layers.parametrization import ParameterKind, Parametrization

__all__ = ["BACKENDS_WITH_BIASES", "ClampedExperts", "choose_with_biases", "clamped_swiglu", "run_with_biases"]

BACKENDS_WITH_BIASES: tuple[BackendName, ...] = ("auto", "loop", "padded", "grouped")
"""What may be asked for: the others compute the gate themselves, or have no place for a bias."""


class ClampedExperts(Experts):
    """E gated FFNs with biases: down(clamped_swiglu(gate(x), up(x))), as transformers' `GptOssExperts`.

    `gate_up_proj_bias` is (E, 2F), gate first; `down_proj_bias` is (E, D). Weights are those of `Experts`.

    Args:
        alpha, limit: see `clamped_swiglu`.
        backend: one of `BACKENDS_WITH_BIASES`.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        *,
        alpha: float = 1.702,
        limit: float = 7.0,
        backend: BackendName = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        require_choice(get_args(BackendName), backend=backend)
        _with_biases(backend)
        require_numbers(above=True, alpha=alpha, limit=limit)
        super().__init__(num_experts, dim, hidden_dim, backend=backend, device=device, dtype=dtype)
        self.alpha = alpha
        self.limit = limit
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(num_experts, 2 * hidden_dim, device=device, dtype=dtype))
        self.down_proj_bias = nn.Parameter(torch.zeros(num_experts, dim, device=device, dtype=dtype))

    def initialize(self, parametrization: Parametrization) -> None:
        super().initialize(parametrization)
        nn.init.zeros_(self.gate_up_proj_bias)
        nn.init.zeros_(self.down_proj_bias)

    def parameter_kinds(self) -> dict[str, ParameterKind]:
        return {"gate_up_proj_bias": "vector", "down_proj_bias": "vector"}

    def forward(self, rows: Tensor, rows_per_expert: Tensor) -> Tensor:
        """rows (R, D) sorted by expert, rows_per_expert (E,) int64 that sums to R -> (R, D)."""
        require_last(rows, self.dim, "ClampedExperts")
        backend = _with_biases(self.backend)
        gate_up, gate_up_bias = held(self.gate_up_proj), held(self.gate_up_proj_bias)
        down, down_bias = held(self.down_proj), held(self.down_proj_bias)
        return run_with_biases(rows, gate_up, gate_up_bias, down, down_bias, rows_per_expert, self._gated, backend)

    def _gated(self, gate_up: Tensor) -> Tensor:
        return clamped_swiglu(*gate_up.chunk(2, dim=-1), alpha=self.alpha, limit=self.limit)

    def extra_repr(self) -> str:
        sizes = f"{self.num_experts}, dim={self.dim}, hidden_dim={self.hidden_dim}"
        return f"{sizes}, alpha={self.alpha:g}, limit={self.limit:g}, backend={self.backend}"


def clamped_swiglu(gate: Tensor, up: Tensor, *, alpha: float, limit: float) -> Tensor:
    """(up + 1) * gate * sigmoid(alpha * gate), where gate is at most `limit` and up within +-limit."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(alpha * gate))


def run_with_biases(
    rows: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    rows_per_expert: Tensor,
    gated: Callable[[Tensor], Tensor],
    backend: BackendName = "auto",
) -> Tensor:
    """Experts with biases as a function of their weights. Under autocast all is computed in its dtype.

    Args:
        rows: (R, D) sorted by expert.
        gate_up, gate_up_bias: (E, D, 2F) and (E, 2F).
        down, down_bias: (E, F, D) and (E, D).
        rows_per_expert: (E,) int64 that sums to R.
        gated: (..., 2F) -> (..., F), row by row.
        backend: one of `BACKENDS_WITH_BIASES`; "grouped" gives way where it cannot run.

    Returns:
        (R, D).

    Raises:
        ValueError: rows and weights differ in dtype, and not under autocast.
    """
    weights = (gate_up, gate_up_bias, down, down_bias)
    if torch.is_autocast_enabled(rows.device.type):
        rows = rows.to(torch.get_autocast_dtype(rows.device.type))
        gate_up, gate_up_bias, down, down_bias = (weight.to(rows.dtype) for weight in weights)
    else:
        require_one_dtype(" unless under autocast", rows=rows, gate_up=gate_up, down=down)
    with torch.autocast(rows.device.type, enabled=False):
        multiply = LINEAR_MAPS[choose_with_biases(rows, down.size(1), backend)]
        hidden = gated(multiply(rows, gate_up, gate_up_bias, rows_per_expert))
        return multiply(hidden, down, down_bias, rows_per_expert)


def choose_with_biases(rows: Tensor, hidden_dim: int, backend: BackendName) -> BackendName:
    """The backend that runs for rows (R, D): the one asked for, or for "auto" grouped, if it can."""
    if backend == "loop" or not rows.size(0):
        return "loop"
    obstacle = find_obstacle("grouped", rows.device, rows.dtype, rows.size(1), hidden_dim)
    if backend != "padded" and obstacle is None:
        return "grouped"
    is_eager_cpu = rows.device.type == "cpu" and not torch.compiler.is_compiling()
    cannot_pad = find_obstacle("padded", rows.device, rows.dtype, rows.size(1), hidden_dim) is not None
    return "loop" if cannot_pad or (is_eager_cpu and backend != "padded") else "padded"


def _with_biases(backend: object) -> BackendName:
    """The backend, if it has a place for biases."""
    for each in BACKENDS_WITH_BIASES:
        if backend == each:
            return each
    raise ValueError(f"backend={backend!r}: must be one of {', '.join(BACKENDS_WITH_BIASES)} for experts with biases")


def _looped(rows: Tensor, weight: Tensor, bias: Tensor, rows_per_expert: Tensor) -> Tensor:
    parts = zip(rows.split(rows_per_expert.tolist()), weight.unbind(), bias.unbind(), strict=True)
    return torch.cat([torch.addmm(b, x, w) for x, w, b in parts])


def _padded(rows: Tensor, weight: Tensor, bias: Tensor, rows_per_expert: Tensor) -> Tensor:
    num_experts, capacity = weight.size(0), torch.sym_max(int(rows_per_expert.max()), 2)
    first_row = rows_per_expert.cumsum(0) - rows_per_expert
    expert_of_row = _expert_of_row(rows, rows_per_expert)
    place = torch.arange(rows.size(0), device=rows.device) - first_row[expert_of_row] + expert_of_row * capacity
    x = rows.new_zeros(num_experts * capacity, rows.size(1)).index_copy(0, place, rows)
    y = torch.baddbmm(bias[:, None], x.unflatten(0, (num_experts, capacity)), weight)
    return y.flatten(0, 1).index_select(0, place)


def _grouped(rows: Tensor, weight: Tensor, bias: Tensor, rows_per_expert: Tensor) -> Tensor:
    y = F.grouped_mm(rows, weight, offs=rows_per_expert.cumsum(0, dtype=torch.int32))
    if y.requires_grad:  # its backward refuses an expanded gradient, such as that of y.sum()
        y.register_hook(torch.Tensor.contiguous)
    return y + bias.index_select(0, _expert_of_row(rows, rows_per_expert))


def _expert_of_row(rows: Tensor, rows_per_expert: Tensor) -> Tensor:
    experts = torch.arange(rows_per_expert.size(0), device=rows.device)
    # the size is known, which saves a wait for a GPU
    return experts.repeat_interleave(rows_per_expert, output_size=rows.size(0))


LINEAR_MAPS: dict[BackendName, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "loop": _looped,
    "padded": _padded,
    "grouped": _grouped,
}
"""rows (R, in) sorted by expert, weight (E, in, out), bias (E, out), rows_per_expert (E,) -> (R, out)."""
