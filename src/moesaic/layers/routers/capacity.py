"""Experts of limited capacity, which drop what is too much for them."""

from typing import Unpack

import torch.nn.functional as F
from torch import Tensor

from moesaic.layers.checks import require_numbers
from moesaic.layers.router import TopKRouter
from moesaic.layers.routers.arguments import TopKArguments

__all__ = ["CapacityRouter"]


class CapacityRouter(TopKRouter):
    """Top-k, of which in training each expert keeps the first capacity_factor T K / E rows (Switch, arXiv 2101.03961).

    Rows come in the order of the tokens of the batch, so an earlier token is never dropped for a later one. Whatever is
    dropped has no expert in that slot. In evaluation nothing is dropped: a loss with drops is that of another model.
    Padding takes up room.

    Args:
        capacity_factor: rows an expert may have, in multiples of its even share.
        others: as for `TopKRouter`.

    Raises:
        ValueError: by `forward` and `require_tokens`, if the capacity is below one row.
    """

    depends_on_batch = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        top_k: int = 1,
        capacity_factor: float = 1.25,
        **others: Unpack[TopKArguments],
    ) -> None:
        require_numbers(above=True, capacity_factor=capacity_factor)
        super().__init__(dim, num_experts, top_k=top_k, **others)
        self.capacity_factor = capacity_factor

    @property
    def may_skip(self) -> bool:
        return True

    @property
    def experts_per_token(self) -> float:
        """K: as many as in evaluation, where nothing is dropped."""
        return self.top_k

    def select(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        chosen = super().select(logits, probabilities)
        if not self.training or not chosen.numel():
            return chosen
        capacity = self.require_tokens(chosen.size(0))
        rows = F.one_hot(chosen.flatten(), self.num_experts)
        place = rows.cumsum(dim=0).gather(1, chosen.flatten()[:, None]).view_as(chosen)  # from 1, among its expert's
        return chosen.masked_fill(place > capacity, self.num_experts)

    def require_tokens(self, num_tokens: int) -> int:
        """How many rows an expert may have of so many tokens.

        Raises:
            ValueError: none.
        """
        rows = num_tokens * self.top_k
        if (capacity := int(self.capacity_factor * rows / self.num_experts)) < 1:
            raise ValueError(
                f"capacity_factor={self.capacity_factor:g}: leaves no row to an expert with {num_tokens} tokens, "
                f"top_k={self.top_k} and num_experts={self.num_experts}; must be at least {self.num_experts / rows:g}"
            )
        return capacity

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, capacity_factor={self.capacity_factor:g}"
