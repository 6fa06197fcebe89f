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
    """A channel mixer with an initialisation of its own."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden_dim)
        self.down = nn.Linear(hidden_dim, dim)
        nn.init.constant_(self.down.weight, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class LinearRouter(nn.Module):
    """A router with an initialisation of its own."""

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
