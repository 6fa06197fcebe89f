"""Backends of the routed experts: pure functions of rows sorted by expert, stacked weights and row counts.

All take what `run_experts` takes, and agree with `loop`, the oracle, in outputs and every gradient, but for those of
FP8. To add one, write the function and register it in `BACKENDS`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.layers.backend_choice import CASTING_BACKENDS, BackendName, backend_for
from moesaic.layers.checks import require_one_dtype
from moesaic.layers.fp8 import fp8_emulated
from moesaic.layers.fp8_kernels import fp8
from moesaic.layers.sliced import Activation, sliced, sliced_recompute

__all__ = ["BACKENDS", "Backend", "grouped", "loop", "padded", "run_experts"]

Backend = Callable[[Tensor, Tensor, Tensor, Tensor, Activation], Tensor]


def loop(rows: Tensor, gate_up: Tensor, down: Tensor, rows_per_expert: Tensor, activation: Activation) -> Tensor:
    """One expert after the other: the oracle. Any dtype and shape.

    Experts without rows run on empty matrices, so that every weight has a gradient (DistributedDataParallel needs it).
    `unbind`, because the backward of `weight[e]` would zero-fill a whole (E, ...) gradient for every expert.
    """
    outputs = []
    for x, gate_up_e, down_e in zip(rows.split(rows_per_expert.tolist()), gate_up.unbind(), down.unbind(), strict=True):
        gate, up = (x @ gate_up_e).chunk(2, dim=-1)
        outputs.append((activation(gate) * up) @ down_e)
    return torch.cat(outputs)


def padded(rows: Tensor, gate_up: Tensor, down: Tensor, rows_per_expert: Tensor, activation: Activation) -> Tensor:
    """One batched matmul, every expert padded to the fullest one: good when balanced, memory grows with skew."""
    # at least 2 rows: a compiler would otherwise have to ask whether they are 0 or 1
    num_experts, capacity = gate_up.size(0), torch.sym_max(int(rows_per_expert.max()), 2)
    first_row = rows_per_expert.cumsum(0) - rows_per_expert
    expert_of_row = torch.arange(num_experts, device=rows.device).repeat_interleave(rows_per_expert)
    place = torch.arange(rows.size(0), device=rows.device) - first_row[expert_of_row]
    place = place + expert_of_row * capacity
    x = rows.new_zeros(num_experts * capacity, rows.size(1)).index_copy(0, place, rows)
    gate, up = torch.bmm(x.unflatten(0, (num_experts, capacity)), gate_up).chunk(2, dim=-1)
    y = torch.bmm(activation(gate) * up, down)
    return y.flatten(0, 1).index_select(0, place)


def grouped(rows: Tensor, gate_up: Tensor, down: Tensor, rows_per_expert: Tensor, activation: Activation) -> Tensor:
    """`torch.nn.functional.grouped_mm`: no padding, no host synchronization."""
    ends = rows_per_expert.cumsum(0, dtype=torch.int32)
    gate, up = F.grouped_mm(rows, gate_up, offs=ends).chunk(2, dim=-1)
    y = F.grouped_mm(activation(gate) * up, down, offs=ends)
    if y.requires_grad:  # its backward refuses an expanded gradient, such as that of y.sum()
        y.register_hook(torch.Tensor.contiguous)
    return y


BACKENDS: dict[BackendName, Backend] = {
    "loop": loop,
    "padded": padded,
    "grouped": grouped,
    "sliced": sliced,
    "sliced_recompute": sliced_recompute,
    "fp8_emulated": fp8_emulated,
    "fp8": fp8,
}


def run_experts(
    rows: Tensor,
    gate_up: Tensor,
    down: Tensor,
    rows_per_expert: Tensor,
    activation: Activation,
    backend: BackendName | Backend = "auto",
) -> Tensor:
    """The experts as a function of their weights, on a backend, or by name on another that can: see `choose_backend`.

    Under autocast everything is computed in the autocast dtype, cast here or by the backend, because grouped_mm and
    bmm would not agree on what autocast means. Gradients are in the dtype of the weights.

    Args:
        rows: (R, D) sorted by expert.
        gate_up: (E, D, 2F), gate first; views such as a transposed (E, 2F, D) are fine.
        down: (E, F, D).
        rows_per_expert: (E,) int64 that sums to R.
        activation: of the gate.
        backend: a name, or a function as those in `BACKENDS`, which is then called whatever the device.

    Returns:
        (R, D).

    Raises:
        ValueError: rows and weights differ in dtype, and not under autocast; a backend that vmap cannot map; or "fp8"
            where it cannot run.
    """
    device = rows.device
    if torch.is_autocast_enabled(device.type):
        rows = rows.to(torch.get_autocast_dtype(device.type))
    else:
        require_one_dtype(" unless under autocast", rows=rows, gate_up=gate_up, down=down)
    if not isinstance(backend, str):
        return backend(rows, gate_up.to(rows.dtype), down.to(rows.dtype), rows_per_expert, activation)
    backend = backend_for(rows, down.size(1), backend, activation)
    if backend not in CASTING_BACKENDS:
        gate_up, down = gate_up.to(rows.dtype), down.to(rows.dtype)
        if rows.size(0) == 0:
            backend = "loop"
    return BACKENDS[backend](rows, gate_up, down, rows_per_expert, activation)
