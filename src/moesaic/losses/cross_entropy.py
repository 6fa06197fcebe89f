"""Cross-entropy of a linear head without the (T, V) logits."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.layers.checks import differentiates_forward, require_floating, require_ids, require_sizes, require_tensor
from moesaic.layers.routing import at_least_fp32
from moesaic.losses.kept_gradients import (
    Wanted,
    first_derivative,
    keep_gradients,
    one_after_the_other,
    scaled_gradients,
    wanted_gradients,
)

__all__ = ["likeliest_tokens", "linear_cross_entropy", "token_cross_entropy"]

IGNORE_INDEX = -100
CHUNK_ELEMENTS = 23_000_000
VOCABULARY_BLOCK = 16384
"""In mixed precision products are taken for this many vocabulary entries at a time, so that temporaries are small."""


def rows_per_chunk(vocab_size: int) -> int:
    """64 to 256, so that a chunk's logits stay near 90 MB."""
    return max(64, min(256, CHUNK_ELEMENTS // vocab_size))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    num_valid: Tensor | int | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Mean over valid labels of cross_entropy(hidden @ weight.T, labels), computed chunk by chunk.

    Both gradients are made in the forward pass, while a chunk's logits are still in cache: at most
    (chunk_tokens, V) logits exist at a time, and nothing is recomputed. Under autocast the matmuls run in the autocast
    dtype and the softmax in fp32. `torch.func.grad` works, and `vmap` takes one element of the batch after the other.
    A compiler, an export and forward-mode derivatives get the loss of all (T, V) logits at once instead.

    torch 2.13 has `F.linear_cross_entropy` with a chunked path too. On one CPU thread in fp32, at (T, V, D) =
    (2048, 2048, 96), it takes 1.3 times our time with its own chunks, and as long with ours. It is not used here: its
    chunked path has no torch.func, its loss of bf16 inputs is rounded to bf16, and it would not be bit-equal to earlier
    runs. On a CPU without bf16 arithmetic it takes a tenth of our time in bf16, as it multiplies in fp32 (docs/LOG.md).

    Args:
        hidden: (T, D).
        weight: (V, D), the head; where ranks with the same tokens share the vocabulary, a DTensor sharded along V.
        labels: (T,) int64; -100 is ignored.
        num_valid: tokens to divide by; None counts the valid labels. With those of the global batch, the losses of
            micro-batches and ranks add up to that of the whole.
        chunk_tokens: rows per chunk; None takes 64 to 256, so that a chunk's logits stay near 90 MB.

    Returns:
        Scalar, fp32 (fp64 for fp64 input); 0 with zero gradients if every label is ignored.

    Raises:
        TypeError: what is given is no tensor of the right dtype.
        ValueError: another shape, or on a CPU a label outside the vocabulary.
    """
    require_head("linear_cross_entropy", hidden, weight)
    require_labels("linear_cross_entropy", labels, hidden.size(0), weight.size(0), IGNORE_INDEX)
    require_counts("linear_cross_entropy", num_valid, chunk_tokens)
    if _is_shared(weight):
        from moesaic.losses.shared_vocabulary import shared_cross_entropy  # torch.distributed, which few runs need

        return shared_cross_entropy(hidden, weight, labels, num_valid, chunk_tokens)
    if needs_logits():
        nats = F.cross_entropy(at_least_fp32(F.linear(hidden, weight.to(hidden.dtype))), labels, reduction="sum")
        return nats / tokens_to_divide_by(num_valid, labels != IGNORE_INDEX)
    if chunk_tokens is None:
        chunk_tokens = rows_per_chunk(weight.size(0))
    wanted = wanted_gradients(hidden, weight)
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, num_valid, chunk_tokens, wanted)[0]
    return loss


@torch.no_grad()
def token_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_tokens: int | None = None) -> Tensor:
    """Cross-entropy of every token, chunk by chunk as in `linear_cross_entropy`, without gradients.

    Equal to cross_entropy over all logits at once, which are never built: at most (chunk_tokens, V) exist at a time.

    Args:
        hidden: (T, D).
        weight: (V, D), the head; where ranks with the same tokens share the vocabulary, a DTensor sharded along V.
        labels: (T,) int64; -100 is ignored.
        chunk_tokens: rows per chunk; None takes 64 to 256, so that a chunk's logits stay near 90 MB.

    Returns:
        (T,) fp32 nats; 0 where the label is ignored.

    Raises:
        TypeError: what is given is no tensor of the right dtype.
        ValueError: another shape, or on a CPU a label outside the vocabulary.
    """
    require_head("token_cross_entropy", hidden, weight)
    require_labels("token_cross_entropy", labels, hidden.size(0), weight.size(0), IGNORE_INDEX)
    require_counts("token_cross_entropy", None, chunk_tokens)
    if _is_shared(weight):
        from moesaic.losses.shared_vocabulary import shared_token_cross_entropy

        return shared_token_cross_entropy(hidden, weight, labels, chunk_tokens)
    nats = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
    return by_chunks(
        hidden,
        weight,
        chunk_tokens,
        nats,
        lambda head, rows: F.cross_entropy(head.logits(rows), labels[rows], reduction="none"),
    )


def likeliest_tokens(hidden: Tensor, weight: Tensor, *, chunk_tokens: int | None = None) -> Tensor:
    """The token of the largest logit at every place, chunk by chunk as in `token_cross_entropy`, without gradients.

    Args:
        hidden: (T, D).
        weight: (V, D), the head.
        chunk_tokens: rows per chunk; None takes 64 to 256, so that a chunk's logits stay near 90 MB.

    Returns:
        (T,) int64; of equal logits the first.

    Raises:
        TypeError: what is given is no tensor of the right dtype.
        ValueError: another shape.
    """
    require_head("likeliest_tokens", hidden, weight)
    require_counts("likeliest_tokens", None, chunk_tokens)
    found = torch.empty(hidden.size(0), dtype=torch.int64, device=hidden.device)
    return by_chunks(hidden, weight, chunk_tokens, found, lambda head, rows: head.logits(rows).argmax(dim=-1))


@torch.no_grad()
def by_chunks(
    hidden: Tensor,
    weight: Tensor,
    chunk_tokens: int | None,
    out: Tensor,
    of_chunk: Callable[["ChunkedHead", slice], Tensor],
) -> Tensor:
    """`out` (T,), filled with what `of_chunk` gives for a head and some rows of hidden (T, D), in fp32."""
    chunk = max(1, min(chunk_tokens or rows_per_chunk(weight.size(0)), hidden.size(0)))
    head = ChunkedHead(hidden, weight, (False, False), torch.float32, chunk)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, hidden.size(0), chunk):
            rows = slice(start, start + chunk)
            out[rows] = of_chunk(head, rows)
    return out


def summed_over_chunks(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    num_valid: Tensor | int | None,
    chunk_tokens: int,
    wanted: Wanted,
    of_chunk: Callable[["ChunkedHead", slice, Tensor, Tensor], Tensor],
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """A mean over valid labels and its gradients by hidden and weight.

    Args:
        of_chunk: of a head, rows, their labels and what each of them weighs: the sum of their losses. It gives the head
            the gradient of its logits.
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    chunk = max(1, min(chunk_tokens, hidden.size(0)))
    head = ChunkedHead(hidden, weight, wanted.of, dtype, chunk)
    denominator = tokens_to_divide_by(num_valid, labels != IGNORE_INDEX)
    loss = torch.zeros((), dtype=dtype, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, hidden.size(0), chunk):
            rows = slice(start, start + chunk)
            loss += of_chunk(head, rows, labels[rows], 1 / denominator.to(dtype))
    return loss / denominator, head.gradients()


def _is_shared(weight: Tensor) -> bool:
    """Whether ranks have parts of it: told by a method of DTensors, so that nothing here imports them."""
    return hasattr(weight, "to_local")


def needs_logits() -> bool:
    """Whether chunks, whose gradients are made in the forward pass, cannot serve: all logits can."""
    return torch.compiler.is_compiling() or differentiates_forward()


def require_head(owner: str, hidden: Any, weight: Any, *names: str) -> None:
    """Raise unless hidden is (T, D) and weight (V, D), both of floating point.

    Raises:
        TypeError: no floating-point tensor.
        ValueError: another shape.
    """
    hidden_name, weight_name = names or ("hidden", "weight")
    require_floating(owner, **{hidden_name: hidden, weight_name: weight})
    require_tensor(owner, hidden_name, hidden, (None, None))
    require_tensor(owner, weight_name, weight, (None, hidden.size(1)))


def require_labels(owner: str, labels: Any, tokens: int, vocab_size: int, ignore: int) -> None:
    """Raise unless labels are (T,) int64.

    Raises:
        TypeError: no tensor of int64.
        ValueError: another shape, or on a CPU a label that is neither in the vocabulary nor `ignore`.
    """
    require_tensor(owner, "labels", labels, (tokens,), torch.int64)
    require_ids(owner, "labels", labels, vocab_size, ignore)


def require_counts(owner: str, num_valid: Any, chunk_tokens: Any) -> None:
    """Raise TypeError or ValueError unless each is None or a number of tokens; num_valid may be a tensor of one."""
    if isinstance(num_valid, Tensor):
        if num_valid.numel() != 1:
            raise ValueError(f"{owner}: num_valid of shape {tuple(num_valid.shape)}; must be one number")
    elif num_valid is not None:
        require_sizes(0, num_valid=num_valid)
    if chunk_tokens is not None:
        require_sizes(chunk_tokens=chunk_tokens)


def tokens_to_divide_by(num_valid: Tensor | int | None, valid: Tensor) -> Tensor:
    """`num_valid`, or the number of True in valid (T,); at least 1."""
    count = valid.sum() if num_valid is None else torch.as_tensor(num_valid, device=valid.device)
    return count.clamp(min=1)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        num_valid: Tensor | int | None,
        chunk_tokens: int,
        wanted: Wanted,
    ) -> tuple[Tensor | None, ...]:
        loss, gradients = summed_over_chunks(hidden, weight, labels, num_valid, chunk_tokens, wanted, _chunk)
        return loss, *gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        keep_gradients(ctx, inputs[-1], inputs[:2], output[1:])

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_output: Tensor, *further: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = scaled_gradients(ctx, slice(0, 2), grad_output, further, "linear_cross_entropy")
        return *gradients, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        return one_after_the_other(_LinearCrossEntropy, info.batch_size, in_dims, arguments)


def _chunk(head: "ChunkedHead", rows: slice, labels: Tensor, weight_per_token: Tensor) -> Tensor:
    """Sum of the losses of one chunk; gives the head the gradient of its logits, scaled."""
    valid = (labels != IGNORE_INDEX)[:, None]
    target = labels[:, None].masked_fill(~valid, 0)
    buffer = head.logits(rows)
    # softmax step by step in place: no second (C, V) tensor
    target_logits = buffer.gather(1, target)
    top = buffer.amax(dim=1, keepdim=True)
    exponentials = buffer.sub_(top).exp_()
    total = exponentials.sum(dim=1, keepdim=True)
    loss = (total.log() + top - target_logits).masked_fill(~valid, 0).sum()
    if head.needs_grad:
        scale = valid.to(buffer.dtype) * weight_per_token
        # (softmax - one_hot) * scale
        head.add_gradients(rows, exponentials.mul_(scale / total).scatter_add_(1, target, -scale))
    return loss


class ChunkedHead:
    """A linear head within a loop over chunks: logits of some rows, and from their gradient those of both factors.

    Args:
        hidden: (T, D).
        weight: (V, D).
        needs_grad: of both.
        dtype: of the logits and of sums.
        chunk: rows at a time, at most.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, needs_grad: Sequence[bool], dtype: torch.dtype, chunk: int
    ) -> None:
        device_type = hidden.device.type
        autocast = torch.is_autocast_enabled(device_type)
        self.hidden = hidden
        self.weight_dtype = weight.dtype
        self.head = weight.to(torch.get_autocast_dtype(device_type) if autocast else hidden.dtype)
        self.hidden_grad = torch.empty_like(hidden) if needs_grad[0] else None
        self.weight_grad = torch.zeros_like(weight, dtype=dtype) if needs_grad[1] else None
        self.buffer = torch.empty(chunk, weight.size(0), dtype=dtype, device=hidden.device)
        self.blocks = [slice(i, i + VOCABULARY_BLOCK) for i in range(0, weight.size(0), VOCABULARY_BLOCK)]

    @property
    def needs_grad(self) -> bool:
        return self.hidden_grad is not None or self.weight_grad is not None

    def logits(self, rows: slice) -> Tensor:
        """(C, V) in the buffer."""
        x = self.hidden[rows].to(self.head.dtype)
        buffer = self.buffer[: x.size(0)]
        if x.dtype == buffer.dtype:
            return torch.mm(x, self.head.T, out=buffer)
        for block in self.blocks:
            buffer[:, block] = x @ self.head[block].T
        return buffer

    def add_gradients(self, rows: slice, grad: Tensor) -> None:
        """`grad` (C, V) is that of these rows' logits."""
        x = self.hidden[rows].to(self.head.dtype)
        if x.dtype == grad.dtype:
            if self.hidden_grad is not None:
                torch.mm(grad, self.head, out=self.hidden_grad[rows])
            if self.weight_grad is not None:
                self.weight_grad.addmm_(grad.T, x)
            return
        summed = torch.zeros_like(x, dtype=grad.dtype)
        for block in self.blocks:
            grad_block = grad[:, block].to(x.dtype)
            if self.hidden_grad is not None:
                summed += grad_block @ self.head[block]
            if self.weight_grad is not None:
                self.weight_grad[block] += grad_block.T @ x
        if self.hidden_grad is not None:
            self.hidden_grad[rows] = summed

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        del self.buffer  # before weight_grad is cast
        return self.hidden_grad, None if self.weight_grad is None else self.weight_grad.to(self.weight_dtype)
