"""Router health: is every expert in use, and how sure is the router?"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.layers import Routing, count_tokens

__all__ = ["DEAD_LOAD", "RoutingHealth", "expert_load", "load_health", "no_expert_share", "routing_health"]

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


@torch.no_grad()
def no_expert_share(routing: Routing, valid: Tensor | None = None) -> float:
    """Share of the tokens, of the `valid` (T,) ones, that no expert sees: every slot of theirs has the id E."""
    skipped = (routing.expert_ids == routing.logits.size(1)).all(dim=1)
    return (skipped if valid is None else skipped[valid]).float().mean().item()


@torch.no_grad()
def routing_health(routing: Routing, valid: Tensor | None = None) -> RoutingHealth:
    """Measure one layer's routing; `valid` (T,) bool leaves padding out."""
    num_experts = routing.logits.size(1)
    logits = routing.logits.float()
    is_chosen = F.one_hot(routing.expert_ids, num_experts + 1).sum(dim=1)[:, :num_experts] > 0  # E is "no expert"
    chosen = logits.masked_fill(~is_chosen, math.inf).amin(dim=1)
    left_out = logits.masked_fill(is_chosen, -math.inf).amax(dim=1)
    has_both = is_chosen.any(dim=1) & ~is_chosen.all(dim=1)
    if valid is not None:
        has_both = has_both & valid
    margin = (chosen - left_out)[has_both]
    if valid is not None:
        logits = logits[valid]
    log_probabilities = logits.log_softmax(dim=-1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1).mean().item()
    max_violation, dead_share = load_health(count_tokens(routing.expert_ids, num_experts, valid))
    return RoutingHealth(
        max_violation=max_violation,
        dead_share=dead_share,
        entropy=entropy / math.log(num_experts) if num_experts > 1 else 0.0,
        margin=margin.mean().item() if margin.numel() else 0.0,
    )
