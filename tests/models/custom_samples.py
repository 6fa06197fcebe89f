"""Parts of a user's own, which tests name by dotted path (`custom_samples.RunningMean`)."""

import torch
from torch import Tensor, nn

from moesaic.layers import Routing, TopKRouter


class RunningMean(nn.Module):
    """A token mixer without cache."""

    def __init__(self, dim: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.arange(1, x.size(1) + 1, dtype=x.dtype)[:, None]
        return self.scale * self.out(x.cumsum(dim=1) / seen)


class TwoMatrices(nn.Module):
    """A channel mixer with an initialization of its own."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden_dim)
        self.down = nn.Linear(hidden_dim, dim)
        nn.init.constant_(self.down.weight, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class LinearRouter(nn.Module):
    """A router with an initialization of its own."""

    def __init__(self, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.linear = nn.Linear(dim, num_experts)
        nn.init.constant_(self.linear.weight, 0.25)
        nn.init.constant_(self.linear.bias, 0.125)

    def forward(self, x: Tensor) -> Routing:
        logits = self.linear(x)
        scores, ids = logits.softmax(dim=-1).topk(self.top_k, dim=-1)
        return Routing(logits, scores, ids)


class BottomKRouter(TopKRouter):
    """Picks the worst experts."""

    def __init__(self, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__(dim, num_experts, top_k=top_k)
        nn.init.constant_(self.weight, 0.25)

    def select(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        return logits.topk(self.top_k, dim=-1, largest=False).indices


class Refusing(nn.Module):
    def __init__(self, dim: int) -> None:
        raise ValueError(f"dim={dim}: too small")


def not_a_module(dim: int) -> list[int]:
    return [dim]


class Reversing(nn.Module):
    """A mixer that says so by its signature."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, cache: None = None, attention_mask: Tensor | None = None) -> Tensor:
        return self.out(x.flip(1))


class UnsaidRouter(LinearRouter):
    """A router that says so by what it returns only."""

    def forward(self, x: Tensor):  # type: ignore[no-untyped-def,override]
        return tuple(super().forward(x))


class AsksForIds(LinearRouter):
    def forward(self, x, token_ids):  # type: ignore[no-untyped-def, override]
        return tuple(super().forward(x))


class AsksForState(LinearRouter):
    def forward(self, x, router_state):  # type: ignore[no-untyped-def, override]
        return tuple(super().forward(x))


class BothWays(nn.Module):
    """Fits two seams."""

    def forward(self, x: Tensor, cache: None = None, expert_ids: Tensor | None = None) -> Tensor:
        return x


class EachAlone(nn.Module):
    """Experts."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_experts, dim, dim) * dim**-0.5)

    def forward(self, rows: Tensor, rows_per_expert: Tensor) -> Tensor:
        pieces = rows.split(rows_per_expert.tolist())
        return torch.cat([piece @ weight for piece, weight in zip(pieces, self.weight, strict=True)])


class InOrder:
    """A dispatcher, in name."""

    def dispatch(self, x: Tensor, routing: Routing) -> None: ...

    def combine(self, rows: Tensor, context: None) -> None: ...


def make_router(dim: int, num_experts: int, top_k: int) -> LinearRouter:
    return LinearRouter(dim, num_experts, top_k)


def make_unsaid(dim: int):  # type: ignore[no-untyped-def]
    return Reversing(dim)


class Pair(nn.Module):
    """No part: a router's two first values."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.keys = nn.Linear(dim, num_experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        best, expert_ids = self.keys(x).max(dim=-1, keepdim=True)
        return best, expert_ids
