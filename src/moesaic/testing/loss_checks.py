"""The losses that keep experts in use: padding does not count, and their gradients arrive."""

from collections.abc import Callable

import torch
from torch import Tensor

from moesaic.testing.harness import Failed, Layer, NotApplicable, Subject, check, relative_error

__all__ = ["balance_gradient", "padding", "z_gradient"]


@check(
    "padding",
    "padding does not change the balance loss",
    "huggingface/transformers#28505 and NVIDIA/Megatron-LM#1984: padding tokens counted in the balance loss",
)
def padding(subject: Subject) -> str:
    layer = _training(subject)
    balance_loss = layer.need("balance_loss")
    x = layer.tokens(2, 12)
    valid = torch.ones(2, 12, dtype=torch.bool, device=layer.device)
    expected, other = (_seeded(lambda: balance_loss(layer.module, x, valid), seed) for seed in (0, 1))
    tolerance = max(1e-5, layer.tolerance)  # such losses are computed in fp32 by right
    if relative_error(other, expected) > tolerance:
        raise NotApplicable("the balance loss is random in training")
    for filling in (torch.zeros_like(x[:, :8]), x[:1, :1].expand(2, 8, -1)):
        padded, mask = torch.cat([x, filling], dim=1), torch.cat([valid, ~valid[:, :8]], dim=1)
        found = _seeded(lambda: balance_loss(layer.module, padded, mask), 0)  # noqa: B023 (called at once)
        if relative_error(found, expected) > tolerance:
            raise Failed(
                f"{expected.item():.4g} for two sequences of 12 tokens, {found.item():.4g} with 8 of padding each"
            )
    return f"{expected.item():.4g} with and without"


@check(
    "balance-gradient",
    "the gradient of the balance loss reaches the router",
    "NVIDIA-NeMo/Automodel#1408: the balance loss was computed and logged, and its gradient never arrived",
)
def balance_gradient(subject: Subject) -> str:
    layer = _training(subject)
    balance_loss = layer.need("balance_loss")
    x = layer.tokens(2, 12)
    x[:, ::2] = x[0, 0]  # at perfect balance the gradient is zero by right
    return _gradient_arrives(layer, balance_loss(layer.module, x, None))


@check(
    "z-gradient",
    "the gradient of the z-loss reaches the router",
    "hpcaitech/ColossalAI#1633: auxiliary losses that could not be back-propagated",
)
def z_gradient(subject: Subject) -> str:
    layer = _training(subject)
    z_loss = layer.need("z_loss")
    return _gradient_arrives(layer, z_loss(layer.module, layer.tokens(2, 12)))


def _training(subject: Subject) -> Layer:
    """Some layers compute their losses in training only."""
    layer = subject.fresh()
    layer.module.train()
    return layer


def _seeded(function: Callable[[], Tensor], seed: int) -> Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        return function()


def _gradient_arrives(layer: Layer, loss: Tensor) -> str:
    if layer.router_weight().size(0) == 1:
        raise NotApplicable("one expert: there is nothing to choose")
    parameter = layer.router_parameter()
    if not loss.requires_grad:
        raise Failed(f"the loss, {loss.item():.4g}, has no graph")
    loss.backward()
    if parameter.grad is None:
        raise Failed("the router has no gradient")
    largest = parameter.grad.abs().max().item()
    if not 1e-6 * abs(loss.item()) < largest < float("inf"):
        raise Failed(f"the loss is {loss.item():.4g}, the largest gradient of the router {largest:.1e}")
    return f"largest {largest:.1e}"
