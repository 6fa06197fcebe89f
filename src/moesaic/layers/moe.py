"""The mixture-of-experts layer (channel mixer)."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from moesaic.layers.dispatch import Dispatcher, LocalDispatcher
from moesaic.layers.experts import CASTING_BACKENDS, Experts, choose_backend, run_experts
from moesaic.layers.feed_forward import ACTIVATIONS, FeedForward
from moesaic.layers.router import Routing, ScoreFunction, TopKRouter

__all__ = ["MoE", "RoutedLayer", "mix_experts"]

LEAN_ELEMENTS = 2**20
"""Hidden activations (tokens x width) from which on it is worth copying the gate's and up's weights into one."""


def mix_experts(
    x: Tensor,
    routing: Routing,
    experts: Callable[[Tensor, Tensor], Tensor],
    dispatcher: Dispatcher,
    score_before_experts: bool,
) -> Tensor:
    """x (T, D) -> (T, D): dispatch, experts, combine, with the score on one side of the experts."""
    rows, context = dispatcher.dispatch(x, routing)
    if score_before_experts:
        rows = rows * context.row_scores
    rows = experts(rows, context.rows_per_expert)
    if not score_before_experts:
        rows = rows * context.row_scores
    return dispatcher.combine(rows, context)


@runtime_checkable
class RoutedLayer(Protocol):
    """A channel mixer that can say how it routed. `MoE` is one; losses, logs and plots need nothing else."""

    def forward_with_routing(self, x: Tensor) -> tuple[Tensor, Routing]: ...


class MoE(nn.Module):
    """Dropless mixture of experts with an optional shared expert, a drop-in replacement for an FFN.

    Llama 4: y = shared_expert(x) + sum over the chosen experts e of expert_e(score_e * x). The score multiplies the
    *input* of the expert (`score_before_experts`); SwiGLU is not homogeneous, so scaling its output is something else.

    The parts are injected; `MoE.build` makes the common ones from sizes:

        moe = MoE.build(dim=256, hidden_dim=512, num_experts=16)
        y = moe(x)                                # x (..., 256)
        y, routing = moe.forward_with_routing(x)  # for balance losses and logs

    Args:
        router: x (T, D) -> `Routing`.
        experts: rows (R, D) sorted by expert, rows_per_expert (E,) -> (R, D).
        shared_expert: sees every token, unscaled; None for none.
        dispatcher: how rows reach the experts.
        score_before_experts: whether the score multiplies the experts' input (Llama 4) or output (most others).
    """

    def __init__(
        self,
        *,
        router: nn.Module,
        experts: nn.Module,
        shared_expert: nn.Module | None = None,
        dispatcher: Dispatcher | None = None,
        score_before_experts: bool = True,
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared_expert = shared_expert
        self.dispatcher: Dispatcher = LocalDispatcher() if dispatcher is None else dispatcher
        self.score_before_experts = score_before_experts

    @classmethod
    def build(
        cls,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        *,
        top_k: int = 1,
        shared_hidden_dim: int | None = None,
        score_function: ScoreFunction = "sigmoid",
        normalize_scores: bool = False,
        score_before_experts: bool = True,
        expert_bias: bool = False,
        activation: str = "silu",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "MoE":
        """The layer of Llama 4 from sizes alone; every argument is explained at the part it goes to.

        Args:
            hidden_dim: width F of each routed expert.
            shared_hidden_dim: width of the shared expert; None means `hidden_dim`, 0 means no shared expert.
        """
        shared_width = hidden_dim if shared_hidden_dim is None else shared_hidden_dim
        return cls(
            router=TopKRouter(
                dim,
                num_experts,
                top_k=top_k,
                score_function=score_function,
                normalize_scores=normalize_scores,
                expert_bias=expert_bias,
                device=device,
                dtype=dtype,
            ),
            experts=Experts(
                num_experts, dim, hidden_dim, activation=activation, backend=backend, device=device, dtype=dtype
            ),
            shared_expert=FeedForward(dim, shared_width, activation=activation, device=device, dtype=dtype)
            if shared_width
            else None,
            score_before_experts=score_before_experts,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.forward_with_routing(x)[0]

    def forward_with_routing(self, x: Tensor) -> tuple[Tensor, Routing]:
        """(..., D) -> (..., D), and the router's decision over the T flattened tokens.

        Returning it, instead of storing it on a module or calling hooks, keeps it exactly once under activation
        checkpointing and lets go of it with the step.
        """
        tokens = x.reshape(-1, x.size(-1))
        routing: Routing = self.router(tokens)
        routed = mix_experts(tokens, routing, self.experts, self.dispatcher, self.score_before_experts).view_as(x)
        if self.shared_expert is None:
            return routed, routing
        if runs_lean(self.shared_expert, self.experts, tokens.size(0), tokens.device, tokens.dtype):
            return run_as_expert(self.shared_expert, self.experts, x) + routed, routing
        return self.shared_expert(x) + routed, routing

    def extra_repr(self) -> str:
        return f"score_before_experts={self.score_before_experts}"


def runs_lean(shared: nn.Module, experts: nn.Module, num_tokens: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether to run the shared expert on the backend of the routed ones, which keeps half as much for the backward.

    Only where that is not slower, in fp32 on a CPU and at some size, or where "sliced_recompute" asks for little
    memory. And only if nobody replaced or hooked its parts.
    """
    if type(shared) is not FeedForward or type(experts) is not Experts:
        return False
    projections = (shared.gate_proj, shared.up_proj, shared.down_proj)
    if num_tokens * shared.down_proj.in_features < LEAN_ELEMENTS:
        return False
    if any(type(part) is not nn.Linear or part._forward_hooks or part._forward_pre_hooks for part in projections):
        return False
    is_fp32 = dtype == torch.float32 and not torch.is_autocast_enabled(device.type)
    if not is_fp32 and experts.backend != "sliced_recompute":
        return False
    activation = ACTIVATIONS[shared.activation]
    sizes = shared.gate_proj.in_features, shared.gate_proj.out_features
    return choose_backend(device, dtype, *sizes, experts.backend, activation)[0] in CASTING_BACKENDS


def run_as_expert(shared: nn.Module, experts: nn.Module, x: Tensor) -> Tensor:
    """shared(x (..., D)), as one expert that all tokens go to."""
    assert isinstance(shared, FeedForward) and isinstance(experts, Experts)
    rows = x.reshape(-1, x.size(-1))
    gate_up = torch.cat((shared.gate_proj.weight, shared.up_proj.weight)).t()
    y = run_experts(
        rows,
        gate_up[None],
        shared.down_proj.weight.t()[None],
        torch.tensor([rows.size(0)]),
        ACTIVATIONS[shared.activation],
        experts.backend,
    )
    return y.view_as(x)
