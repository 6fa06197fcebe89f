"""Tokens that several ranks have alike, as under tensor parallelism: each brings its share of them to the experts."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from moesaic.layers.dispatch import Dispatcher
from moesaic.layers.routing import Routing, count_tokens

__all__ = ["SharedRows", "SharedTokensDispatcher"]


class SharedRows(NamedTuple):
    """The `Dispatched` rows of `SharedTokensDispatcher`: those of this rank's share of the tokens."""

    row_scores: Tensor
    rows_per_expert: Tensor
    own: Any
    """What the dispatcher below keeps of this share."""
    num_tokens: int
    """T, the tokens that all ranks of the mesh have."""


class SharedTokensDispatcher:
    """Every rank of a mesh has the same T tokens; rank 0 dispatches the first of them, rank 1 the next.

    So each token reaches its experts once. What comes out is gathered, and again the same on all ranks. In backward
    the opposite happens: gradients of tokens and scores are gathered, so that they are whole on every rank.

    Args:
        below: brings the rows of this rank's tokens to their experts.
        mesh: the ranks with the same tokens, of one dimension.
    """

    def __init__(self, below: Dispatcher, mesh: DeviceMesh) -> None:
        self.below = below
        self.mesh = mesh

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, SharedRows]:
        """x (T, D) -> rows (R, D) of this rank's tokens, sorted by expert, and what undoes it."""
        ids = self._share(routing.expert_ids)
        counts = count_tokens(ids, routing.logits.size(1))
        share = Routing(
            logits=self._share(routing.logits),
            scores=self._share(routing.scores),
            expert_ids=ids,
            counts=counts,
            num_rows=None if routing.num_rows is None else int(counts.sum()),
            replayed=routing.replayed,
        )
        rows, own = self.below.dispatch(self._share(x), share)
        return rows, SharedRows(own.row_scores, own.rows_per_expert, own, x.size(0))

    def combine(self, rows: Tensor, context: SharedRows) -> Tensor:
        """Rows (R, D) in the order of `dispatch` -> (T, D) of all tokens, on every rank."""
        share = self.below.combine(rows, context.own)
        shape = torch.Size((context.num_tokens, share.size(1)))
        parts = DTensor.from_local(
            share, self.mesh, [Shard(0)], run_check=False, shape=shape, stride=(share.size(1), 1)
        )
        return parts.full_tensor()

    def _share(self, x: Tensor) -> Tensor:
        """This rank's share of what all ranks have, along the first dimension."""
        alike = DTensor.from_local(x, self.mesh, [Replicate()], run_check=False)
        return alike.redistribute(placements=[Shard(0)]).to_local()
