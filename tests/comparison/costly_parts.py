"""Parts that cost more than their sizes say, which tests name by dotted path (`costly_parts.ExpertChoice`)."""

import torch
from torch import Tensor, nn

from moesaic.layers import Routing, TopKRouter


class ExpertChoice(nn.Module):
    """Every expert takes the half of the tokens that it likes best (Zhou et al. 2022), in E slots per token."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Linear(dim, num_experts, bias=False)
        self.num_experts = num_experts

    def forward(self, x: Tensor) -> Routing:
        logits = self.weight(x)
        chosen = torch.zeros_like(logits, dtype=torch.bool)
        chosen.scatter_(0, logits.topk(x.size(0) // 2, dim=0).indices, True)
        ids = torch.arange(self.num_experts).expand_as(logits)
        return Routing(logits, torch.sigmoid(logits) * chosen, ids.masked_fill(~chosen, self.num_experts))


class PaddedChoice(nn.Module):
    """A router that sends each token to all experts, whatever its scores."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Linear(dim, num_experts, bias=False)

    def forward(self, x: Tensor) -> Routing:
        logits = self.weight(x)
        return Routing(logits, torch.sigmoid(logits), torch.arange(logits.size(1)).expand_as(logits))


class ModestRouter(TopKRouter):
    """Declares that it computes nothing."""

    def __init__(self, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__(dim, num_experts, top_k=top_k)

    def flops_per_token(self, seq_len: int) -> float:
        return 0.0


class QuadraticMixer(nn.Module):
    """Linear attention in its quadratic form: a whole (L, L) product, masked afterwards."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return torch.einsum("blm,bmd->bld", torch.einsum("bld,bmd->blm", q, k).tril(), v) / x.size(1)


class Orthogonal(nn.Module):
    """Asks LAPACK, whose work nobody counts."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.linalg.qr(self.weight).Q


class LeavesTorch(nn.Module):
    """Computes in numpy."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy().cumsum(1)) * self.weight


class Squared(nn.Module):
    """A channel mixer without a width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.up(x)).square()


class Scaled(nn.Module):
    """Experts without a width: each multiplies its rows by a matrix."""

    def __init__(self, num_experts: int, dim: int) -> None:
        super().__init__()
        self.num_experts, self.dim = num_experts, dim
        self.weight = nn.Parameter(torch.randn(num_experts, dim, dim))

    def forward(self, rows: Tensor, rows_per_expert: Tensor) -> Tensor:
        pieces = rows.split(rows_per_expert.tolist())
        return torch.cat([piece @ matrix for piece, matrix in zip(pieces, self.weight.unbind(), strict=True)])
