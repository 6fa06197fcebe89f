"""The routed experts: stacked weights and interchangeable backends.

A backend is a pure function of rows sorted by expert; all of them share the weights and agree with `loop`, the oracle,
in outputs and every gradient. To add one, write the function and register it in `BACKENDS`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.layers.feed_forward import ACTIVATIONS

__all__ = ["BACKENDS", "Experts", "choose_backend", "run_experts"]

Backend = Callable[[Tensor, Tensor, Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor]


def loop(
    rows: Tensor, gate_up: Tensor, down: Tensor, rows_per_expert: Tensor, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """One expert after the other: the oracle. Any dtype and shape.

    Experts without rows run on empty matrices, so that every weight has a gradient (DistributedDataParallel needs it).
    `unbind`, because the backward of `weight[e]` would zero-fill a whole (E, ...) gradient for every expert.
    """
    outputs = []
    for x, gate_up_e, down_e in zip(rows.split(rows_per_expert.tolist()), gate_up.unbind(), down.unbind(), strict=True):
        gate, up = (x @ gate_up_e).chunk(2, dim=-1)
        outputs.append((activation(gate) * up) @ down_e)
    return torch.cat(outputs)


def padded(
    rows: Tensor, gate_up: Tensor, down: Tensor, rows_per_expert: Tensor, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """One batched matmul, every expert padded to the fullest one: good when balanced, memory grows with skew."""
    num_experts, capacity = gate_up.size(0), int(rows_per_expert.max())
    first_row = rows_per_expert.cumsum(0) - rows_per_expert
    expert_of_row = torch.arange(num_experts, device=rows.device).repeat_interleave(rows_per_expert)
    place = torch.arange(rows.size(0), device=rows.device) - first_row[expert_of_row]
    place = place + expert_of_row * capacity
    x = rows.new_zeros(num_experts * capacity, rows.size(1)).index_copy(0, place, rows)
    gate, up = torch.bmm(x.unflatten(0, (num_experts, capacity)), gate_up).chunk(2, dim=-1)
    y = torch.bmm(activation(gate) * up, down)
    return y.flatten(0, 1).index_select(0, place)


def grouped(
    rows: Tensor, gate_up: Tensor, down: Tensor, rows_per_expert: Tensor, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """`torch.nn.functional.grouped_mm`: no padding, no host synchronisation."""
    ends = rows_per_expert.cumsum(0, dtype=torch.int32)
    gate, up = F.grouped_mm(rows, gate_up, offs=ends).chunk(2, dim=-1)
    y = F.grouped_mm(activation(gate) * up, down, offs=ends)
    if y.requires_grad:  # its backward refuses an expanded gradient, such as that of y.sum()
        y.register_hook(torch.Tensor.contiguous)
    return y


BACKENDS: dict[str, Backend] = {"loop": loop, "padded": padded, "grouped": grouped}


def choose_backend(device: torch.device, dtype: torch.dtype, dim: int, hidden_dim: int) -> tuple[str, str]:
    """What `backend="auto"` runs for these rows and weights, and why: (name, reason)."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "loop", f"grouped_mm has no {dtype} kernel"
    if device.type == "cuda" and dtype != torch.bfloat16:
        return "padded", f"grouped_mm on CUDA wants bfloat16, not {dtype}"
    if device.type not in ("cpu", "cuda"):
        return "padded", f"grouped_mm is not known to work on {device.type}"
    if torch.compiler.is_compiling() and dtype != torch.bfloat16:
        return "padded", f"torch.compile traces grouped_mm in bfloat16 only, not {dtype}"
    if dim * dtype.itemsize % 16 or hidden_dim * dtype.itemsize % 16:
        return "loop", f"grouped_mm needs rows of a multiple of 16 bytes, not dim={dim}, hidden_dim={hidden_dim}"
    return "grouped", "no padding and no host synchronisation"


def run_experts(
    rows: Tensor,
    gate_up: Tensor,
    down: Tensor,
    rows_per_expert: Tensor,
    activation: Callable[[Tensor], Tensor],
    backend: str = "auto",
) -> Tensor:
    """The experts as a function of their weights, on a backend by name.

    Under autocast rows and weights are cast to the autocast dtype here, because grouped_mm and bmm would not agree on
    what autocast means.

    Args:
        rows: (R, D) sorted by expert.
        gate_up: (E, D, 2F), gate first; views such as a transposed (E, 2F, D) are fine.
        down: (E, F, D).
        rows_per_expert: (E,) int64 that sums to R.

    Returns:
        (R, D).
    """
    device_type = rows.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        rows, gate_up, down = rows.to(dtype), gate_up.to(dtype), down.to(dtype)
    if rows.size(0) == 0:
        backend = "loop"
    elif backend == "auto":
        backend, _ = choose_backend(rows.device, rows.dtype, rows.size(1), down.size(1))
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
        backend: "auto" or a name in `BACKENDS`.
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
        return f"{self.num_experts}, dim={self.dim}, hidden_dim={self.hidden_dim}, backend={self.backend}"
