"""A router that is a small network."""

from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.layers.checks import require_flags, require_last, require_sizes, require_tensor
from moesaic.layers.norm import RMSNorm
from moesaic.layers.parametrization import Fans, ParameterKind, Parametrization
from moesaic.layers.part import initialize as initialize_part
from moesaic.layers.router import TopKRouter
from moesaic.layers.routers.arguments import TopKArguments
from moesaic.layers.routing import Routing

__all__ = ["MlpRouter"]


class MlpRouter(TopKRouter):
    """Top-k of the logits of a network: a projection to `router_dim`, a norm and two GELU layers (ZAYA1, 2511.17127).

    ZAYA1 has softmax scores of top-1, and skip experts. With `depth_average` it is ZAYA1's router: a token's projection
    gets that of the MoE layer before, times a learned `state_scale` (router_dim,), and the sum goes on to the next
    layer. In the first one there is nothing to add, and the scale stays as it is.

    Args:
        router_dim: width of the network.
        depth_average: whether to add what the router of the MoE layer before had, of the same `router_dim`.
        others: as for `TopKRouter`; its `weight` (E, router_dim) is the last layer.
    """

    state_scale: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        top_k: int = 1,
        router_dim: int,
        depth_average: bool = False,
        norm_eps: float = 1e-6,
        **others: Unpack[TopKArguments],
    ) -> None:
        require_sizes(dim=dim, router_dim=router_dim)
        require_flags(depth_average=depth_average)
        super().__init__(router_dim, num_experts, top_k=top_k, **others)
        where: dict[str, Any] = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.dim = dim
        self.router_dim = router_dim
        self.down_proj = nn.Linear(dim, router_dim, **where)
        self.norm = RMSNorm(router_dim, eps=norm_eps, **where)
        self.hidden = nn.ModuleList([nn.Linear(router_dim, router_dim, **where) for _ in range(2)])
        self.state_scale = nn.Parameter(torch.ones(router_dim, **where)) if depth_average else None

    def initialize(self, parametrization: Parametrization) -> None:
        super().initialize(parametrization)
        for child in self.children():
            initialize_part(child, parametrization)
        if self.state_scale is not None:
            nn.init.ones_(self.state_scale)

    def parameter_kinds(self) -> dict[str, ParameterKind]:
        """Only the last layer is like an output."""
        hidden: dict[str, ParameterKind] = {f"hidden.{i}.weight": "matrix" for i in range(2)}
        return {**super().parameter_kinds(), **hidden, "down_proj.weight": "matrix"}

    def fans(self) -> dict[str, Fans]:
        return {"weight": Fans(self.router_dim, self.num_experts)}

    def flops_per_token(self, seq_len: int) -> float:
        matrices = [self.weight, self.down_proj.weight, *(layer.weight for layer in self._layers)]
        return 2 * sum(matrix.numel() for matrix in matrices)

    def forward(self, x: Tensor, expert_ids: Tensor | None = None, router_state: Tensor | None = None) -> Routing:
        """Route x (T, D), or score the experts in expert_ids (T, K') instead.

        Args:
            router_state: (T, router_dim), the `Routing.state` of the MoE layer before; None in the first one.

        Raises:
            ValueError: a state of another shape.
        """
        require_last(x, self.dim, "MlpRouter")
        state = self._state_of(x, router_state)
        return self.decide(self._logits_of_state(state), x.dtype, expert_ids)._replace(state=state)

    def logits_of(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, E), of tokens without a state from the layer before."""
        return self._logits_of_state(self._state_of(x, None))

    def _state_of(self, x: Tensor, before: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            state = self.down_proj(x.to(self.weight.dtype))
        if self.state_scale is None:
            return state
        if before is None:
            before = torch.zeros_like(state)  # so that the scale has a gradient, which DDP waits for
        require_tensor("MlpRouter", "router_state", before, tuple(state.shape))
        return state + before.to(state.dtype) * self.state_scale

    def _logits_of_state(self, state: Tensor) -> Tensor:
        with torch.autocast(state.device.type, enabled=False):
            hidden = self.norm(state)
            for layer in self._layers:
                hidden = F.gelu(layer(hidden))
        return super().logits_of(hidden)

    @property
    def _layers(self) -> list[nn.Linear]:
        return [layer for layer in self.hidden if isinstance(layer, nn.Linear)]
