"""Layers with `forward_with_routing`, such as `moesaic.layers.MoE`."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.layers import (
    ACTIVATIONS,
    ROUTERS,
    Experts,
    FeedForward,
    LocalDispatcher,
    MlpRouter,
    MoE,
    MovingRouter,
    ReluRouter,
    Routing,
    ThresholdRouter,
    TopKRouter,
)
from moesaic.layers.latent import Latent
from moesaic.layers.routers import RouterName
from moesaic.losses import load_balance_loss, router_z_loss, update_expert_bias
from moesaic.testing.adapter import MoEUnderTest, NotApplicable, Run
from moesaic.testing.placing import token_ids_of
from moesaic.testing.reference import Expert, dense_moe, gated_expert

__all__ = ["ROUTED", "describe_routed", "layer_with_router"]

UPDATE_RATE = 0.01

STATES = ("expert_bias", "thresholds", "sparsity_weight")
"""Buffers of routers that training moves."""


def layer_with_router(name: RouterName, num_experts: int = 4) -> MoE:
    """A small layer with a router of `ROUTERS` in its default settings, scores on the output, and no shared expert.

    A threshold router is past its first step, so that its tokens have different numbers of experts.
    """
    top_k = min(2, num_experts)
    extra: dict[str, dict[str, Any]] = {
        "group_limited": {"num_groups": top_k, "top_groups": 1, "scored_by": min(2, num_experts // top_k)},
        "hash": {"vocab_size": 64},
        "top_p": {"score_function": "softmax"},
        "mlp": {"router_dim": 8},
    }
    router = ROUTERS[name](16, num_experts, top_k=top_k, **extra.get(name, {}))
    if isinstance(router, ThresholdRouter):
        router.thresholds.copy_(torch.linspace(0.4, 0.7, num_experts))
        router.steps += 1
    return MoE.build(16, 24, num_experts, router=router, score_before_experts=False, shared_hidden_dim=0)


ROUTED: dict[str, Callable[..., MoE]] = {
    f"moesaic-{name.replace('_', '-')}": partial(layer_with_router, name) for name in ROUTERS
}
"""Factories of one small layer for each router, by name."""


def describe_routed(module: nn.Module) -> MoEUnderTest:
    """All there is to know of a `MoE` of this package's parts; losses only of another `RoutedLayer`."""
    layer: Any = module
    router: Any = getattr(module, "router", None)
    known: dict[str, Any] = {"balance_loss": _balance_loss, "z_loss": _z_loss}
    if isinstance(getattr(router, "weight", None), Tensor) and hasattr(router, "dim") and hasattr(router, "top_k"):
        known |= {"dim": router.dim, "top_k": router.top_k, "num_experts": router.weight.size(0)}
        if router.weight.size(1) == router.dim:
            known["router_weight"] = lambda module: module.router.weight
    if isinstance(module, MoE):
        known |= {"forward": _forward, "expert_parallel": _spread_experts}
        known |= {"choice": _choice, "replay": _replay, "load": _load, "takes_no_expert": True}
        if _state(module) is not None:
            step = _moving_step if isinstance(router, MovingRouter) else _bias_step
            known |= {"expert_bias": _state, "bias_step": step}
    # a subclass may compute something else, and then has no reference here
    ours = type(router) in ROUTERS.values() and type(getattr(module, "experts", None)) is Experts
    if isinstance(module, MoE) and ours and type(module.shared_expert) in (FeedForward, type(None)):
        if module.latent is None or module.latent.norm is None or not module.score_before_experts:
            known |= {"reference": partial(_reference, layer), "replay_reference": partial(_reference, layer)}
        if type(router) is TopKRouter:
            known["single_expert"] = partial(_with_one_expert, layer)
    return MoEUnderTest(module, **known)


def _reference(moe: Any, weights: Mapping[str, Tensor], x: Tensor, expert_ids: Tensor | None = None) -> Tensor:
    """In float64. Routers beyond top-k choose themselves: what is compared is what comes of their choice."""
    router = moe.router
    if expert_ids is None and type(router) is not TopKRouter:
        expert_ids = _choice(moe, x.detach().to(router.weight.dtype)[None])
    expert = gated_expert(
        weights["experts.gate_up_proj"], weights["experts.down_proj"], ACTIVATIONS[moe.experts.activation]
    )
    return dense_moe(
        x,
        weights["router.weight"] * router.logit_scale,
        expert if moe.latent is None else _in_between(moe.latent, weights, expert),
        top_k=router.top_k,
        score_function="relu" if isinstance(router, ReluRouter) else router.score_function,
        normalize_scores=router.normalize_scores,
        score_before_experts=moe.score_before_experts,
        scale=router.scale,
        router_bias=weights["router.bias"] * router.logit_scale if "router.bias" in weights else None,
        expert_bias=weights.get("router.expert_bias"),
        expert_ids=expert_ids,
        router_input=_features(router, weights, x) if isinstance(router, MlpRouter) else None,
        shared_expert=None if moe.shared_expert is None else _shared_expert(moe, weights),
    )


def _in_between(latent: Latent, weights: Mapping[str, Tensor], expert: Expert) -> Expert:
    """An expert with the projections around it. That up is linear, so the sum over experts may follow it."""

    def run(e: int, rows: Tensor) -> Tensor:
        rows = rows @ weights["latent.down_proj.weight"].T
        if latent.norm is not None:
            rows = _normed(latent.norm.eps, 1 + weights["latent.norm.weight"], rows)
        return expert(e, rows) @ weights["latent.up_proj.weight"].T

    return run


def _features(router: MlpRouter, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    hidden = F.linear(x, weights["router.down_proj.weight"], weights["router.down_proj.bias"])
    hidden = _normed(router.norm.eps, weights["router.norm.weight"], hidden)
    for i in range(len(router.hidden)):
        hidden = F.gelu(F.linear(hidden, weights[f"router.hidden.{i}.weight"], weights[f"router.hidden.{i}.bias"]))
    return hidden


def _normed(eps: float, gain: Tensor, x: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * gain


def _shared_expert(moe: Any, weights: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    activation = ACTIVATIONS[moe.shared_expert.activation]
    gate, up, down = (weights[f"shared_expert.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return lambda x: (activation(x @ gate.T) * (x @ up.T)) @ down.T


def _with_one_expert(moe: Any) -> MoE:
    one: Any = copy.deepcopy(moe)
    router, experts = one.router, one.experts
    router.num_experts = router.top_k = experts.num_experts = 1
    router.weight = nn.Parameter(router.weight.detach()[:1].clone())
    if router.bias is not None:
        router.bias = nn.Parameter(router.bias.detach()[:1].clone())
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


def _run(module: Any, x: Tensor, expert_ids: Tensor | None = None) -> tuple[Tensor, Routing]:
    asked: dict[str, Any] = {}
    if expert_ids is not None:
        none = x.new_zeros(expert_ids.size(0), 1)
        asked["routing"] = Routing(none, none.expand_as(expert_ids), expert_ids)  # only its choice is used
    if getattr(module, "takes_token_ids", False):
        asked["token_ids"] = token_ids_of(module, x)
    decided: tuple[Tensor, Routing] = module.forward_with_routing(x, **asked)
    return decided


def _forward(module: Any, x: Tensor) -> Tensor:
    return _run(module, x)[0]


@torch.no_grad()
def _choice(module: Any, x: Tensor) -> Tensor:
    return _run(module, x)[1].expert_ids


def _replay(module: Any, x: Tensor, expert_ids: Tensor) -> Tensor:
    return _run(module, x, expert_ids)[0]


@torch.no_grad()
def _load(module: Any, x: Tensor, expert_ids: Tensor) -> Tensor:
    return _run(module, x, expert_ids)[1].tokens_per_expert


def _state(module: Any) -> Tensor | None:
    """What training moves, (E,) or (1,): a view of it, to write to."""
    found = (getattr(module.router, name, None) for name in STATES)
    return next((state.view(-1) for state in found if state is not None), None)


def _balance_loss(module: Any, x: Tensor, valid: Tensor | None) -> Tensor:
    _, routing = _run(module, x)
    return load_balance_loss(routing.logits, routing.expert_ids, None if valid is None else valid.flatten())


def _z_loss(module: Any, x: Tensor) -> Tensor:
    return router_z_loss(_run(module, x)[1].logits)


def _bias_step(module: Any, micro_batches: Sequence[Tensor], run: Run) -> None:
    """As the training module does: counts from the returned routings, one update between backward and step."""
    counts = torch.zeros((), dtype=torch.int64)
    for x in micro_batches:
        y, routing = run(partial(_run, module), x)
        y.float().square().mean().backward()
        counts = counts.to(y.device) + routing.tokens_per_expert
    update_expert_bias(module.router.expert_bias, counts, UPDATE_RATE)


def _moving_step(module: Any, micro_batches: Sequence[Tensor], run: Run) -> None:
    """The same for a router that says itself what it observes and how its state moves."""
    observed = torch.zeros((), dtype=torch.int64)
    for x in micro_batches:
        y, routing = run(partial(_run, module), x)
        y.float().square().mean().backward()
        observed = observed.to(y.device) + module.router.observe(routing, None)
    module.router.end_step(observed)
