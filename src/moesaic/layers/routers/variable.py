"""What routers share whose tokens have different numbers of experts."""

from torch import Tensor

from moesaic.layers.checks import is_shape_only
from moesaic.layers.router import TopKRouter

__all__ = ["VariableRouter", "slots_of"]


class VariableRouter(TopKRouter):
    """A router that chooses by a mask (T, E); a token may have any number of experts, top_k in the mean."""

    @property
    def may_skip(self) -> bool:
        return True

    @property
    def experts_per_token(self) -> float:
        """The number that it aims at."""
        return self.top_k

    def select(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        probabilities = probabilities.detach()
        return slots_of(self.choose(logits.detach(), probabilities), probabilities, self.top_k)

    def choose(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        """Choose the experts that each token has, (T, E) bool."""
        raise NotImplementedError


def slots_of(is_chosen: Tensor, ranking: Tensor, default: int) -> Tensor:
    """Expert ids (T, K) of a choice (T, E), the best by `ranking` (T, E) first, then E for none.

    K is the most that any token has, and at least 1. Where numbers cannot be seen it is `default`.
    """
    num_experts = is_chosen.size(1)
    width = default
    if not is_shape_only(is_chosen):
        width = max(1, int(is_chosen.sum(dim=1).max())) if is_chosen.numel() else 1
    order = ranking.masked_fill(~is_chosen, -float("inf")).topk(width, dim=-1).indices
    return order.masked_fill(~is_chosen.gather(1, order), num_experts)
