"""Cross-entropy of a linear head without the (T, V) logits."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["linear_cross_entropy"]

IGNORE_INDEX = -100
CHUNK_ELEMENTS = 23_000_000
VOCABULARY_BLOCK = 16384
"""In mixed precision products are taken for this many vocabulary entries at a time, so that temporaries are small."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_tokens: int | None = None) -> Tensor:
    """Mean over valid labels of cross_entropy(hidden @ weight.T, labels), computed chunk by chunk.

    Both gradients are made in the forward pass, while a chunk's logits are still in cache: at most
    (chunk_tokens, V) logits exist at a time, and nothing is recomputed. Under autocast the matmuls run in the autocast
    dtype and the softmax in fp32.

    Args:
        hidden: (T, D).
        weight: (V, D), the head.
        labels: (T,) int64; -100 is ignored.
        chunk_tokens: rows per chunk; None takes 64 to 256, so that a chunk's logits stay near 90 MB.

    Returns:
        Scalar, fp32 (fp64 for fp64 input); 0 with zero gradients if every label is ignored.
    """
    if chunk_tokens is None:
        chunk_tokens = max(64, min(256, CHUNK_ELEMENTS // weight.size(0)))
    return _LinearCrossEntropy.apply(hidden, weight, labels, chunk_tokens, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int, grad_enabled: bool
    ) -> Tensor:
        device_type = hidden.device.type
        autocast = torch.is_autocast_enabled(device_type)
        matmul_dtype = torch.get_autocast_dtype(device_type) if autocast else hidden.dtype
        loss_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        head = weight.to(matmul_dtype)
        # needs_input_grad ignores no_grad
        hidden_needs_grad, weight_needs_grad = (grad_enabled and needs for needs in ctx.needs_input_grad[:2])
        hidden_grad = torch.empty_like(hidden) if hidden_needs_grad else None
        weight_grad = torch.zeros_like(weight, dtype=loss_dtype) if weight_needs_grad else None
        num_valid = (labels != IGNORE_INDEX).sum().clamp(min=1)
        loss = torch.zeros((), dtype=loss_dtype, device=hidden.device)
        if hidden.size(0):
            chunk = min(chunk_tokens, hidden.size(0))
            buffer = torch.empty(chunk, weight.size(0), dtype=loss_dtype, device=hidden.device)
            with torch.autocast(device_type, enabled=False):
                for start in range(0, hidden.size(0), chunk):
                    rows = slice(start, start + chunk)
                    grad_rows = None if hidden_grad is None else hidden_grad[rows]
                    x, label = hidden[rows].to(matmul_dtype), labels[rows]
                    loss += _chunk(
                        x, head, label, 1 / num_valid.to(loss_dtype), buffer[: x.size(0)], grad_rows, weight_grad
                    )
            del buffer  # before weight_grad is cast
        # not save_for_backward: the only reference lets backward scale the gradients in place, without a second copy
        ctx.gradients = (hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype))
        return loss / num_valid

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy: backward a second time; its gradients were handed out already")
        hidden_grad, weight_grad = ctx.gradients
        ctx.gradients = None
        for gradient in (hidden_grad, weight_grad):
            if gradient is not None:
                gradient.mul_(grad_output.to(gradient.dtype))
        return hidden_grad, weight_grad, None, None, None


def _chunk(
    x: Tensor,
    head: Tensor,
    labels: Tensor,
    weight_per_token: Tensor,
    buffer: Tensor,
    hidden_grad: Tensor | None,
    weight_grad: Tensor | None,
) -> Tensor:
    """Sum of the losses of one chunk; writes the gradient of x and adds to that of the head, both scaled.

    Args:
        x: (C, D), and head (V, D), in the dtype of the matmuls.
        buffer: (C, V) to work in, in the dtype of the loss.
        hidden_grad: (C, D), or None.
        weight_grad: (V, D) in the dtype of the loss, or None.
    """
    valid = (labels != IGNORE_INDEX)[:, None]
    target = labels[:, None].masked_fill(~valid, 0)
    blocks = [slice(i, i + VOCABULARY_BLOCK) for i in range(0, head.size(0), VOCABULARY_BLOCK)]
    if x.dtype == buffer.dtype:
        torch.mm(x, head.T, out=buffer)
    else:
        for block in blocks:
            buffer[:, block] = x @ head[block].T
    # softmax step by step in place: no second (C, V) tensor
    target_logits = buffer.gather(1, target)
    top = buffer.amax(dim=1, keepdim=True)
    exponentials = buffer.sub_(top).exp_()
    total = exponentials.sum(dim=1, keepdim=True)
    loss = (total.log() + top - target_logits).masked_fill(~valid, 0).sum()
    if hidden_grad is None and weight_grad is None:
        return loss
    scale = valid.to(buffer.dtype) * weight_per_token
    grad = exponentials.mul_(scale / total).scatter_add_(1, target, -scale)  # (softmax - one_hot) * scale
    if x.dtype == buffer.dtype:
        if hidden_grad is not None:
            torch.mm(grad, head, out=hidden_grad)
        if weight_grad is not None:
            weight_grad.addmm_(grad.T, x)
        return loss
    summed = torch.zeros_like(x, dtype=buffer.dtype)
    for block in blocks:
        grad_block = grad[:, block].to(x.dtype)
        if hidden_grad is not None:
            summed += grad_block @ head[block]
        if weight_grad is not None:
            weight_grad[block] += grad_block.T @ x
    if hidden_grad is not None:
        hidden_grad.copy_(summed)
    return loss
