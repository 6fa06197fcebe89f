"""Where formulas divide by zero or overflow: outputs, losses and gradients stay finite."""

from collections.abc import Iterable

import torch
from torch import Tensor

from moesaic.testing.harness import Failed, Layer, NotApplicable, Subject, check

__all__ = ["huge_logits", "perfect_balance", "zero_init"]

SATURATING = 60.0
"""A logit at which a softmax in fp32 or fp64 is exactly 0, 1/K or 1, and exp still is finite."""

HUGE = 1e4
HUGE_IN_FLOAT16 = 300.0
"""The gradient of a squared logit has to fit as well."""


@check(
    "perfect-balance",
    "no NaN where every expert has exactly the same load",
    "google-research/vmoe#218: a coefficient of variation has a NaN gradient at perfect balance",
)
def perfect_balance(subject: Subject) -> str:
    layer = subject.fresh()
    layer.need("balance_loss")
    top_k, weight = layer.need("top_k"), layer.router_weight()
    num_experts = weight.size(0)
    if num_experts > layer.dim:
        raise NotApplicable(f"{num_experts} experts cannot be told apart by {layer.dim} features")
    _set_router(weight, SATURATING * torch.eye(num_experts, layer.dim))
    x = layer.tokens(2, num_experts)
    wanted = torch.zeros(num_experts, num_experts)
    for k in range(top_k):
        wanted += torch.eye(num_experts).roll(k, dims=1)
    x[..., :num_experts] = wanted.to(x)  # position l wants experts l, l + 1, ... modulo E: each is wanted K times
    return _stays_finite(layer, [("", x)])


@check(
    "zero-init",
    "no NaN where the router is initialized to zero, or the input is zero",
    "google-research/vmoe#218: NaN gradients from a router initialized to zero",
)
def zero_init(subject: Subject) -> str:
    layer = subject.fresh()
    x = layer.tokens(2, 8)
    cases = [("zero input: ", torch.zeros_like(x))]
    if layer.under_test.router_weight is not None:
        _stays_finite(layer, cases)
        _set_router(layer.router_weight(), torch.zeros(()))
        cases = [("zero router: ", x)]
    return _stays_finite(layer, cases)


@check(
    "huge-logits",
    "no NaN where router logits are around 10,000 (300 in float16), of either sign",
    "databricks/megablocks#133: a z-loss written as log(sum(exp(logits))), which overflows",
)
def huge_logits(subject: Subject) -> str:
    layer = subject.fresh()
    huge = HUGE_IN_FLOAT16 if layer.dtype == torch.float16 else HUGE
    x = layer.tokens(2, 8)
    if layer.under_test.router_weight is None:
        return _stays_finite(layer, [(f"input of {huge:.0f}: ", huge * x), (f"input of -{huge:.0f}: ", -huge * x)])
    weight = layer.router_weight()
    x[..., 0] = huge**0.5
    column = torch.zeros(weight.shape)
    column[:, 0] = huge**0.5 * (1 + torch.arange(weight.size(0)) / weight.size(0))
    for sign in (1.0, -1.0):
        _set_router(weight, sign * column)
        found = _stays_finite(layer, [(f"all logits {sign * huge:.0f} or beyond: ", x)])
    return found


@torch.no_grad()
def _set_router(weight: Tensor, value: Tensor) -> None:
    weight.copy_(value)


def _stays_finite(layer: Layer, cases: Iterable[tuple[str, Tensor]]) -> str:
    """Output, losses and the gradients of all of them, in training mode."""
    layer.module.train()
    losses = {}
    for what, x in cases:
        layer.module.zero_grad()
        x = x.detach().clone().requires_grad_()
        losses = {"output": layer(x).float().square().mean()}
        if layer.under_test.balance_loss is not None:
            losses["balance loss"] = layer.under_test.balance_loss(layer.module, x, None)
        if layer.under_test.z_loss is not None:
            losses["z-loss"] = layer.under_test.z_loss(layer.module, x)
        bad = [name for name, loss in losses.items() if not bool(loss.isfinite().all())]
        for name, loss in losses.items():
            if not loss.requires_grad:
                continue
            layer.module.zero_grad()
            x.grad = None
            loss.backward()
            gradients = {**layer.named_gradients(), "input": x.grad}
            bad += [
                f"gradient of the {name} for {parameter}"
                for parameter, g in gradients.items()
                if g is not None and not bool(g.isfinite().all())
            ]
        if bad:
            raise Failed(f"{what}not finite: {', '.join(bad)}")
    return f"finite: {', '.join(losses)} and gradients"
