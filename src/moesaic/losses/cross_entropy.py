"""Cross-entropy of a linear head without the (T, V) logits."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["linear_cross_entropy"]

IGNORE_INDEX = -100


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_tokens: int = 256) -> Tensor:
    """Mean over valid labels of cross_entropy(hidden @ weight.T, labels), computed chunk by chunk.

    Both gradients are made in the forward pass, while a chunk's logits are still in cache: at most
    (chunk_tokens, V) logits exist at a time, and nothing is recomputed. Under autocast the matmuls run in the autocast
    dtype and the softmax in fp32.

    Args:
        hidden: (T, D).
        weight: (V, D), the head.
        labels: (T,) int64; -100 is ignored.
        chunk_tokens: rows per chunk.

    Returns:
        Scalar, fp32 (fp64 for fp64 input); 0 with zero gradients if every label is ignored.
    """
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
        hidden_grad = torch.zeros_like(hidden) if hidden_needs_grad else None
        weight_grad = torch.zeros_like(weight, dtype=loss_dtype) if weight_needs_grad else None
        valid = labels != IGNORE_INDEX
        num_valid = valid.sum().clamp(min=1)
        loss = torch.zeros((), dtype=loss_dtype, device=hidden.device)
        with torch.autocast(device_type, enabled=False):
            for start in range(0, hidden.size(0), chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                x, keep = hidden[rows].to(matmul_dtype), valid[rows]
                target = labels[rows].masked_fill(~keep, 0)[:, None]
                log_probabilities = (x @ head.T).to(loss_dtype).log_softmax(dim=-1)
                loss -= log_probabilities.gather(1, target).squeeze(1).mul(keep).sum()
                if hidden_grad is None and weight_grad is None:
                    continue
                grad = log_probabilities.exp_()  # softmax - one_hot, in place
                grad.scatter_add_(1, target, torch.full_like(target, -1, dtype=loss_dtype))
                grad *= (keep.to(loss_dtype) / num_valid)[:, None]
                grad = grad.to(matmul_dtype)
                if hidden_grad is not None:
                    hidden_grad[rows] = (grad @ head).to(hidden.dtype)
                if weight_grad is not None:
                    weight_grad += grad.T @ x
        ctx.save_for_backward(hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype))
        return loss / num_valid

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return (
            None if hidden_grad is None else hidden_grad * grad_output.to(hidden_grad.dtype),
            None if weight_grad is None else weight_grad * grad_output.to(weight_grad.dtype),
            None,
            None,
            None,
        )
