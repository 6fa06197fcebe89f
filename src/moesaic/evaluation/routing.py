"""Router health: is every expert in use, and how sure is the router?"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.layers import Routing, count_tokens

__all__ = [
    "DEAD_LOAD",
    "RoutingHealth",
    "RoutingSums",
    "expert_load",
    "load_health",
    "routing_health",
    "routing_sums",
]

DEAD_LOAD = 0.01
"""An expert with less than this share of its ideal load counts as dead."""


@dataclasses.dataclass(frozen=True)
class RoutingHealth:
    """Measures of one MoE layer over some tokens."""

    max_violation: float
    """Load of the fullest expert over the ideal load, minus one (Wang et al. 2024): 0 balanced, E/K - 1 collapsed."""
    dead_share: float
    """Share of experts whose load is below `DEAD_LOAD`."""
    entropy: float
    """Mean over tokens of the entropy of softmax(logits), over log E: 1 undecided, 0 certain."""
    margin: float
    """Mean of the logit of the last chosen expert minus that of the best one left out, over tokens that have both."""


def expert_load(tokens_per_expert: Tensor) -> Tensor:
    """Counts (E,) -> load over ideal (E,) fp32: 1 everywhere is perfect balance."""
    counts = tokens_per_expert.float()
    return counts / counts.mean().clamp(min=1e-12)


def load_health(tokens_per_expert: Tensor) -> tuple[float, float]:
    """(max_violation, dead_share) of counts (E,)."""
    load = expert_load(tokens_per_expert)
    return load.max().item() - 1, (load < DEAD_LOAD).float().mean().item()


class RoutingSums(NamedTuple):
    """Sums over tokens of one MoE layer, from which its health follows. Those of micro-batches and ranks add up."""

    counts: Tensor
    """(E + 3,) int64: tokens of each expert, then all tokens, tokens without any expert, tokens that have a margin."""
    totals: Tensor
    """(2,) fp32: entropies in nats, and margins."""

    def plus(self, other: "RoutingSums | None") -> "RoutingSums":
        return self if other is None else RoutingSums(self.counts + other.counts, self.totals + other.totals)

    def health(self) -> RoutingHealth:
        loads, (tokens, _, with_margin) = self.counts[:-3], self.counts[-3:].clamp(min=1)
        entropy, margin = (self.totals / torch.stack((tokens, with_margin))).tolist()
        max_violation, dead_share = load_health(loads)
        normalized = entropy / math.log(loads.numel()) if loads.numel() > 1 else 0.0
        return RoutingHealth(max_violation, dead_share, normalized, margin)

    def no_expert_share(self) -> float:
        """Share of the tokens that no expert sees: every slot of theirs has the id E."""
        return (self.counts[-2] / self.counts[-3]).item()

    def experts_per_token(self) -> float:
        """The mean number of experts that a token has."""
        return (self.counts[:-3].sum() / self.counts[-3]).item()

    def active_width(self, hidden_dims: Sequence[int]) -> float:
        """The mean width of all that a token meets of experts of these widths; further ones have no weights."""
        loads = self.counts[: len(hidden_dims)]
        return ((loads * loads.new_tensor(hidden_dims)).sum() / self.counts[-3]).item()


@torch.no_grad()
def routing_sums(routing: Routing, valid: Tensor | None = None) -> RoutingSums:
    """Sum up one layer's routing; `valid` (T,) bool leaves padding out."""
    num_experts = routing.logits.size(1)
    logits = routing.logits.float()
    is_chosen = F.one_hot(routing.expert_ids, num_experts + 1).sum(dim=1)[:, :num_experts] > 0  # E is "no expert"
    chosen = logits.masked_fill(~is_chosen, math.inf).amin(dim=1)
    left_out = logits.masked_fill(is_chosen, -math.inf).amax(dim=1)
    is_skipped = ~is_chosen.any(dim=1)
    has_both = ~is_skipped & ~is_chosen.all(dim=1)
    if valid is not None:
        has_both, is_skipped, logits = has_both & valid, is_skipped & valid, logits[valid]
    margins = (chosen - left_out)[has_both]
    log_probabilities = logits.log_softmax(dim=-1)
    entropies = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
    numbers = is_skipped.new_tensor((entropies.numel(), 0, margins.numel()), dtype=torch.int64)
    numbers[1] = is_skipped.sum()
    counts = torch.cat((count_tokens(routing.expert_ids, num_experts, valid), numbers))
    return RoutingSums(counts, torch.stack((entropies.sum(), margins.sum())))


def routing_health(routing: Routing, valid: Tensor | None = None) -> RoutingHealth:
    """Measure one layer's routing; `valid` (T,) bool leaves padding out."""
    return routing_sums(routing, valid).health()
