"""Autograd functions whose forward makes the gradients: how they are kept, scaled, and transformed by torch.func.

The gradients are further outputs of the function, which its caller drops.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = [
    "Wanted",
    "first_derivative",
    "keep_gradients",
    "one_after_the_other",
    "scaled_gradients",
    "wanted_gradients",
]


class Wanted(NamedTuple):
    """What an autograd function is to make, as its caller sees it."""

    of: tuple[bool, ...]
    """Which of the tensors get a gradient. Under a transform nobody knows, so it is all."""
    transformed: bool
    """Whether a transform of torch.func is at work."""


def wanted_gradients(*tensors: Tensor | None) -> Wanted:
    transformed = torch._C._are_functorch_transforms_active()
    enabled = torch.is_grad_enabled()
    of = tuple(enabled and each is not None and (each.requires_grad or transformed) for each in tensors)
    return Wanted(of, transformed)


def keep_gradients(
    ctx: Any,
    wanted: Wanted,
    sources: Sequence[Tensor | None],
    gradients: Sequence[Tensor | None],
    *statistics: Tensor,
) -> None:
    """Keep what the forward pass made; `statistics` are further outputs without a gradient.

    Not by save_for_backward: the only reference lets backward scale in place, without a second copy. Under a transform
    of torch.func several levels share the memory, and an outer one may differentiate what the inner one made.
    """
    ctx.set_materialize_grads(False)
    ctx.transformed = wanted.transformed
    if ctx.transformed:
        ctx.mark_non_differentiable(*statistics)
        ctx.save_for_backward(*gradients)
    else:
        ctx.mark_non_differentiable(*statistics, *(each for each in gradients if each is not None))
        ctx.gradients = list(gradients)
        with torch.enable_grad():  # without elements: these hold no memory, and lead to where a gradient comes from
            ctx.sources = [each[:0].clone() for each in sources if each is not None and each.requires_grad]


def scaled_gradients(
    ctx: Any, which: slice, upstream: Tensor | None, further: Sequence[Tensor | None], name: str
) -> list[Tensor | None]:
    """The kept gradients times that of their loss.

    Args:
        further: gradients of the kept gradients, which must be None.
    """
    if any(each is not None for each in further):
        raise RuntimeError(f"{name}: {NO_SECOND_DERIVATIVE}")
    kept = list((ctx.saved_tensors if ctx.transformed else ctx.gradients)[which])
    if upstream is None:  # this loss was not in the sum
        return [None] * len(kept)
    if ctx.transformed:
        return [None if each is None else each * upstream.to(each.dtype) for each in kept]
    if kept[0] is _GONE:
        raise RuntimeError(f"{name}: backward a second time; its gradients were handed out already")
    ctx.gradients[which] = [_GONE] * len(kept)
    return [None if each is None else each.mul_(upstream.to(each.dtype)) for each in kept]


_GONE = object()


def first_derivative(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Decorator of a backward whose results cannot be differentiated again: whoever tries gets an error, not zeros."""

    def guarded(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.transformed:  # the gradients are outputs with a graph, which leads here again
            return backward(ctx, *upstream)
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        if not torch.is_grad_enabled():
            return gradients
        # the sources are inputs of the error, so that autograd.grad, which looks for a way to them, meets it too
        refuse = torch._C._functions.DelayedError(NO_SECOND_DERIVATIVE, 1 + len(ctx.sources))
        return tuple(None if each is None else refuse(each.requires_grad_(), *ctx.sources)[0] for each in gradients)

    return guarded


NO_SECOND_DERIVATIVE = "linear losses have no second derivative; take cross_entropy of all logits for that"


def one_after_the_other(function: Any, batch_size: int, in_dims: Any, arguments: Any) -> tuple[Any, Any]:
    """Rule for vmap: chunks work in buffers, which cannot be batched."""
    leaves, structure = tree_flatten(arguments)
    # dimensions come in the shape of the arguments, with None for a tuple that has no batched tensor
    dims = _dims_of(in_dims, arguments)
    results = []
    for i in range(batch_size):
        taken = [leaf if dim is None else leaf.select(dim, i) for leaf, dim in zip(leaves, dims, strict=True)]
        results.append(function.apply(*tree_unflatten(taken, structure)))
    stacked = [None if column[0] is None else torch.stack(column) for column in zip(*results, strict=True)]
    return tuple(stacked), tuple(None if each is None else 0 for each in stacked)


def _dims_of(in_dims: Any, arguments: Any) -> list[int | None]:
    if isinstance(arguments, (tuple, list)):
        inner = [None] * len(arguments) if in_dims is None else in_dims
        return [dim for dims, each in zip(inner, arguments, strict=True) for dim in _dims_of(dims, each)]
    return [in_dims] if not isinstance(arguments, dict) else [None] * len(tree_flatten(arguments)[0])
