"""A choice of experts that is handed in: replayed for reinforcement learning, or with other numbers of experts."""

import torch
from torch import Tensor

from moesaic.testing.adapter import Run
from moesaic.testing.harness import Failed, Layer, NotApplicable, Subject, check, compare, deterministic_layer
from moesaic.testing.oracle import (
    compare_steps,
    compare_with_reference,
    layer_with_reference,
    reference_of,
    require_agreement,
    step,
)

__all__ = ["replay_gradient", "replay_own", "replay_state", "variable_experts"]


@check(
    "replay-own",
    "replaying the choice that a layer makes itself changes neither outputs nor gradients",
    "inclusionAI/AReno#524: recorded experts that belonged to other tokens",
)
def replay_own(subject: Subject) -> str:
    layer = deterministic_layer(subject)
    layer.need("replay")
    layer.set_bias()
    x = layer.tokens(2, 24)
    live = step(layer, x)
    with torch.no_grad():
        ids = layer.need("choice")(layer.module, x)
    error = compare_steps(step(layer, x, ids), live, layer.tolerance, "replayed and live")
    return f"largest relative error {error:.1e}" if error else "bit-equal"


@check(
    "replay-gradient",
    "a replayed choice has the outputs and gradients of the float64 reference with that choice, the router's included, "
    "also for experts that the layer would not choose today",
    "ISEEKYAN/Megatron-LM#79: experts outside today's top-k had a score of zero, which killed their gradients",
)
def replay_gradient(subject: Subject) -> str:
    layer = layer_with_reference(subject)
    for hook in ("replay", "replay_reference"):
        layer.need(hook)
    x = layer.tokens(2, 24)
    require_agreement(layer, x)
    ids = _any_experts(layer, x)
    with torch.no_grad():
        compare(layer(x, ids), reference_of(layer, x, ids)[0], layer.tolerance, "y of a choice of others")
    error = compare_with_reference(layer, x, "a choice of others: ", ids)
    return f"largest relative error of a gradient {error:.1e}"


@check(
    "replay-state",
    "replaying a choice in training moves no bias and no other state of the router, nor enters the next update",
    "PrimeIntellect-ai/prime-rl#2953: the selection bias went on moving by loads that it did not cause",
)
def replay_state(subject: Subject) -> str:
    layer, other = subject.fresh(), subject.fresh()
    layer.need("replay")
    if layer.under_test.expert_bias is None and not list(layer.module.buffers()):
        raise NotApplicable("it has no bias and no buffer")
    x = layer.tokens(2, 24)
    for each in (layer, other):
        each.module.train()
    before = {name: value.clone() for name, value in layer.module.named_buffers()}
    for _ in range(2):
        step(layer, x, _any_experts(layer, x))
    moved = [name for name, value in layer.module.named_buffers() if not torch.equal(value, before[name])]
    if moved:
        raise Failed(f"moved by two replayed steps: {', '.join(moved)}")
    if layer.under_test.bias_step is None or layer.under_test.expert_bias is None:
        return f"not moved: {', '.join(before)}"
    biases = []
    for each in (layer, other):
        each.module.zero_grad()
        torch.manual_seed(0)
        # of one token: a batch on which the load is uneven
        each.under_test.bias_step(each.module, [x[:1, :1].expand(2, 12, -1).contiguous()], Run())  # type: ignore[misc]
        biases.append(each.expert_bias())
    if not torch.equal(*biases):
        raise Failed(f"{biases[0].tolist()} after a live step, {biases[1].tolist()} without the replays before it")
    return "not moved; the next update is the same"


@check(
    "variable-experts",
    "tokens may have different numbers of experts, or none: outputs, gradients and counts are those of exactly these",
    "sgl-project/sglang#12701 and flashinfer-ai/flashinfer#3979: an id for no expert was taken for an expert",
)
def variable_experts(subject: Subject) -> str:
    layer = layer_with_reference(subject)
    for hook in ("replay", "replay_reference", "choice"):
        layer.need(hook)
    if not layer.under_test.takes_no_expert:
        raise NotApplicable("takes_no_expert is False: every token has the same number of experts")
    x = layer.tokens(2, 24)
    require_agreement(layer, x)
    num_experts = layer.num_experts()
    with torch.no_grad():
        chosen = layer.need("choice")(layer.module, x)
    slots, tokens = (torch.arange(n, device=chosen.device) for n in reversed(chosen.shape))
    some = chosen.masked_fill(slots >= (tokens % (chosen.size(1) + 1))[:, None], num_experts)
    some = torch.cat([some, torch.full_like(some[:, :1], num_experts)], dim=1)
    some[::2] = some[::2].flip(1)  # a slot without an expert may come first
    worst = 0.0
    for what, ids in (("0 to K experts", some), ("no expert at all", torch.full_like(some, num_experts))):
        with torch.no_grad():
            compare(layer(x, ids), reference_of(layer, x, ids)[0], layer.tolerance, f"y with {what}")
        worst = max(worst, compare_with_reference(layer, x, f"{what}: ", ids))
        if layer.under_test.load is not None:
            found = layer.under_test.load(layer.module, x, ids).tolist()
            expected = torch.bincount(ids.flatten(), minlength=num_experts + 1)[:num_experts].tolist()
            if found != expected:
                raise Failed(f"{what}: {found} tokens are counted, {expected} are there")
    return f"largest relative error of a gradient {worst:.1e}"


def _any_experts(layer: Layer, x: Tensor) -> Tensor:
    """Other experts than a layer would choose, (B * L, K): for most tokens, not for all."""
    num_experts, top_k = layer.num_experts(), layer.need("top_k")
    if top_k >= num_experts:
        raise NotApplicable(f"all {num_experts} experts are chosen anyway")
    drawn = torch.rand(x[..., 0].numel(), num_experts, generator=torch.Generator().manual_seed(5))
    return drawn.topk(top_k, dim=-1).indices.to(x.device)
