"""Routing again as before: a choice of experts that is handed in, scored anew."""

import inspect

import torch
from torch import Tensor, nn

from moesaic.layers.checks import INTEGERS, require_ids, require_tensor
from moesaic.layers.routing import Routing

__all__ = ["replay"]


def replay(
    router: nn.Module, tokens: Tensor, routing: Routing, num_experts: int | None, router_state: Tensor | None = None
) -> tuple[Tensor, ...]:
    """What a router gives for tokens (T, D) with the expert_ids (T, K) of `routing` in place of its own choice.

    Args:
        num_experts: E, beyond which no id may be; None if nobody knows.
        router_state: see `Routing.state`; only for a router that asks for it.

    Raises:
        TypeError: no Routing, or ids that are no integers.
        ValueError: a router that cannot; ids of other tokens, or of no expert that exists.
    """
    if not isinstance(routing, Routing):
        raise TypeError(f"MoE: routing: found {type(routing).__name__}; must be a Routing, whose choice is replayed")
    require_tensor("MoE", "routing.expert_ids", routing.expert_ids, (tokens.size(0), None), *INTEGERS)
    expert_ids = routing.expert_ids.long()
    if num_experts is not None:
        require_ids("MoE", "routing.expert_ids", expert_ids, num_experts, ignore=num_experts)
    asked = inspect.signature(router.forward).parameters.values()
    if any(each.name == "expert_ids" or each.kind is each.VAR_KEYWORD for each in asked):
        state = {} if router_state is None else {"router_state": router_state}
        decided: tuple[Tensor, ...] = router(tokens, expert_ids=expert_ids, **state)
        if decided[2] is expert_ids or torch.equal(decided[2], expert_ids):
            return decided
    raise ValueError(
        f"routing: {type(router).__name__} cannot replay a choice; its forward must take expert_ids (T, K), score "
        "these experts and return them"
    )
