"""A short trial of a custom router, before anything depends on it."""

import torch
from torch import Tensor

from moesaic.errors import InputError
from moesaic.layers import MovingRouter
from moesaic.layers.routers.moving import observed_by
from moesaic.layers.routing import beside_tokens, counted
from moesaic.models.config import DecoderConfig
from moesaic.models.decoder import build_layer_router

__all__ = ["try_custom_router"]


def try_custom_router(config: DecoderConfig, num_tokens: int) -> None:
    """Call the custom router of each MoE layer once in training mode, on noise; do nothing if there is none.

    Other errors of its own code come through as they are: their traceback shows its lines.

    Raises:
        InputError: it returns or observes something else than its place takes.
    """
    moe = config.moe
    if moe is None or moe.built_in_router is not None:
        return
    state: Tensor | None = None
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for i in (i for i, layer in enumerate(config.layers) if layer.ffn == "moe"):
            router = build_layer_router(config, moe, i).train()
            weight = next(router.parameters(), torch.empty(0))
            tokens = torch.randn(num_tokens, config.dim).to(weight.dtype)
            beside = beside_tokens(router, tokens)
            decided = router(tokens, **{**beside, **({"router_state": state} if "router_state" in beside else {})})
            try:
                routing = counted(router, decided, tokens, moe.num_routed, is_replayed=False, assume_full=False)
                observed = observed_by(router, routing, None) if isinstance(router, MovingRouter) else None
            except (TypeError, ValueError) as error:
                raise InputError(f"model.moe.router, layer {i}: {error}") from error
            if isinstance(router, MovingRouter) and observed is not None:
                router.end_step(observed)
            state = routing.state
