"""A router that is a small network."""

from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.layers.checks import require_sizes
from moesaic.layers.norm import RMSNorm
from moesaic.layers.parametrization import Fans, ParameterKind
from moesaic.layers.router import TopKRouter
from moesaic.layers.routers.arguments import TopKArguments

__all__ = ["MlpRouter"]


class MlpRouter(TopKRouter):
    """Top-k of the logits of a network: a projection to `router_dim`, a norm and two GELU layers (ZAYA1, 2511.17127).

    ZAYA1 has softmax scores of top-1, and skip experts. It also adds the projection of the layer before, which this
    router does not.

    Args:
        router_dim: width of the network.
        others: as for `TopKRouter`; its `weight` (E, router_dim) is the last layer.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        top_k: int = 1,
        router_dim: int,
        norm_eps: float = 1e-6,
        **others: Unpack[TopKArguments],
    ) -> None:
        require_sizes(dim=dim, router_dim=router_dim)
        super().__init__(router_dim, num_experts, top_k=top_k, **others)
        where: dict[str, Any] = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.dim = dim
        self.router_dim = router_dim
        self.down_proj = nn.Linear(dim, router_dim, **where)
        self.norm = RMSNorm(router_dim, eps=norm_eps, **where)
        self.hidden = nn.ModuleList([nn.Linear(router_dim, router_dim, **where) for _ in range(2)])

    def parameter_kinds(self) -> dict[str, ParameterKind]:
        """Only the last layer is like an output."""
        hidden: dict[str, ParameterKind] = {f"hidden.{i}.weight": "matrix" for i in range(2)}
        return {**super().parameter_kinds(), **hidden, "down_proj.weight": "matrix"}

    def fans(self) -> dict[str, Fans]:
        return {"weight": Fans(self.router_dim, self.num_experts)}

    def flops_per_token(self, seq_len: int) -> float:
        matrices = [self.weight, self.down_proj.weight, *(layer.weight for layer in self._layers)]
        return 2 * sum(matrix.numel() for matrix in matrices)

    def logits_of(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            hidden = self.norm(self.down_proj(x.to(self.weight.dtype)))
            for layer in self._layers:
                hidden = F.gelu(layer(hidden))
        return super().logits_of(hidden)

    @property
    def _layers(self) -> list[nn.Linear]:
        return [layer for layer in self.hidden if isinstance(layer, nn.Linear)]
