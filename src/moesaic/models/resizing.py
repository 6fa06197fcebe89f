"""The same model, wider or deeper: what a proxy and its target have in common."""

import dataclasses

from moesaic.errors import InputError
from moesaic.models.config import DecoderConfig

__all__ = ["resized"]


def resized(config: DecoderConfig, *, dim: int | None = None, num_layers: int | None = None) -> DecoderConfig:
    """The model at another width and depth, with all else in proportion.

    FFNs and experts grow with the width, and so does the number of heads. The size of a head, the number of experts and
    of those that a token meets, and the depth pattern stay.

    Raises:
        InputError: the width of a layer, or the number of heads, would not be whole.
    """
    dim = config.dim if dim is None else dim

    def scaled(name: str, size: int) -> int:
        if size * dim % config.dim:
            raise InputError(
                f"dim={dim}: {name}={size} of dim={config.dim} would be {size * dim / config.dim:g}; must be whole"
            )
        return size * dim // config.dim

    attention = dataclasses.replace(
        config.attention,
        num_heads=scaled("attention.num_heads", config.attention.num_heads),
        num_kv_heads=scaled("attention.num_kv_heads", config.num_kv_heads),
        head_dim=config.head_dim,
    )
    moe = config.moe
    if moe is not None:
        shared = None if moe.shared_hidden_dim is None else scaled("moe.shared_hidden_dim", moe.shared_hidden_dim)
        moe = dataclasses.replace(moe, hidden_dim=scaled("moe.hidden_dim", moe.hidden_dim), shared_hidden_dim=shared)
    return dataclasses.replace(
        config,
        dim=dim,
        num_layers=config.num_layers if num_layers is None else num_layers,
        attention=attention,
        hidden_dim=scaled("hidden_dim", config.hidden_dim),
        moe=moe,
    )
