"""Where a network broke."""

import torch
from torch import Tensor

from moesaic.models import Decoder
from moesaic.parallel.shards import is_sharded, whole

__all__ = ["describe_break"]


@torch.no_grad()
def describe_break(decoder: Decoder, tokens: Tensor) -> str:
    """Name the first layer whose output on `tokens` (B, L) is not finite, else the first such gradient.

    Of a decoder that is spread over ranks, each of which has tokens of its own, the gradients alone.
    """
    is_spread = is_sharded(decoder.embedding.weight)
    if not is_spread:
        x = decoder.embedding(tokens)
        state = None
        for i, block in enumerate(decoder.layers):
            x, routing = block(x, token_ids=tokens, router_state=state)
            state = state if routing is None else routing.state
            if not bool(x.isfinite().all()):
                return f"layers.{i} is the first layer with a non-finite output"
    known = "" if is_spread else "all layers' outputs are finite, "
    for name, parameter in decoder.named_parameters():
        if parameter.grad is not None and not bool(whole(parameter.grad).isfinite().all()):
            return f"{known}the gradient of {name} is {'the first that is ' if is_spread else ''}not"
    return f"{known}the gradient of no parameter is not"
