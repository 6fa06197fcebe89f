"""Our layer behind the signature by which the benchmarks take anybody's."""

import torch

from moesaic.layers.moe import MoE

__all__ = ["benchmark_layer"]


def benchmark_layer(
    d_model: int,
    d_ff: int,
    n_experts: int,
    top_k: int = 1,
    shared: bool = True,
    dtype: torch.dtype | None = None,
) -> MoE:
    """What `moesaic bench peers layers=[package.module:factory]` calls, made by `MoE.build`.

    A factory of your own takes these keywords and returns an nn.Module that maps (B, L, d_model) to the same shape, or
    to a tuple that starts with it.

    Args:
        d_model: width D of the tokens.
        d_ff: width F of each expert, and of the shared one.
        n_experts: E.
        top_k: K.
        shared: whether a shared expert sees every token.
        dtype: of the parameters.
    """
    return MoE.build(d_model, d_ff, n_experts, top_k=top_k, shared_hidden_dim=d_ff if shared else 0, dtype=dtype)
