"""Cross-entropy of a linear head whose vocabulary is shared by ranks that have the same tokens.

As `moesaic.losses.cross_entropy`, chunk by chunk. Ranks exchange two numbers and a maximum per token, never logits.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

from moesaic.losses.cross_entropy import IGNORE_INDEX, ChunkedHead, by_chunks, rows_per_chunk, summed_over_chunks
from moesaic.losses.kept_gradients import Wanted, first_derivative, keep_gradients, scaled_gradients, wanted_gradients

__all__ = ["shared_cross_entropy", "shared_token_cross_entropy"]


class _Share(NamedTuple):
    """The entries of a vocabulary that one rank has."""

    group: ProcessGroup
    first: int
    """Id of the first entry."""
    size: int

    @classmethod
    def of(cls, weight: Any) -> "_Share":
        """That of a head, a DTensor (V, D) which is sharded evenly along V."""
        group = weight.device_mesh.get_group()
        size = weight.size(0) // group.size()
        return cls(group, group.rank() * size, size)


def shared_cross_entropy(
    hidden: Tensor, weight: Any, labels: Tensor, num_valid: Tensor | int | None, chunk_tokens: int | None
) -> Tensor:
    """`linear_cross_entropy` where weight (V, D) is a DTensor, sharded evenly along V over ranks.

    Every rank must call it with the same other arguments. All get the loss of all, and the whole gradient of hidden.
    """
    share, here = _Share.of(weight), weight.to_local()
    chunk = chunk_tokens or rows_per_chunk(share.size)
    wanted = wanted_gradients(hidden, here)
    loss: Tensor = _SharedCrossEntropy.apply(hidden, here, labels, num_valid, chunk, share, wanted)[0]
    return loss


@torch.no_grad()
def shared_token_cross_entropy(hidden: Tensor, weight: Any, labels: Tensor, chunk_tokens: int | None) -> Tensor:
    """`token_cross_entropy` where weight (V, D) is a DTensor, sharded evenly along V over ranks."""
    share = _Share.of(weight)
    nats = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
    return by_chunks(
        hidden, weight.to_local(), chunk_tokens, nats, lambda head, rows: _chunk(head, rows, labels[rows], None, share)
    )


class _SharedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        num_valid: Tensor | int | None,
        chunk_tokens: int,
        share: _Share,
        wanted: Wanted,
    ) -> tuple[Tensor | None, ...]:
        def of_chunk(head: ChunkedHead, rows: slice, labels: Tensor, weight_per_token: Tensor) -> Tensor:
            return _chunk(head, rows, labels, weight_per_token, share).sum()

        loss, gradients = summed_over_chunks(hidden, weight, labels, num_valid, chunk_tokens, wanted, of_chunk)
        if gradients[0] is not None:  # through the logits of all ranks
            all_reduce(gradients[0], group=share.group)
        keep_gradients(ctx, wanted, (hidden, weight), gradients)
        return loss, *gradients

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_output: Tensor, *further: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = scaled_gradients(ctx, slice(0, 2), grad_output, further, "linear_cross_entropy")
        return *gradients, None, None, None, None, None


def _chunk(head: ChunkedHead, rows: slice, labels: Tensor, weight_per_token: Tensor | None, share: _Share) -> Tensor:
    """Nats (C,) of one chunk, 0 where ignored; gives the head the gradient of its logits, scaled."""
    valid = (labels != IGNORE_INDEX)[:, None]
    target = labels[:, None] - share.first
    is_here = valid & (target >= 0) & (target < share.size)
    target = target.masked_fill(~is_here, 0)
    buffer = head.logits(rows)
    top = buffer.amax(dim=1, keepdim=True)
    all_reduce(top, ReduceOp.MAX, group=share.group)
    buffer.sub_(top)
    target_logits = buffer.gather(1, target).masked_fill(~is_here, 0)
    exponentials = buffer.exp_()
    sums = torch.stack((exponentials.sum(dim=1, keepdim=True), target_logits))
    all_reduce(sums, group=share.group)
    total, target_logits = sums
    nats = (total.log() - target_logits).masked_fill(~valid, 0)
    if head.needs_grad:
        assert weight_per_token is not None
        scale = valid.to(buffer.dtype) * weight_per_token
        one_hot = -scale * is_here
        head.add_gradients(rows, exponentials.mul_(scale / total).scatter_add_(1, target, one_hot))
    return nats[:, 0]
