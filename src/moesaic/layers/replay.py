"""Routing again as before: a choice of experts that is handed in, scored anew."""

import inspect

import torch
from torch import Tensor, nn

from moesaic.layers.routing import Routing

__all__ = ["replay"]


def replay(router: nn.Module, tokens: Tensor, routing: Routing) -> tuple[Tensor, ...]:
    """What a router gives for tokens (T, D) with the expert_ids (T, K) of `routing` in place of its own choice.

    Raises:
        TypeError: no Routing.
        ValueError: a router that cannot.
    """
    if not isinstance(routing, Routing):
        raise TypeError(f"MoE: routing: found {type(routing).__name__}; must be a Routing, whose choice is replayed")
    asked = inspect.signature(router.forward).parameters.values()
    if any(each.name == "expert_ids" or each.kind is each.VAR_KEYWORD for each in asked):
        decided = tuple(router(tokens, expert_ids=routing.expert_ids))
        if decided[2] is routing.expert_ids or torch.equal(decided[2], routing.expert_ids):
            return decided
    raise ValueError(
        f"routing: {type(router).__name__} cannot replay a choice; its forward must take expert_ids (T, K), score "
        "these experts and return them"
    )
