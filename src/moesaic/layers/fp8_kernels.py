"""The experts in FP8 on GPUs that have it: rowwise scales, grouped products, groups padded to what the kernel takes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moesaic.layers.fp8 import quantize, scales_for
from moesaic.layers.sliced import Activation

__all__ = ["MULTIPLE", "PaddedGroups", "cannot_run_fp8", "fp8", "scaled_grouped_mm"]

MULTIPLE = 16
"""Rows of a group, and both sizes of a matrix, must be a multiple of it."""

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def cannot_run_fp8(device: torch.device, dtype: torch.dtype, dim: int, hidden_dim: int) -> str | None:
    """Why the backend "fp8" cannot run there, None if it can."""
    if device.type != "cuda":
        return f"fp8 needs a GPU that multiplies in FP8 (H100 or later), not {device.type}"
    if (capability := torch.cuda.get_device_capability(device)) < (9, 0):
        return f"fp8 needs a GPU that multiplies in FP8 (H100 or later), not compute capability {capability}"
    if not hasattr(F, "scaled_grouped_mm"):
        return f"fp8 needs torch.nn.functional.scaled_grouped_mm, which torch {torch.__version__} does not have"
    if dtype != torch.bfloat16:
        return f"fp8 on CUDA gives bfloat16 and takes rows in it (autocast does), not {dtype}"
    if dim % MULTIPLE or hidden_dim % MULTIPLE:
        return f"fp8 needs multiples of {MULTIPLE}, not dim={dim}, hidden_dim={hidden_dim}"
    return None


def scaled_grouped_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, ends: Tensor) -> Tensor:
    """Grouped product of e4m3 matrices with rowwise fp32 factors, in bf16, by torch's kernel."""
    functional: Any = F  # torch's stubs do not name the function
    rowwise = functional.ScalingType.RowWise
    y: Tensor = functional.scaled_grouped_mm(a, b, scale_a, rowwise, scale_b, rowwise, offs=ends, use_fast_accum=True)
    return y


def fp8(
    rows: Tensor,
    gate_up: Tensor,
    down: Tensor,
    rows_per_expert: Tensor,
    activation: Activation,
    kernel: Kernel = scaled_grouped_mm,
) -> Tensor:
    """What `fp8_emulated` computes by its rowwise recipe, by a kernel for it and without host synchronization.

    Args:
        kernel: (a, b, scale_a, scale_b, ends) -> product, for groups of rows that end at `ends` (E,) int32. Of
            a (P, K) and b (E, K, N) it is (P, N), with scales (P,) and (E, N); of a (M, P) and b (P, N), groups along
            P, it is (E, M, N), with scales (E * M,) and (E * N,). `a` is row-major, `b` column-major.
    """
    groups = PaddedGroups.of(rows_per_expert, rows.size(0))
    gate, up = _product(groups.pad(rows), gate_up, groups, kernel).chunk(2, dim=-1)
    return _product(activation(gate) * up, down, groups, kernel).index_select(0, groups.places)


class PaddedGroups(NamedTuple):
    """Where rows sorted by expert stand once each expert has a multiple of 16 of them, and at least 16.

    At least 16, because a weight without any row would get no gradient written. What pads is zero. The number of all
    rows P depends on shapes only; those beyond the last group belong to none, and a kernel leaves anything there.
    """

    places: Tensor
    """(R,) int64, of the rows among P."""
    ends: Tensor
    """(E,) int32, where each group ends."""
    expert_of: Tensor
    """(P,) int64, E for rows of no group."""

    @classmethod
    def of(cls, rows_per_expert: Tensor, num_rows: int) -> "PaddedGroups":
        padded = (rows_per_expert + MULTIPLE - 1).div(MULTIPLE, rounding_mode="floor").clamp(min=1) * MULTIPLE
        ends, padded_ends = rows_per_expert.cumsum(0), padded.cumsum(0)
        row = torch.arange(num_rows, device=ends.device)
        expert = torch.searchsorted(ends, row, right=True)
        places = row + (padded_ends - padded - ends + rows_per_expert)[expert]
        total = -(-num_rows // MULTIPLE) * MULTIPLE + MULTIPLE * ends.numel()
        expert_of = torch.searchsorted(padded_ends, torch.arange(total, device=ends.device), right=True)
        return cls(places, padded_ends.to(torch.int32), expert_of)

    def pad(self, rows: Tensor) -> Tensor:
        """(R, D) -> (P, D)."""
        return rows.new_zeros(self.expert_of.numel(), rows.size(1)).index_copy(0, self.places, rows)


def _product(x: Tensor, weight: Tensor, groups: PaddedGroups, kernel: Kernel) -> Tensor:
    """x (P, K) in groups, weight (E, K, N) -> (P, N)."""
    y: Tensor = _GroupedProduct.apply(x, weight, groups.ends, groups.expert_of, kernel)
    return y


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, ends: Tensor, expert_of: Tensor, kernel: Kernel) -> Tensor:
        x8, x_scales = quantize(x, 1)
        weight8, weight_scales = quantize(weight, 1)
        return kernel(x8, _column_major(weight8), x_scales.flatten(), weight_scales.squeeze(1), ends)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *saved, ctx.kernel = inputs
        ctx.save_for_backward(*saved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, ends, expert_of = ctx.saved_tensors
        d_x = d_weight = None
        d_y = d_y.contiguous()
        if ctx.needs_input_grad[0]:
            d_y8, d_y_scales = quantize(d_y, 1)
            weight8, weight_scales = quantize(weight, 2)
            d_x = ctx.kernel(d_y8, weight8.contiguous().mT, d_y_scales.flatten(), weight_scales.squeeze(2), ends)
        if ctx.needs_input_grad[1]:
            x8, x_scales = _quantize_groups(x, expert_of, ends.numel())
            d_y8, d_y_scales = _quantize_groups(d_y, expert_of, ends.numel())
            d_weight = ctx.kernel(x8.t().contiguous(), _column_major(d_y8), x_scales, d_y_scales, ends)
        return d_x, d_weight, None, None, None


def _column_major(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def _quantize_groups(x: Tensor, expert_of: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """x (P, N) in e4m3 where the rows of a group share a scale in each column, and the factors (E * N,)."""
    index = expert_of[:, None].expand_as(x)
    largest = x.new_zeros(num_experts + 1, x.size(1)).scatter_reduce(0, index, x.abs(), "amax")
    up, down = scales_for(largest, torch.float8_e4m3fn)
    return (x * up[expert_of]).to(torch.float8_e4m3fn), down[:num_experts].flatten()
