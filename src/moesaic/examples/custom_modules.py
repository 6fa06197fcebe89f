"""Custom modules, which enter a model through YAML by dotted path; conf/experiment/custom_modules.yaml uses all three.

    moesaic train experiment=custom_modules

A custom module is a torch.nn.Module. Its constructor is given by name what it asks for (dim, layer_index, num_layers,
norm_eps, num_experts, top_k, score_function, normalize_scores, expert_bias), and what its YAML entry says beside
`type`. Your own modules are found in the working folder. What they may say of themselves is in `moesaic.layers.Part`.
"""

import torch
from torch import Tensor, nn

from moesaic.layers import Routing

__all__ = ["CosineRouter", "GatedAverage", "ReluSquared", "ReluSquaredExperts"]


class GatedAverage(nn.Module):
    """A token mixer: the running mean of all tokens so far, gated per channel. Causal, no cache."""

    def __init__(self, dim: int, expand: int = 2) -> None:
        super().__init__()
        self.value = nn.Linear(dim, expand * dim, bias=False)
        self.gate = nn.Linear(dim, expand * dim, bias=False)
        self.out = nn.Linear(expand * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        seen = torch.arange(1, x.size(1) + 1, device=x.device, dtype=x.dtype)[:, None]
        return self.out(self.value(x).cumsum(dim=1) / seen * torch.sigmoid(self.gate(x)))


class ReluSquared(nn.Module):
    """A channel mixer: an ungated FFN with a squared ReLU (So et al. 2021, arXiv 2109.08668)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.down(torch.relu(self.up(x)).square())


class ReluSquaredExperts(nn.Module):
    """The experts of a MoE layer: `ReluSquared` for each, without a gate."""

    def __init__(self, dim: int, hidden_dim: int, num_experts: int) -> None:
        super().__init__()
        self.dim, self.num_experts = dim, num_experts
        self.up = nn.Parameter(torch.randn(num_experts, dim, hidden_dim) * dim**-0.5)
        self.down = nn.Parameter(torch.randn(num_experts, hidden_dim, dim) * hidden_dim**-0.5)

    def fans(self) -> dict[str, tuple[int, int]]:
        """Features that each matrix reads and gives, for model.parametrization=transfer alone."""
        _, dim, hidden_dim = self.up.shape
        return {"up": (dim, hidden_dim), "down": (hidden_dim, dim)}

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs of one row in one expert."""
        return 2 * (self.up.numel() + self.down.numel()) / self.num_experts

    def forward(self, rows: Tensor, rows_per_expert: Tensor) -> Tensor:
        """rows (R, D) sorted by expert, rows_per_expert (E,) -> (R, D)."""
        parts = rows.split(rows_per_expert.tolist())
        return torch.cat(
            [torch.relu(x @ up).square() @ down for x, up, down in zip(parts, self.up, self.down, strict=True)]
        )


class CosineRouter(nn.Module):
    """A router: cosine similarity to one learned key per expert (Chi et al. 2022, arXiv 2204.09179)."""

    may_skip = False  # every token has an expert: `MoE` need not look for slots without one

    def __init__(self, dim: int, num_experts: int, top_k: int, scale: float = 8.0) -> None:
        super().__init__()
        self.top_k = top_k
        self.scale = scale
        self.keys = nn.Parameter(torch.randn(num_experts, dim))

    def fans(self) -> dict[str, tuple[int, int]]:
        """Features that the keys read and logits that they give, for model.parametrization=transfer alone."""
        num_experts, dim = self.keys.shape
        return {"keys": (dim, num_experts)}

    def forward(self, x: Tensor, expert_ids: Tensor | None = None) -> Routing:
        """x (T, D) -> logits (T, E), scores (T, K), expert_ids (T, K), those chosen or those given; `MoE` counts."""
        logits = self.scale * nn.functional.normalize(x, dim=-1) @ nn.functional.normalize(self.keys, dim=-1).T
        if expert_ids is None:
            expert_ids = logits.topk(self.top_k, dim=-1).indices
        return Routing(logits, torch.sigmoid(logits.gather(1, expert_ids)).to(x.dtype), expert_ids)
