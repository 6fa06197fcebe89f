"""Top-p routing: as many experts as it takes to be sure."""

from typing import Unpack

from torch import Tensor

from moesaic.layers.checks import require_numbers
from moesaic.layers.router import TopKRouter
from moesaic.layers.routers.arguments import TopKArguments

__all__ = ["TopPRouter"]


class TopPRouter(TopKRouter):
    """The fewest experts whose softmax adds up to p, and at most top_k (Huang et al. 2024, arXiv 2403.07652).

    A token that the router is sure of has one expert, and others have more. FLOPs are stated for top_k experts, the
    most; the log has the number that tokens really had. In the paper top_k is all experts.

    Args:
        p: what the probabilities of the chosen ones must reach, above 0 and at most 1.
        top_k: the most experts of a token.
        others: as for `TopKRouter`.

    Raises:
        ValueError: p out of range, or scores that are no softmax.
    """

    def __init__(
        self, dim: int, num_experts: int, *, top_k: int = 1, p: float = 0.5, **others: Unpack[TopKArguments]
    ) -> None:
        require_numbers(above=True, p=p)
        if p > 1:
            raise ValueError(f"p={p}: must be a number > 0 and <= 1")
        super().__init__(dim, num_experts, top_k=top_k, **others)
        if self.score_function != "softmax":
            raise ValueError(f"score_function={self.score_function!r}: must be softmax, whose scores add up to 1")
        self.p = p

    @property
    def may_skip(self) -> bool:
        return True

    @property
    def experts_per_token(self) -> float:
        """K, the most that a token can have."""
        return self.top_k

    def select(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        chosen = super().select(logits, probabilities)
        found = probabilities.detach().gather(1, chosen)
        return chosen.masked_fill(found.cumsum(dim=-1) - found >= self.p, self.num_experts)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p:g}"
