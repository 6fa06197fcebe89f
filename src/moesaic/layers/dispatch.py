"""Dispatchers bring token rows to their experts and the results back.

A dispatcher is a parameter-free object, so that another one (padded groups for FP8, all-to-all for expert
parallelism) can take its place without touching `MoE`.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moesaic.layers.router import Routing

__all__ = ["DispatchContext", "Dispatcher", "LocalDispatcher"]


class DispatchContext(NamedTuple):
    """What `combine` needs to undo `dispatch`, and what the experts need to know about the rows (R = T * K)."""

    row_scores: Tensor
    """(R, 1), the router's score of each dispatched row."""
    rows_per_expert: Tensor
    """(E,) int64: the rows of expert 0 come first, then those of expert 1, ..."""
    row_of_slot: Tensor
    """(R,) int64: where the result for slot t * K + k stands among the rows."""
    top_k: int


class Dispatcher(Protocol):
    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, DispatchContext]: ...

    def combine(self, rows: Tensor, context: DispatchContext) -> Tensor: ...


class LocalDispatcher:
    """All experts live on this device: sort the rows by expert, and sum them back per token. Nothing is dropped."""

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, DispatchContext]:
        """x (T, D) -> rows (R, D) sorted by expert, and the context."""
        top_k = routing.expert_ids.size(1)
        slot_of_row = routing.expert_ids.flatten().argsort(stable=True)
        row_of_slot = torch.empty_like(slot_of_row)
        row_of_slot[slot_of_row] = torch.arange(slot_of_row.size(0), device=x.device)
        token_of_row = slot_of_row if top_k == 1 else slot_of_row // top_k
        # index_select, not x[...]: its backward is a plain index_add
        rows = x.index_select(0, token_of_row)
        row_scores = routing.scores.reshape(-1, 1).index_select(0, slot_of_row)
        return rows, DispatchContext(row_scores, routing.tokens_per_expert, row_of_slot, top_k)

    def combine(self, rows: Tensor, context: DispatchContext) -> Tensor:
        """Rows (R, D) in the order of `dispatch` -> (T, K, D) summed over K: (T, D)."""
        slots = rows.index_select(0, context.row_of_slot)
        return slots if context.top_k == 1 else slots.unflatten(0, (-1, context.top_k)).sum(dim=1)
