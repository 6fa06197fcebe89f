"""Expert parallelism: rows travel to the rank that holds their experts, and the results travel back."""

from typing import NamedTuple

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed import ProcessGroup

from moesaic.layers.dispatch import LocalDispatcher, LocalRows
from moesaic.layers.reordering import SumRows, TakeRows
from moesaic.layers.routing import Routing

__all__ = ["AllToAllDispatcher", "ArrivedRows"]


class ArrivedRows(NamedTuple):
    """The `Dispatched` rows of `AllToAllDispatcher`: R of all ranks, for the experts of this one."""

    row_scores: Tensor
    """(R, 1)."""
    rows_per_expert: Tensor
    """(E / ranks,) int64, for the experts of this rank."""
    own: LocalRows
    """The rows of this rank's own tokens, sorted by expert, before they left."""
    order: Tensor
    """(R,) int64: row i arrived as row order[i]."""
    place: Tensor
    """(R,) int64: the inverse of `order`."""
    sent: list[int]
    """Rows that went to each rank."""
    received: list[int]
    """Rows that came from each rank; their sum is R."""


class AllToAllDispatcher:
    """Each rank of a group holds E / ranks experts: rank 0 the first ones, rank 1 the next. Nothing is dropped.

    The rows of a token go to the ranks of its experts by an all-to-all, and so do their results back. Autograd turns
    each into the opposite one. A rank takes part in all of them, with no row too. The sizes of the messages are the one
    thing that the host waits for.

    The rows of an expert stand in the order of ranks and tokens. Where the ranks share a batch in order, that is the
    order in which one process would have them.

    Args:
        group: the ranks among which the experts are spread.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self._local = LocalDispatcher()

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, ArrivedRows]:
        """x (T, D) -> rows (R, D) sorted by this rank's experts, and what undoes it.

        Raises:
            ValueError: the experts cannot be shared evenly among the ranks.
        """
        ranks = self.group.size()
        rows, own = self._local.dispatch(x, routing)
        num_experts = own.rows_per_expert.size(0)
        if num_experts % ranks:
            raise ValueError(f"{num_experts} experts: must be a multiple of the {ranks} ranks that share them")
        leaving = own.rows_per_expert.unflatten(0, (ranks, -1))  # (rank they go to, its experts)
        arriving = collectives.wait_tensor(collectives.all_to_all_single(leaving.contiguous(), None, None, self.group))
        sent, received = torch.stack((leaving.sum(1), arriving.sum(1))).tolist()
        rows = self._exchange(rows, sent, received)
        scores = self._exchange(own.row_scores, sent, received)
        # what came from one rank is sorted by expert: sort it over all ranks
        expert = torch.arange(arriving.size(1), device=x.device).repeat(ranks)
        expert = expert.repeat_interleave(arriving.flatten(), output_size=sum(received))
        order = expert.argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(order.size(0), device=x.device)
        rows, scores = (TakeRows.of(each, order, place, 1) for each in (rows, scores))
        return rows, ArrivedRows(scores, arriving.sum(0), own, order, place, sent, received)

    def combine(self, rows: Tensor, context: ArrivedRows) -> Tensor:
        """Rows (R, D) in the order of `dispatch` -> (T, D) of this rank's own tokens."""
        rows = SumRows.of(rows, context.order, context.place, 1)
        rows = self._exchange(rows, context.received, context.sent)
        return self._local.combine(rows, context.own)

    def _exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send rows, those for rank 0 first; returns what came, that of rank 0 first."""
        exchanged = collectives.all_to_all_single_autograd(rows.contiguous(), received, sent, self.group)
        arrived: Tensor = collectives.wait_tensor(exchanged)
        return arrived
