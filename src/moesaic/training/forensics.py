"""Where a network broke."""

import torch
from torch import Tensor

from moesaic.models import Decoder

__all__ = ["describe_break"]


@torch.no_grad()
def describe_break(decoder: Decoder, tokens: Tensor) -> str:
    """Name the first layer whose output on `tokens` (B, L) is not finite, else the first such gradient."""
    x = decoder.embedding(tokens)
    for i, block in enumerate(decoder.layers):
        x, _ = block(x)
        if not bool(x.isfinite().all()):
            return f"layers.{i} is the first layer with a non-finite output"
    for name, parameter in decoder.named_parameters():
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            return f"all layers' outputs are finite, the gradient of {name} is not"
    return "all layers' outputs are finite, the gradient of no parameter is not"
