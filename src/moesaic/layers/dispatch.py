"""Dispatchers bring token rows to their experts and the results back.

A dispatcher is a parameter-free object, so that another one (padded groups for FP8, all-to-all for expert
parallelism) can take its place without touching `MoE`.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moesaic.layers.reordering import SumRows, TakeRows
from moesaic.layers.routing import Routing

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
