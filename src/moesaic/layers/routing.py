"""What a router decided: its experts and scores for each token, checked and counted."""

import inspect
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moesaic.layers.checks import require_decided, require_expert_ids, require_routing, require_tensor

__all__ = ["Routing", "at_least_fp32", "beside_tokens", "count_tokens", "counted"]


class Routing(NamedTuple):
    """What a router decided for T tokens. A router gives the first three; `logits` and `scores` carry gradients."""

    logits: Tensor
    """(T, E), before the score function and without the selection bias."""
    scores: Tensor
    """(T, K), the weight of each chosen expert, in the dtype of the tokens."""
    expert_ids: Tensor
    """(T, K) int64, best first. E means "no expert": so tokens can have different numbers of experts, or none."""
    counts: Tensor | None = None
    """See `tokens_per_expert`. `MoE` fills it in; what a router puts here is not used."""
    num_rows: int | None = None
    """Number of slots that have an expert; None means all T * K. `MoE` fills it in."""
    replayed: bool = False
    """Whether the choice was handed to `MoE.forward_with_routing`. It then says nothing about balance."""
    state: Tensor | None = None
    """(T, S), what the router of the next MoE layer gets if its forward has an argument `router_state`."""

    @property
    def tokens_per_expert(self) -> Tensor:
        """(E,) int64, how often each expert was chosen; sums to T * K less the slots without an expert."""
        return count_tokens(self.expert_ids, self.logits.size(1)) if self.counts is None else self.counts


def count_tokens(expert_ids: Tensor, num_experts: int, valid: Tensor | None = None) -> Tensor:
    """Rows per expert, (E,) int64, of expert_ids (T, K); E ("no expert") and rows with `valid` (T,) False do not count.

    Raises:
        RuntimeError or IndexError: an id below 0 or above E (on CUDA an assertion of the device).
    """
    counted = torch.ones_like(expert_ids) if valid is None else valid[:, None].expand_as(expert_ids).long()
    # not bincount: its output shape depends on data (host sync on CUDA, no meta device); not histc: integer CPU, MPS
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert_ids.device)
    return counts.scatter_add(0, expert_ids.flatten(), counted.flatten())[:num_experts]


def counted(
    router: nn.Module,
    decided: tuple[Tensor, ...],
    x: Tensor,
    num_experts: int | None,
    is_replayed: bool,
    assume_full: bool,
) -> Routing:
    """The `Routing` of what a router decided, with counts of our own: a miscount would read rows of nobody.

    Args:
        x: (T, D), the tokens.
        num_experts: None for as many as there are logits.
        assume_full: takes it that every slot has an expert, without looking.

    Raises:
        ValueError: other shapes than `Routing` says.
    """
    name = type(router).__name__
    require_decided(name, decided)
    logits, scores, expert_ids = decided[:3]
    num_experts = logits.size(-1) if num_experts is None else num_experts
    require_routing(name, logits, scores, expert_ids, x, num_experts)
    expert_ids, num_rows = expert_ids.long(), None
    may_skip = (is_replayed or getattr(router, "may_skip", True)) and not assume_full
    if not torch.compiler.is_compiling() and not assume_full:
        require_expert_ids(name, expert_ids, num_experts, may_skip)
    counts = count_tokens(expert_ids, num_experts)
    if may_skip and (found := int(counts.sum())) < expert_ids.numel():
        scores, num_rows = scores.masked_fill(expert_ids == num_experts, 0), found
    state = decided.state if isinstance(decided, Routing) else None
    if state is not None:
        require_tensor(name, "state", state, (x.size(0), None))
    return Routing(logits, scores, expert_ids, counts, num_rows, is_replayed, state)


def beside_tokens(router: nn.Module, tokens: Tensor) -> dict[str, Tensor | None]:
    """What a router gets that is tried out alone on tokens (..., D), where its forward asks: ids of 0, and no state."""
    ids = torch.zeros(tokens.shape[:-1], dtype=torch.int64, device=tokens.device)
    known: dict[str, Tensor | None] = {"token_ids": ids, "router_state": None}
    asked = inspect.signature(router.forward).parameters
    return {name: value for name, value in known.items() if name in asked}


def at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
