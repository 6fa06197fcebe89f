"""Dispatchers bring token rows to their experts and the results back.

A dispatcher is a parameter-free object, so that another one (padded groups for FP8, all-to-all for expert
parallelism) can take its place without touching `MoE`.
"""

import functools
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moesaic.layers.checks import differentiates_forward
from moesaic.layers.router import Routing

__all__ = ["Dispatched", "Dispatcher", "LocalDispatcher", "LocalRows"]


class Dispatched(Protocol):
    """What `mix_experts` needs to know about rows that arrived. A dispatcher keeps what else it needs beside it."""

    @property
    def row_scores(self) -> Tensor:
        """(R, 1), the router's score of each row."""

    @property
    def rows_per_expert(self) -> Tensor:
        """(E,) int64, sums to R: the rows of expert 0 come first, then those of expert 1, ..."""


class Dispatcher(Protocol):
    """`dispatch` gives rows (R, D) sorted by expert; `combine` gives back (T, D) from rows in the same order."""

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Any]: ...

    def combine(self, rows: Tensor, context: Any) -> Tensor: ...


class LocalRows(NamedTuple):
    """The `Dispatched` rows of `LocalDispatcher`, R = T * K less the slots without an expert."""

    row_scores: Tensor
    rows_per_expert: Tensor
    slot_of_row: Tensor
    """(R,) int64: row i is for slot t * K + k, the k-th expert of token t."""
    row_of_slot: Tensor
    """(T * K,) int64: where the result for a slot stands among the rows; R or more for a slot without an expert."""
    top_k: int


class LocalDispatcher:
    """All experts live on this device: sort the rows by expert, and sum them back per token. Nothing is dropped."""

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, LocalRows]:
        """x (T, D) -> rows (R, D) sorted by expert, and what undoes it."""
        top_k = routing.expert_ids.size(1)
        slot_of_row = routing.expert_ids.flatten().argsort(stable=True)
        row_of_slot = torch.empty_like(slot_of_row)
        row_of_slot[slot_of_row] = torch.arange(slot_of_row.size(0), device=x.device)
        slot_of_row = slot_of_row[: routing.num_rows]  # slots without an expert come last
        rows = TakeRows.of(x, slot_of_row, row_of_slot, top_k)
        row_scores = routing.scores.reshape(-1, 1).index_select(0, slot_of_row)
        return rows, LocalRows(row_scores, routing.tokens_per_expert, slot_of_row, row_of_slot, top_k)

    def combine(self, rows: Tensor, context: LocalRows) -> Tensor:
        """Rows (R, D) in the order of `dispatch` -> (T, K, D) summed over K: (T, D)."""
        return SumRows.of(rows, context.slot_of_row, context.row_of_slot, context.top_k)


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
