"""Gathers of rows and sums of slots, each of which is the backward of the other."""

import functools
from typing import Any

import torch
from torch import Tensor

from moesaic.layers.checks import differentiates_forward

__all__ = ["SumRows", "TakeRows"]


class Reordering(torch.autograd.Function):
    """What `TakeRows` and `SumRows` share: each is the transpose, and so the backward, of the other.

    That makes a gather of both, where autograd's own backward of a gather adds into zeros, row by row, and on CUDA in
    any order.
    """

    generate_vmap_rule = True

    @classmethod
    def of(cls, rows: Tensor, slot_of_row: Tensor, row_of_slot: Tensor, top_k: int) -> Tensor:
        # torch.compile cannot trace a Function with a jvp, so forward mode differentiates the gathers themselves
        call = cls.forward if differentiates_forward() else cls.apply
        reordered: Tensor = call(rows, slot_of_row, row_of_slot, top_k)
        return reordered

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *order, ctx.top_k = inputs
        ctx.save_for_backward(*order)


class TakeRows(Reordering):
    """x (T, D) -> rows (R, D), row i from token slot_of_row[i] // top_k."""

    @staticmethod
    def forward(x: Tensor, slot_of_row: Tensor, row_of_slot: Tensor, top_k: int) -> Tensor:
        return x.index_select(0, slot_of_row if top_k == 1 else slot_of_row // top_k)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return SumRows.apply(gradient, *ctx.saved_tensors, ctx.top_k), None, None, None


class SumRows(Reordering):
    """rows (R, D) -> (T, D), the sum of each token's top_k rows."""

    @staticmethod
    def forward(rows: Tensor, slot_of_row: Tensor, row_of_slot: Tensor, top_k: int) -> Tensor:
        if rows.size(0) < row_of_slot.size(0):  # slots without an expert add nothing
            row_of_slot = row_of_slot.clamp(max=rows.size(0))
            rows = torch.cat((rows, rows.new_zeros(1, rows.size(1))))
        slots = rows.index_select(0, row_of_slot)
        if top_k == 1:
            return slots
        slots = slots.unflatten(0, (-1, top_k))
        if top_k > 2 and rows.dtype in (torch.bfloat16, torch.float16):
            return slots.sum(dim=1)  # rounds once
        return functools.reduce(torch.add, slots.unbind(1))  # on a CPU up to 10 times faster than sum

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return TakeRows.apply(gradient, *ctx.saved_tensors, ctx.top_k), None, None, None
