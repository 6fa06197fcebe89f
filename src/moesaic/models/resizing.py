"""The same model, wider or deeper: what a proxy and its target have in common."""

import dataclasses
from typing import Any

from moesaic.errors import InputError
from moesaic.imports import PARTS
from moesaic.models.config import DecoderConfig, LayerConfig

__all__ = ["resized"]

OWN_WIDTHS = ("hidden_dim", "router_dim")
"""Arguments of our own parts that are widths, where a config gives them to a part of ours."""


def resized(config: DecoderConfig, *, dim: int | None = None, num_layers: int | None = None) -> DecoderConfig:
    """The model at another width and depth, with all else in proportion.

    FFNs and experts grow with the width, and so do the number of heads, latents, and the widths that a part of ours is
    given by name. The size of a head, the number of experts and of those that a token meets, and the depth pattern
    stay, and so does what a module of somebody else is given.

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

    attention, mla = config.attention, config.attention.mla
    heads = scaled("attention.num_heads", attention.num_heads)
    if mla is None:
        kv_heads = scaled("attention.num_kv_heads", config.num_kv_heads)
        attention = dataclasses.replace(attention, num_heads=heads, num_kv_heads=kv_heads, head_dim=config.head_dim)
    else:
        rank = scaled("attention.mla.kv_lora_rank", mla.kv_lora_rank)
        q_rank = None if mla.q_lora_rank is None else scaled("attention.mla.q_lora_rank", mla.q_lora_rank)
        mla = dataclasses.replace(mla, kv_lora_rank=rank, q_lora_rank=q_rank)
        attention = dataclasses.replace(attention, num_heads=heads, mla=mla)

    def scaled_part(name: str, part: Any) -> Any:
        """A part as a config has it, with its own widths."""
        if not isinstance(part, dict) or not (part["type"].startswith(PARTS) or part["type"].isidentifier()):
            return part
        return part | {key: scaled(f"{name}.{key}", part[key]) for key in OWN_WIDTHS if isinstance(part.get(key), int)}

    moe = config.moe
    if moe is not None:
        shared = None if moe.shared_hidden_dim is None else scaled("moe.shared_hidden_dim", moe.shared_hidden_dim)
        latent = None if moe.latent_dim is None else scaled("moe.latent_dim", moe.latent_dim)
        moe = dataclasses.replace(
            moe,
            hidden_dim=scaled("moe.hidden_dim", moe.hidden_dim),
            shared_hidden_dim=shared,
            latent_dim=latent,
            router=scaled_part("moe.router", moe.router),
        )
    pattern = config.pattern
    if pattern is not None:
        pattern = tuple(LayerConfig(layer.mixer, scaled_part("pattern.ffn", layer.ffn)) for layer in pattern)
    return dataclasses.replace(
        config,
        dim=dim,
        num_layers=config.num_layers if num_layers is None else num_layers,
        attention=attention,
        hidden_dim=scaled("hidden_dim", config.hidden_dim),
        moe=moe,
        pattern=pattern,
    )
