"""Layers with `forward_with_routing`, such as `moesaic.layers.MoE`."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.layers import ACTIVATIONS, Experts, FeedForward, LocalDispatcher, MoE, TopKRouter
from moesaic.losses import load_balance_loss, router_z_loss, update_expert_bias
from moesaic.testing.adapter import MoEUnderTest, NotApplicable, Run
from moesaic.testing.reference import dense_moe, gated_expert

__all__ = ["describe_routed"]

UPDATE_RATE = 0.01


def describe_routed(module: nn.Module) -> MoEUnderTest:
    """All there is to know of a `MoE` of this package's parts; losses only of another `RoutedLayer`."""
    layer: Any = module
    router: Any = getattr(module, "router", None)
    known: dict[str, Any] = {"balance_loss": _balance_loss, "z_loss": _z_loss}
    if isinstance(getattr(router, "weight", None), Tensor) and hasattr(router, "dim") and hasattr(router, "top_k"):
        known |= {"dim": router.dim, "top_k": router.top_k, "router_weight": lambda module: module.router.weight}
        if getattr(router, "expert_bias", None) is not None:
            known |= {"expert_bias": lambda module: module.router.expert_bias, "bias_step": _bias_step}
    if isinstance(module, MoE):
        known["expert_parallel"] = _spread_experts
    # a subclass may compute something else, and then has no reference here
    plain_parts = type(router) is TopKRouter and type(getattr(module, "experts", None)) is Experts
    if isinstance(module, MoE) and plain_parts and type(module.shared_expert) in (FeedForward, type(None)):
        known |= {"reference": partial(_reference, layer), "single_expert": partial(_with_one_expert, layer)}
    return MoEUnderTest(module, **known)


def _reference(moe: Any, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    router = moe.router
    return dense_moe(
        x,
        weights["router.weight"],
        gated_expert(
            weights["experts.gate_up_proj"], weights["experts.down_proj"], ACTIVATIONS[moe.experts.activation]
        ),
        top_k=router.top_k,
        score_function=router.score_function,
        normalize_scores=router.normalize_scores,
        score_before_experts=moe.score_before_experts,
        expert_bias=weights.get("router.expert_bias"),
        shared_expert=None if moe.shared_expert is None else _shared_expert(moe, weights),
    )


def _shared_expert(moe: Any, weights: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    activation = ACTIVATIONS[moe.shared_expert.activation]
    gate, up, down = (weights[f"shared_expert.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return lambda x: (activation(x @ gate.T) * (x @ up.T)) @ down.T


def _with_one_expert(moe: Any) -> MoE:
    one: Any = copy.deepcopy(moe)
    router, experts = one.router, one.experts
    router.num_experts = router.top_k = experts.num_experts = 1
    router.weight = nn.Parameter(router.weight.detach()[:1].clone())
    if router.expert_bias is not None:
        router.expert_bias = router.expert_bias[:1].clone()
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach()[:1].clone())
    experts.down_proj = nn.Parameter(experts.down_proj.detach()[:1].clone())
    return one


def _spread_experts(moe: Any, group: Any) -> None:
    from moesaic.layers.all_to_all import AllToAllDispatcher  # torch's collectives, which no other check needs

    for part, ours in ((moe.experts, Experts), (moe.dispatcher, LocalDispatcher)):
        if type(part) is not ours:
            raise NotApplicable(f"{type(part).__name__}: cannot be spread over processes; must be {ours.__name__}")
    if moe.experts.num_experts % group.size():
        raise NotApplicable(
            f"num_experts={moe.experts.num_experts}: must be a multiple of the {group.size()} processes"
        )
    for name, weight in list(moe.experts.named_parameters()):
        own = weight.detach().chunk(group.size())[group.rank()].clone()
        setattr(moe.experts, name, nn.Parameter(own, requires_grad=weight.requires_grad))
    moe.dispatcher = AllToAllDispatcher(group)


def _balance_loss(module: Any, x: Tensor, valid: Tensor | None) -> Tensor:
    _, routing = module.forward_with_routing(x)
    return load_balance_loss(routing.logits, routing.expert_ids, None if valid is None else valid.flatten())


def _z_loss(module: Any, x: Tensor) -> Tensor:
    _, routing = module.forward_with_routing(x)
    return router_z_loss(routing.logits)


def _bias_step(module: Any, micro_batches: Sequence[Tensor], run: Run) -> None:
    """As the training module does: counts from the returned routings, one update between backward and step."""
    counts = torch.zeros((), dtype=torch.int64)
    for x in micro_batches:
        y, routing = run(module.forward_with_routing, x)
        y.float().square().mean().backward()
        counts = counts.to(y.device) + routing.tokens_per_expert
    update_expert_bias(module.router.expert_bias, counts, UPDATE_RATE)
