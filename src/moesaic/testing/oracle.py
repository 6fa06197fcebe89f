"""The layer beside its float64 reference, and what a step of it gives."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.testing.harness import (
    Failed,
    Layer,
    NotApplicable,
    Subject,
    compare,
    compare_gradients,
    deterministic_layer,
)

__all__ = [
    "Step",
    "compare_steps",
    "compare_with_reference",
    "layer_with_reference",
    "reference_of",
    "require_agreement",
    "step",
]


class Step(NamedTuple):
    """What a forward and a backward gave."""

    y: Tensor
    gradients: dict[str, Tensor | None]
    """One of every parameter, and of the "input"."""


def step(layer: Layer, x: Tensor, expert_ids: Tensor | None = None) -> Step:
    """A forward and a backward with a random gradient of the output; the same gradient and seed each time."""
    layer.module.zero_grad()
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(0)
    y = layer(x, expert_ids)
    y.backward(layer.random(*x.shape, seed=7).to(y.dtype))
    found = {**layer.named_gradients(), "input": x.grad}
    return Step(y.detach().clone(), {name: None if g is None else g.clone() for name, g in found.items()})


def compare_steps(found: Step, expected: Step, tolerance: float, what: str) -> float:
    """Raises Failed if outputs differ by more than the tolerance, or gradients by more than four times that."""
    error = compare(found.y, expected.y, tolerance, f"{what}: output")
    known = {name: g for name, g in expected.gradients.items() if g is not None}
    return max(error, compare_gradients(found.gradients, known, 4 * tolerance, f"{what}: "))


def layer_with_reference(subject: Subject) -> Layer:
    """A layer to compare, with a selection bias that matters, if it has one.

    Raises:
        NotApplicable: without a reference, or if it cannot be compared.
    """
    subject.fresh().need("reference")
    layer = deterministic_layer(subject)
    layer.set_bias()
    return layer


def reference_of(layer: Layer, x: Tensor, expert_ids: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The reference's output (B, L, D), and the float64 leaves that it was computed from: parameters and input."""
    leaves = {name: p.detach().double().requires_grad_() for name, p in layer.module.named_parameters()}
    buffers = {name: b.double() if b.is_floating_point() else b for name, b in layer.module.named_buffers()}
    tokens = x.detach().double().flatten(0, 1).requires_grad_()
    function: Callable[..., Tensor] = layer.need("reference" if expert_ids is None else "replay_reference")
    chosen = () if expert_ids is None else (expert_ids,)
    return function({**buffers, **leaves}, tokens, *chosen).view(x.shape), leaves, tokens


def compare_with_reference(layer: Layer, x: Tensor, where: str = "", expert_ids: Tensor | None = None) -> float:
    """Raises Failed if a gradient is not that of the reference; returns the largest relative error."""
    expected_y, leaves, tokens = reference_of(layer, x, expert_ids)
    upstream = layer.random(*x.shape, seed=7)
    oracle = torch.autograd.grad(expected_y, [*leaves.values(), tokens], upstream.double(), materialize_grads=True)
    expected = dict(zip([*leaves, "input"], oracle, strict=True))
    expected["input"] = expected["input"].view(x.shape)
    return compare_gradients(step(layer, x, expert_ids).gradients, expected, 4 * layer.tolerance, where)


def require_agreement(layer: Layer, x: Tensor) -> None:
    """Raises NotApplicable if the layer is not what its reference is, in what outputs and gradients look at."""
    try:
        with torch.no_grad():
            compare(layer(x), reference_of(layer, x)[0], layer.tolerance, "y")
        compare_with_reference(layer, x)
    except Failed:
        raise NotApplicable("it is not what its reference is already (see outputs and gradients)") from None
