"""What a mixture of experts says of itself: the sum of what its parts say."""

import torch
from torch import nn

from moesaic.layers.checks import require_decided
from moesaic.layers.experts import Experts
from moesaic.layers.feed_forward import FeedForward
from moesaic.layers.parametrization import Fans
from moesaic.layers.part import flops_per_token, num_parameters
from moesaic.layers.routing import beside_tokens

__all__ = ["experts_per_token", "mixture_fans", "mixture_flops", "mixture_parameters", "routed_flops"]

_SOME_TOKENS = 256


def mixture_fans(
    router: nn.Module, experts: nn.Module, shared_expert: nn.Module | None, adds_up: bool
) -> dict[str, Fans]:
    """Fans of the down projections of a mixture, by their name in it. Custom experts are not among them.

    Args:
        adds_up: whether routed and shared experts add to one sum, so that the fan-in is all that a token meets.
    """
    parts: dict[str, tuple[int, int, float]] = {}
    if isinstance(experts, Experts):
        stated: float | None = getattr(router, "experts_per_token", None)
        count: float = getattr(router, "top_k", 1) if stated is None else stated
        parts["experts.down_proj"] = experts.hidden_dim, experts.dim, count
    if isinstance(shared_expert, FeedForward):
        down = shared_expert.down_proj
        parts["shared_expert.down_proj.weight"] = down.in_features, down.out_features, 1
    if not adds_up:
        return {name: Fans(width, dim, round(width * count)) for name, (width, dim, count) in parts.items()}
    active = round(sum(width * count for width, _, count in parts.values()))
    return {name: Fans(width, dim, active) for name, (width, dim, _) in parts.items()}


def experts_per_token(router: nn.Module, num_experts: int, dim: int, default: float) -> float:
    """Mean number of experts that a router gives a token: declared as `experts_per_token`, or measured on noise.

    Args:
        default: the answer for a router that cannot be run (one without memory).

    Raises:
        ValueError: it returns something else than logits, scores and expert_ids.
    """
    declared = getattr(router, "experts_per_token", None)
    if isinstance(declared, (int, float)):
        return float(declared)
    weight = next(router.parameters(), None)
    if weight is not None and weight.is_meta:
        return default
    noise = torch.empty(_SOME_TOKENS, dim) if weight is None else weight.new_empty(_SOME_TOKENS, dim)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        decided = router(noise.normal_(), **beside_tokens(router, noise))
    require_decided(type(router).__name__, decided)
    return float((decided[2] < num_experts).sum()) / _SOME_TOKENS


def mixture_flops(
    router: nn.Module, experts: nn.Module, shared_expert: nn.Module | None, seq_len: int, dim: int | None = None
) -> float:
    """Forward FLOPs of one token of a mixture: router, shared expert, and as many experts as the router gives it.

    Args:
        dim: width of what router and shared expert see; None for that of the experts.
    """
    dim = dim or int(getattr(experts, "dim"))  # noqa: B009
    always = [flops_per_token(part, seq_len, seq_len, dim) for part in (router, shared_expert) if part is not None]
    return sum(flops.per_token for flops in always) + routed_flops(router, experts, seq_len, dim)


def routed_flops(router: nn.Module, experts: nn.Module, seq_len: int, dim: int | None) -> float:
    """Forward FLOPs of one token, of width `dim` at the router, in as many experts as that gives it."""
    width = int(getattr(experts, "dim"))  # noqa: B009
    num_experts, chosen = _chosen(router, experts, dim or width)
    return chosen * _flops_per_row(experts, seq_len, num_experts, width)


def _flops_per_row(experts: nn.Module, num_rows: int, num_experts: int, dim: int) -> float:
    """FLOPs of one row in one expert: declared, or counted with rows spread evenly, or assumed by dimension."""
    rows = [num_rows // num_experts + (i < num_rows % num_experts) for i in range(num_experts)]
    evenly = torch.tensor(rows, device="cpu")
    flops = flops_per_token(experts, num_rows, num_rows, dim, further=(evenly,))
    return flops.per_token / (num_experts if flops.source == "assumed" else 1)


def mixture_parameters(mixture: nn.Module, router: nn.Module, experts: nn.Module, dim: int | None = None) -> int:
    """Parameters that one token meets in a mixture: all but those of the experts that the router does not give it."""
    num_experts, chosen = _chosen(router, experts, dim or int(getattr(experts, "dim")))  # noqa: B009
    return num_parameters(mixture) - round((1 - chosen / num_experts) * num_parameters(experts))


def _chosen(router: nn.Module, experts: nn.Module, dim: int) -> tuple[int, float]:
    """E, and how many experts a token of width `dim` meets; of a router that cannot be asked, its top_k or 1."""
    num_experts = int(getattr(experts, "num_experts"))  # noqa: B009
    return num_experts, experts_per_token(router, num_experts, dim, float(getattr(router, "top_k", 1)))
