"""Refusal of sizes, numbers and inputs that would fail late, or not at all."""

import math
import numbers
import types
import typing
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "INTEGERS",
    "differentiates_forward",
    "has_values",
    "is_shape_only",
    "require_choice",
    "require_decided",
    "require_dtype",
    "require_expert_ids",
    "require_flags",
    "require_floating",
    "require_ids",
    "require_kinds",
    "require_last",
    "require_numbers",
    "require_one_dtype",
    "require_routing",
    "require_sizes",
    "require_tensor",
    "require_weights_dtype",
]

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
"""Dtypes of ids. bool is none: a mask of experts would count as the ids 0 and 1."""


def require_sizes(least: int = 1, **sizes: Any) -> None:
    """Raise unless each is an integer of at least `least`.

    Raises:
        TypeError: another type; True is no 1, and 16.0 no 16.
        ValueError: a smaller number.
    """
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name}={value!r}: must be an integer >= {least}")
        if value < least:
            raise ValueError(f"{name}={value!r}: must be a number >= {least}")


def require_numbers(least: float = 0.0, above: bool = False, **values: Any) -> None:
    """Raise unless each is a finite number of at least `least`, or `above` it.

    Raises:
        TypeError: another type, bool included.
        ValueError: nan, an infinity, or a smaller number.
    """
    allowed = f"a number {'>' if above else '>='} {least:g}"
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name}={value!r}: must be {allowed}")
        if not _is_finite(value) or value < least or (above and value == least):
            raise ValueError(f"{name}={value!r}: must be {allowed}")


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def require_flags(**flags: Any) -> None:
    """Raise TypeError unless each is True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}={value!r}: must be True or False")


def require_dtype(dtype: Any) -> None:
    """Raise unless `dtype` is None or a floating-point dtype of torch."""
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return
    kind = ValueError if isinstance(dtype, torch.dtype) else TypeError
    raise kind(f"dtype={dtype!r}: must be a floating-point torch.dtype such as torch.float32, or None")


def require_kinds(kind: type | types.UnionType, **values: Any) -> None:
    """Raise TypeError unless each is a `kind` or None."""
    for name, value in values.items():
        if value is not None and not isinstance(value, kind):
            kinds = [each.__name__ for each in typing.get_args(kind) or [typing.cast(type, kind)]]
            raise TypeError(f"{name}={value!r}: must be of type {' or '.join(kinds)}, or None")


def require_choice(allowed: Iterable[str], **values: Any) -> None:
    """Raise unless each is one of the allowed names.

    Raises:
        TypeError: no string.
        ValueError: another string.
    """
    names = tuple(allowed)
    for name, value in values.items():
        if not isinstance(value, str) or value not in names:
            kind = ValueError if isinstance(value, str) else TypeError
            raise kind(f"{name}={value!r}: must be one of {', '.join(names)}")


def require_last(x: Any, dim: int | None, owner: str) -> None:
    """Raise unless x is a floating-point tensor (..., dim); a `dim` of None is any.

    Raises:
        TypeError: no tensor, or one of integers or complex numbers.
        ValueError: another width.
    """
    require_floating(owner, x=x)
    if x.dim() == 0 or (dim is not None and x.size(-1) != dim):
        raise ValueError(f"{owner}: x of shape {tuple(x.shape)}; its last dimension must be {dim or 'the width'}")


def require_floating(owner: str, **tensors: Any) -> None:
    """Raise TypeError unless each is a floating-point tensor."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{owner}: {name} of type {type(x).__name__}; must be a floating-point tensor")
        if not x.is_floating_point():
            raise TypeError(f"{owner}: {name} of {x.dtype}; must be a floating-point tensor")


def require_tensor(owner: str, name: str, x: Any, shape: tuple[int | None, ...], *dtypes: torch.dtype) -> None:
    """Raise unless x is a tensor of this shape, None being any size, and of one of these dtypes.

    Raises:
        TypeError: no tensor, or another dtype.
        ValueError: another shape.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{owner}: {name} of type {type(x).__name__}; must be a tensor")
    if dtypes and x.dtype not in dtypes:
        raise TypeError(f"{owner}: {name} of {x.dtype}; must be {' or '.join(str(dtype) for dtype in dtypes)}")
    if x.dim() != len(shape) or any(
        wanted is not None and found != wanted for found, wanted in zip(x.shape, shape, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{owner}: {name} of shape {tuple(x.shape)}; must be ({wanted})")


def require_ids(owner: str, name: str, ids: Tensor, end: int, ignore: int | None = None) -> None:
    """Raise ValueError for an id below 0, or of `end` or more, but for `ignore`; where looking costs nothing."""
    if not has_values(ids):
        return
    wrong = (ids < 0) | (ids >= end)
    if ignore is not None:
        wrong &= ids != ignore
    if wrong.any():
        but = "" if ignore is None else f", or {ignore} for none"
        raise ValueError(f"{owner}: {name} has {int(ids[wrong][0])}; must be 0 to {end - 1}{but}")


def differentiates_forward() -> bool:
    """Whether forward-mode derivatives are computed here: torch.func.jvp, jacfwd, hessian, or a dual level."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def is_shape_only(x: Tensor) -> bool:
    """Whether it has no numbers, on any device: it is on the meta device or a fake tensor outside of a compiler."""
    return x.is_meta or (type(x) is not Tensor and not torch.compiler.is_compiling())


def has_values(x: Tensor) -> bool:
    """Whether looking at them costs nothing: no wait for a GPU, no break in a graph."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return x.device.type == "cpu" and type(x) is Tensor and not traced


def require_weights_dtype(owner: str, x: Tensor, weight: Any) -> None:
    """Raise TypeError unless x has the dtype of a floating-point weight, or autocast makes them one.

    Autocast leaves float64 as it is. What is no floating-point tensor, such as a quantized weight, takes what it takes.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or x.dtype == weight.dtype:
        return
    if not torch.is_autocast_enabled(x.device.type) or torch.float64 in (x.dtype, weight.dtype):
        raise TypeError(f"{owner}: x of {x.dtype}; must be {weight.dtype} as its weights are, or both under autocast")


def require_one_dtype(why: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all have the same dtype."""
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        found = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
        raise ValueError(f"{found}: must be of one dtype{why}")


def require_decided(router: str, decided: Any) -> None:
    """Raise ValueError unless a router returned three tensors or more values, in a tuple or a list."""
    if not isinstance(decided, (tuple, list)) or len(decided) < 3:
        found = f"{len(decided)} values" if isinstance(decided, (tuple, list)) else f"a {type(decided).__name__}"
        raise ValueError(f"{router} returned {found}; must be logits, scores and expert_ids")
    for name, each in zip(("logits", "scores", "expert_ids"), decided, strict=False):
        if not isinstance(each, Tensor):
            raise ValueError(f"{router} returned {name} of type {type(each).__name__}; they must be a tensor")


def require_routing(
    router: str, logits: Tensor, scores: Tensor, expert_ids: Tensor, x: Tensor, num_experts: int
) -> None:
    """Raise ValueError unless logits are (T, E), scores (T, K) and expert_ids (T, K) integers, for x (T, D)."""
    if expert_ids.dtype not in INTEGERS:
        raise ValueError(f"{router} returned expert_ids of {expert_ids.dtype}; they must be integers")
    if scores.dtype == torch.float64 != x.dtype:  # autocast leaves it as it is
        raise ValueError(f"{router} returned scores of {scores.dtype}; they must be of {x.dtype}, as x is")
    slots = (x.size(0), scores.size(-1))
    if logits.shape != (x.size(0), num_experts) or scores.shape != slots or expert_ids.shape != slots:
        raise ValueError(
            f"{router} returned logits {tuple(logits.shape)}, scores {tuple(scores.shape)} and expert_ids "
            f"{tuple(expert_ids.shape)} for {x.size(0)} tokens and {num_experts} experts; they must be "
            "(tokens, experts), (tokens, K) and (tokens, K)"
        )


def require_expert_ids(router: str, expert_ids: Tensor, num_experts: int, may_skip: bool) -> None:
    """Raise ValueError unless all are 0 to E - 1, or E for no expert where that may be.

    It waits for a GPU where ids may be E. Where they may not, a GPU stops by itself.
    """
    if not expert_ids.numel():
        return
    if not may_skip and not has_values(expert_ids):
        if type(expert_ids) is Tensor and expert_ids.is_cuda and not torch._C._are_functorch_transforms_active():
            torch._assert_async((expert_ids < num_experts).all(), f"{router} has may_skip=False, and chose no expert")
        return
    lowest, highest = (int(each) for each in expert_ids.aminmax())
    if lowest < 0 or highest > num_experts - (not may_skip):
        none = f", or {num_experts} for no expert" if may_skip else "; with may_skip=False each slot has an expert"
        raise ValueError(
            f"{router} chose expert_ids from {lowest} to {highest}; they must be 0 to {num_experts - 1}{none}"
        )
