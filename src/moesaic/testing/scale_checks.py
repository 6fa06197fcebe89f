"""Numbers that are much smaller or larger than usual, and memory that holds what others left there."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moesaic.testing.harness import Failed, Layer, NotApplicable, Subject, check, deterministic_layer, relative_error
from moesaic.testing.oracle import (
    compare_steps,
    compare_with_reference,
    layer_with_reference,
    reference_of,
    require_agreement,
    step,
)

__all__ = ["dirty_memory", "scales"]

SCALES = (2.0**-10, 1.0, 2.0**10)
SCALES_IN_FLOAT16 = (2.0**-4, 1.0, 2.0**2)
"""Gated experts square them, and the result has to fit. Powers of two leave the digits as they are."""


@check(
    "scales",
    "outputs and gradients are right relative to their own size: outputs around 1, and much smaller and larger ones, "
    "also side by side in a batch",
    "NVIDIA/TileGym#23 and ROCm/aiter#5031: kernels that passed by an absolute tolerance of 0.1, and of 100",
)
def scales(subject: Subject) -> str:
    layer = layer_with_reference(subject)
    weight = layer.router_weight()
    x = layer.tokens(2, 24)
    require_agreement(layer, x)
    largest = max(g.abs().max().item() for g in step(layer, x).gradients.values() if g is not None)
    own = layer.router_parameter().grad
    if own is None or own.abs().max().item() <= 1e-6 * largest:
        raise NotApplicable("the router's gradient is rounding alone, which no tolerance fits (see router-gradient)")
    sizes: list[float] = []
    usual, worst = weight.detach().clone(), 0.0
    factors = SCALES_IN_FLOAT16 if layer.dtype == torch.float16 else SCALES
    for factor in factors:
        with torch.no_grad():
            weight.copy_(usual / factor)  # the logits stay
        found, size = _compare_rows(layer, factor * x, f"inputs of scale {factor:.2g}")
        what = f"inputs of scale {factor:.2g}: "
        worst, sizes = max(worst, found, compare_with_reference(layer, factor * x, what)), [*sizes, size]
    with torch.no_grad():
        weight.copy_(usual)
    shrinking = torch.tensor([factors[0] ** (i / 4) for i in range(5)]).repeat(10)[:48].view(2, 24, 1).to(x)
    worst = max(worst, _compare_rows(layer, shrinking * x, "small and large inputs together")[0])
    return f"largest relative error {worst:.1e}, with outputs around {', '.join(f'{size:.1g}' for size in sizes)}"


@check(
    "dirty-memory",
    "what memory held before changes nothing: after a step with more tokens, and with NaN in all that is not written, "
    "a step gives what it gives in a fresh layer",
    "pytorch/pytorch#193633 and tgale96/grouped_gemm#36: rows past the last offset, or of idle experts, were never "
    "written, and their NaN reached gradients from the second step on",
)
def dirty_memory(subject: Subject) -> str:
    deterministic_layer(subject)
    errors = {}
    for training in (False, True):
        layer, fresh = subject.fresh(), subject.fresh()
        for each in (layer, fresh):
            each.module.train(training)
        many, few = layer.tokens(4, 12), layer.tokens(2, 5, seed=1)
        step(layer, many)
        fresh.module.load_state_dict(layer.module.state_dict())  # a bias may have moved by right
        expected = step(fresh, few)
        if relative_error(step(fresh, few).y, expected.y) > layer.tolerance:
            continue  # random beyond the seed, or moved by every forward
        with _dirty(layer):
            found = step(layer, few)
        when = "training" if training else "evaluation"
        errors[when] = compare_steps(found, expected, layer.tolerance, f"second step in {when}, and the same alone")
        if layer.under_test.takes_no_expert and layer.under_test.choice is not None:
            errors[when] = max(errors[when], _with_fewer_experts(layer, fresh, few))
    if not errors:
        raise NotApplicable("two equal steps differ")
    return f"largest relative error {max(errors.values()):.1e}, in {' and '.join(errors)}"


def _with_fewer_experts(layer: Layer, fresh: Layer, x: Tensor) -> float:
    """The same where slots have no expert, so that there are rows past the last offset."""
    ids = layer.need("choice")(layer.module, x)
    ids = ids.masked_fill(torch.arange(ids.numel(), device=ids.device).view_as(ids) % 3 == 0, layer.num_experts())
    expected = step(fresh, x, ids)
    with _dirty(layer):
        found = step(layer, x, ids)
    return compare_steps(found, expected, layer.tolerance, "tokens without some experts, and the same alone")


def _compare_rows(layer: Layer, x: Tensor, what: str) -> tuple[float, float]:
    """The largest error of a token's output, relative to that output; and the usual size of one."""
    with torch.no_grad():
        expected, found = reference_of(layer, x)[0], layer(x).double()
    largest = expected.abs().amax(dim=-1)
    # a token without any expert has an output of zeros
    errors = (found - expected).abs().amax(dim=-1) / torch.where(largest > 0, largest, largest.max())
    if not bool((errors <= 2 * layer.tolerance).all()):
        raise Failed(
            f"{what}: an output around {largest.flatten()[errors.argmax()].item():.1g} has a relative error of "
            f"{errors.max().item():.1e}, allowed {2 * layer.tolerance:.0e}"
        )
    return errors.max().item(), largest.median().item()


@contextmanager
def _dirty(layer: Layer) -> Iterator[None]:
    """New memory holds NaN (integers their largest value) until it is written."""
    deterministic: Any = torch.utils.deterministic  # whose attribute is a property of the module
    mode, fills = torch.get_deterministic_debug_mode(), deterministic.fill_uninitialized_memory
    trash = [torch.full((2**n,), float("nan"), device=layer.device, dtype=layer.dtype) for n in range(4, 15)]
    del trash  # what is allocated elsewhere than in torch.empty finds this
    try:
        torch.set_deterministic_debug_mode("warn")  # in which torch.empty fills what it returns
        deterministic.fill_uninitialized_memory = True
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        deterministic.fill_uninitialized_memory = fills
