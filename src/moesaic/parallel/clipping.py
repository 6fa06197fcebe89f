"""Clipping by the norm of all gradients, however they are laid out."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.parallel.shards import held, is_sharded, whole

__all__ = ["clip_gradients", "total_norm"]


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Root of the summed squares of gradients, () of their dtype, each of them once.

    Every rank must ask for it. Gradients of one mesh have one norm, over all its ranks; the norms are combined.
    """
    by_mesh: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        by_mesh.setdefault(getattr(gradient, "device_mesh", None), []).append(gradient)
    norms = [whole(torch.nn.utils.get_total_norm(each)) for each in by_mesh.values()]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients in place so that their total norm is at most `limit`; returns the norm before, ()."""
    parameters = list(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not any(is_sharded(gradient) for gradient in gradients):
        return torch.nn.utils.clip_grad_norm_(parameters, limit)
    norm = total_norm(gradients)
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)  # as torch's own
    torch._foreach_mul_([held(gradient) for gradient in gradients], factor)
    return norm
