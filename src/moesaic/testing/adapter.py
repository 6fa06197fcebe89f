"""What the kit knows of a layer under test."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moesaic.errors import InputError

__all__ = ["MoEUnderTest", "NotApplicable", "Run", "first_output"]


class NotApplicable(Exception):
    """The check needs something that the layer does not have or does not tell; the message says what."""


@dataclass(frozen=True)
class Run:
    """`run(function, *inputs)` calls the function, plainly or under activation checkpointing."""

    recomputes: bool = False

    def __call__(self, function: Callable[..., Any], *inputs: Tensor) -> Any:
        return checkpoint(function, *inputs, use_reentrant=False) if self.recomputes else function(*inputs)


def first_output(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, or its first entry where that is a tuple; a (B*L, D) output is folded back to (B, L, D)."""
    y = module(x)
    if isinstance(y, (tuple, list)) and y:
        y = y[0]
    if not isinstance(y, Tensor):
        raise InputError(
            f"{type(module).__name__} returned {type(y).__name__}: must be a tensor or a tuple that starts with one"
        )
    return y.view_as(x) if y.shape == x.flatten(0, -2).shape else y


@dataclass(frozen=True)
class MoEUnderTest:
    """A layer and what the kit cannot find out by itself; what is None makes the checks that need it not applicable.

    Every hook takes the module as its first argument. A check makes its layer with your factory and redraws every
    weight of two or more dimensions, because initial values as small as 0.02 hide mistakes.
    """

    module: nn.Module
    dim: int | None = None
    """Width D of the inputs; None means that it is found by trial."""
    forward: Callable[[Any, Tensor], Tensor] = first_output
    """(module, x (B, L, D)) -> y (B, L, D)."""
    reference: Callable[[Mapping[str, Tensor], Tensor], Tensor] | None = None
    """(parameters and buffers by name, in float64, x (T, D)) -> y (T, D); `dense_moe` does most of it."""
    router_weight: Callable[[Any], Tensor] | None = None
    """The (E, D) weight of a linear router: the parameter, or a view of it such as `module.gate.weight.T`."""
    top_k: int | None = None
    """Experts per token."""
    num_experts: int | None = None
    """E; needed where there is no `router_weight` to count them."""
    choice: Callable[[Any, Tensor], Tensor] | None = None
    """(module, x (B, L, D)) -> expert_ids (B * L, K) int64, the experts that it chooses itself."""
    replay: Callable[[Any, Tensor, Tensor], Tensor] | None = None
    """(module, x (B, L, D), expert_ids (B * L, K)) -> y (B, L, D), with these experts in place of its own choice."""
    replay_reference: Callable[[Mapping[str, Tensor], Tensor, Tensor], Tensor] | None = None
    """As `reference`, but with a third argument expert_ids (T, K): exactly these experts see the tokens."""
    takes_no_expert: bool = False
    """Whether an id of E in what is replayed means "no expert", so that tokens can have different numbers of them."""
    load: Callable[[Any, Tensor, Tensor], Tensor] | None = None
    """(module, x, expert_ids) -> (E,): the tokens of each expert, as the layer counts them when it replays these."""
    balance_loss: Callable[[Any, Tensor, Tensor | None], Tensor] | None = None
    """(module, x (B, L, D), valid (B, L) bool or None) -> scalar. A layer that cannot take a mask ignores it."""
    z_loss: Callable[[Any, Tensor], Tensor] | None = None
    """(module, x (B, L, D)) -> scalar."""
    expert_bias: Callable[[Any], Tensor] | None = None
    """The selection bias (E,) as it is now."""
    bias_step: Callable[[Any, Sequence[Tensor], Run], None] | None = None
    """(module, micro-batches, run): one whole optimizer step of your training loop, as far as the bias goes.

    Each micro-batch (B, L, D) goes through `run(module, x)` (or any function and its inputs) and backward; the bias
    moves where and how your training moves it."""
    single_expert: Callable[[], Any] | None = None
    """A factory of the same layer with one expert. Not needed if yours takes `num_experts`."""
    expert_parallel: Callable[[Any, Any], None] | None = None
    """(module, process group): leave this rank its share of the experts, in place, and let tokens reach all of them.

    A parameter that ranks share is cut along one dimension, rank 0 has the first part. One that only some ranks have
    may be missing from the others. What is left whole is a copy. It may raise `NotApplicable`."""
    compute_dtype: torch.dtype | None = None
    """The coarsest dtype that the layer computes in, if that is not the dtype of its parameters."""
