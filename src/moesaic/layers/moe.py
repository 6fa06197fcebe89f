"""The mixture-of-experts layer (channel mixer)."""

import inspect
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from moesaic.layers.backend_choice import BackendName
from moesaic.layers.checks import (
    require_flags,
    require_last,
    require_sizes,
    require_weights_dtype,
)
from moesaic.layers.dispatch import Dispatcher, LocalDispatcher
from moesaic.layers.experts import Experts
from moesaic.layers.feed_forward import ActivationName, FeedForward
from moesaic.layers.latent import Latent
from moesaic.layers.mixture import mixture_fans, mixture_flops, mixture_parameters
from moesaic.layers.parametrization import Fans, ParameterKind
from moesaic.layers.part import declared_kinds, parameter_kinds
from moesaic.layers.replay import replay
from moesaic.layers.router import ScoreFunction, TopKRouter
from moesaic.layers.routing import Routing, counted

__all__ = ["MoE", "RoutedLayer", "mix_experts"]


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
    """Mixture of experts with an optional shared expert, a drop-in replacement for an FFN. It drops no token.

    Llama 4: y = shared_expert(x) + sum over the chosen experts e of expert_e(score_e * x). The score multiplies the
    *input* of the expert (`score_before_experts`); SwiGLU is not homogeneous, so scaling its output is something else.

    The parts are injected; `MoE.build` makes the common ones from sizes:

        moe = MoE.build(dim=256, hidden_dim=512, num_experts=16)
        y = moe(x)                                # x (..., 256)
        y, routing = moe.forward_with_routing(x)  # for balance losses and logs

    Args:
        router: x (T, D) -> logits (T, E), scores (T, K), expert_ids (T, K), as a `Routing` or a tuple. The layer counts
            the tokens of each expert. An id of E means "no expert"; a router that never gives it may say so with an
            attribute `may_skip = False`, which saves a host synchronization on GPUs. If its forward has an argument
            `token_ids`, it gets the ids (T,) of the tokens; if `router_state`, the `Routing.state` of the MoE layer
            before, or None.
        experts: rows (R, D) sorted by expert, rows_per_expert (E,) -> (R, D).
        shared_expert: sees every token, unscaled; None for none.
        dispatcher: how rows reach the experts.
        score_before_experts: whether the score multiplies the experts' input (Llama 4) or output (most others).
        latent: projections around dispatch, experts and combine, for experts of another width; None for none.
    """

    def __init__(
        self,
        *,
        router: nn.Module,
        experts: nn.Module,
        shared_expert: nn.Module | None = None,
        dispatcher: Dispatcher | None = None,
        score_before_experts: bool = True,
        latent: Latent | None = None,
    ) -> None:
        super().__init__()
        if latent is not None and getattr(experts, "dim", None) != (width := latent.up_proj.in_features):
            raise ValueError(f"experts of width {getattr(experts, 'dim', None)}: must be {width}, the latent width")
        if score_before_experts and any(getattr(part, "normalizes_output", False) for part in experts.modules()):
            raise ValueError(
                f"score_before_experts=True: must be False with {type(experts).__name__}, whose norm would take the "
                "score out again"
            )
        self.router = router
        self.experts = experts
        self.shared_expert = shared_expert
        self.dispatcher: Dispatcher = LocalDispatcher() if dispatcher is None else dispatcher
        self.score_before_experts = score_before_experts
        self.latent = latent
        self.takes_token_ids = "token_ids" in inspect.signature(router.forward).parameters
        """Whether the router asks for the ids of the tokens; the forward methods then take them."""
        self.takes_router_state = "router_state" in inspect.signature(router.forward).parameters
        """Whether the router asks for what the one of the MoE layer before left in `Routing.state`."""
        self.assume_full = False
        """Whether to take it that every slot has an expert, without looking: for tensors without values."""

    @property
    def dim(self) -> int | None:
        """Model width D, or None if neither the experts nor a latent width tell."""
        return getattr(self.experts, "dim", None) if self.latent is None else self.latent.up_proj.out_features

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
        activation: ActivationName = "silu",
        backend: BackendName = "auto",
        router: nn.Module | None = None,
        experts: nn.Module | None = None,
        dispatcher: Dispatcher | None = None,
        latent_dim: int | None = None,
        latent_norm_eps: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "MoE":
        """The layer of Llama 4 from sizes alone; every argument is explained at the part it goes to.

        Args:
            hidden_dim: width F of each routed expert.
            shared_hidden_dim: width of the shared expert; None means `hidden_dim`, 0 means no shared expert.
            router: takes the place of the `TopKRouter`, and with it of all arguments about choice and scores.
            experts: takes the place of the SwiGLU `Experts`; a shared expert still has `hidden_dim`.
            latent_dim: width of the experts, with projections around them; None for `dim` and none.
            latent_norm_eps: of a norm behind the projection down; None for no norm.
        """
        if shared_hidden_dim is not None:
            require_sizes(0, shared_hidden_dim=shared_hidden_dim)
        require_flags(score_before_experts=score_before_experts)
        shared_width = hidden_dim if shared_hidden_dim is None else shared_hidden_dim
        if router is None:
            router = TopKRouter(
                dim,
                num_experts,
                top_k=top_k,
                score_function=score_function,
                normalize_scores=normalize_scores,
                expert_bias=expert_bias,
                device=device,
                dtype=dtype,
            )
        where: dict[str, Any] = {"activation": activation, "backend": backend, "device": device, "dtype": dtype}
        latent = None
        if latent_dim is not None:
            latent = Latent(dim, latent_dim, norm_eps=latent_norm_eps, device=device, dtype=dtype)
        return cls(
            router=router,
            experts=Experts(num_experts, latent_dim or dim, hidden_dim, **where) if experts is None else experts,
            shared_expert=FeedForward(dim, shared_width, **where) if shared_width else None,
            dispatcher=dispatcher,
            score_before_experts=score_before_experts,
            latent=latent,
        )

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.forward_with_routing(x, token_ids=token_ids)[0]

    def forward_with_routing(
        self,
        x: Tensor,
        routing: Routing | None = None,
        token_ids: Tensor | None = None,
        router_state: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        """(..., D) -> (..., D), and the router's decision over the T flattened tokens.

        Returning it, instead of storing it on a module or calling hooks, keeps it exactly once under activation
        checkpointing and lets go of it with the step.

        Args:
            routing: replays its expert_ids (T, K) instead of choosing. The scores are computed anew from all logits, so
                the router learns as if it had made this choice. The result is marked as `replayed`.
            token_ids: (...) int64, for a router that asks for them.
            router_state: (T, S), the `Routing.state` of the MoE layer before, for a router that asks for it.

        Raises:
            ValueError: a router that returns other shapes than `Routing` says, or that cannot replay.
        """
        require_last(x, self.dim, "MoE")
        if isinstance(self.experts, Experts):
            require_weights_dtype("MoE", x, self.experts.down_proj)
        tokens = x.reshape(-1, x.size(-1))
        asked = {"token_ids": None if token_ids is None else token_ids.flatten()} if self.takes_token_ids else {}
        state = {"router_state": router_state} if self.takes_router_state else {}
        num_experts, is_replayed = getattr(self.experts, "num_experts", None), routing is not None
        if routing is None:
            found = self.router(tokens, **asked, **state)
        else:
            found = replay(self.router, tokens, routing, num_experts, **state)
        decided = counted(self.router, found, tokens, num_experts, is_replayed, self.assume_full)
        inputs = tokens if self.latent is None else self.latent.down(tokens)
        y = mix_experts(inputs, decided, self.experts, self.dispatcher, self.score_before_experts)
        y = (y if self.latent is None else self.latent.up(y)).view_as(x)
        return y if self.shared_expert is None else self.shared_expert(x) + y, decided

    def parameter_kinds(self) -> dict[str, ParameterKind]:
        """The matrices of a router are output-like, whatever its class, unless it says otherwise of one.

        Its logits are not hidden features.
        """
        declared, kinds = declared_kinds(self.router), parameter_kinds(self.router)
        return {f"router.{name}": "output" for name, kind in kinds.items() if kind == "matrix" and name not in declared}

    def fans(self) -> dict[str, Fans]:
        """With a latent width the experts' sum is one of its own, which the projection up takes."""
        return mixture_fans(self.router, self.experts, self.shared_expert, adds_up=self.latent is None)

    def flops_per_token(self, seq_len: int) -> float:
        """Router, shared expert, and as many experts as the router gives a token."""
        around = 0.0 if self.latent is None else self.latent.flops_per_token(seq_len)
        return around + mixture_flops(self.router, self.experts, self.shared_expert, seq_len, self.dim)

    def active_parameters(self) -> int:
        """All but those of the experts that a token does not meet."""
        return mixture_parameters(self, self.router, self.experts, self.dim)

    def extra_repr(self) -> str:
        return f"score_before_experts={self.score_before_experts}"
