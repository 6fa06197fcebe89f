"""The decoder: embedding, blocks of (token mixer, channel mixer), final norm, head."""

import importlib
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moesaic.errors import InputError
from moesaic.layers import (
    Attention,
    Experts,
    FeedForward,
    MoE,
    RMSNorm,
    RotaryEmbedding,
    RoutedLayer,
    Routing,
    TopKRouter,
    UniformRouter,
)
from moesaic.models.config import DecoderConfig, LayerConfig, OwnPart

__all__ = ["Block", "Decoder", "DecoderOutput", "build_decoder"]


class DecoderOutput(NamedTuple):
    logits: Tensor
    """(B, L, V)."""
    routing: dict[str, Routing]
    """What each MoE layer decided, by module name ("layers.1.ffn"), over the B * L flattened tokens."""


class Block(nn.Module):
    """x += mixer(norm(x)); x += ffn(norm(x))."""

    def __init__(self, *, mixer: nn.Module, ffn: nn.Module, mixer_norm: nn.Module, ffn_norm: nn.Module) -> None:
        super().__init__()
        self.mixer_norm = mixer_norm
        self.mixer = mixer
        self.ffn_norm = ffn_norm
        self.ffn = ffn
        self.is_routed = isinstance(ffn, RoutedLayer)  # once: a protocol check is slow

    def forward(
        self, x: Tensor, cache: Any = None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Routing | None]:
        """x (B, L, D) -> (B, L, D), and the routing if the channel mixer is a MoE."""
        y = self.mixer_norm(x)
        if attention_mask is not None:
            y = self.mixer(y, cache, attention_mask)
        elif cache is not None:
            y = self.mixer(y, cache)
        else:
            y = self.mixer(y)
        x = x + y
        y = self.ffn_norm(x)
        if self.is_routed:
            y, routing = cast(RoutedLayer, self.ffn).forward_with_routing(y)
            return x + y, routing
        return x + self.ffn(y), None


class Decoder(nn.Module):
    """A decoder-only transformer over given blocks; `build_decoder` makes one from a config.

    Args:
        vocab_size: V.
        dim: model width D.
        blocks: the layers, in order.
        norm_eps: of the final norm.
        tie_embeddings: use the embedding as the head's weight.
        checkpoint_activations: recompute each block in backward instead of keeping its activations.
        padding_token: id whose embedding gets no gradient; None for none.
    """

    config: DecoderConfig | None = None
    """What `build_decoder` built this from; None for a decoder put together by hand."""
    foreign_files: dict[str, str]
    """Text files that came with imported weights, by name (config.json, tokenizer.json, ...): what `config` does not
    say, such as token ids, is kept for writing the weights back."""

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        blocks: list[Block],
        norm_eps: float = 1e-5,
        tie_embeddings: bool = False,
        checkpoint_activations: bool = False,
        padding_token: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.checkpoint_activations = checkpoint_activations
        self.foreign_files = {}
        self.embedding = nn.Embedding(vocab_size, dim, padding_idx=padding_token, device=device, dtype=dtype)
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(dim, eps=norm_eps, device=device, dtype=dtype)
        self.head = nn.Linear(dim, vocab_size, bias=False, device=device, dtype=dtype)
        if tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(
        self, tokens: Tensor, cache: list[Any] | None = None, attention_mask: Tensor | None = None
    ) -> DecoderOutput:
        """tokens (B, L) int64 -> logits (B, L, V); with a cache, tokens continue what the cache has seen.

        Args:
            attention_mask: (B, S) over all S tokens so far, those in the cache and the new ones; 0 or False for
                padding, which no token attends to (see `Attention.forward`). Padding is routed as any token.
        """
        hidden, routing = self.hidden_states(tokens, cache, attention_mask)
        return DecoderOutput(self.head(hidden), routing)

    def hidden_states(
        self, tokens: Tensor, cache: list[Any] | None = None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Routing]]:
        """What the head sees, (B, L, D), for losses that never build the (B, L, V) logits."""
        if attention_mask is not None:
            attention_mask = attention_mask.bool()
            if cache is None and attention_mask.shape == tokens.shape and bool(attention_mask.all()):
                attention_mask = None  # nothing to hide: the faster path
        x = self.embedding(tokens)
        routing: dict[str, Routing] = {}
        for i, block in enumerate(self.layers):
            if self.checkpoint_activations and self.training and cache is None:
                x, decided = checkpoint(block, x, None, attention_mask, use_reentrant=False)
            else:
                x, decided = block(x, None if cache is None else cache[i], attention_mask)
            if decided is not None:
                routing[f"layers.{i}.ffn"] = decided
        return self.norm(x), routing

    def make_cache(self) -> list[Any] | None:
        """One cache per layer; None if a mixer (a user's own) has no `make_cache`."""
        makers = [getattr(block.mixer, "make_cache", None) for block in self.layers]
        return None if None in makers else [make_cache() for make_cache in makers if make_cache]


def build_decoder(
    config: DecoderConfig,
    *,
    checkpoint_activations: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Decoder:
    """The decoder that `config` describes, initialised unless it is on the meta device.

    Raises:
        InputError: an own part that cannot be imported or does not accept its arguments.
    """
    blocks = []
    for i, layer in enumerate(config.layers):
        mixer = _build_mixer(config, layer, i, device, dtype)
        ffn = _build_ffn(config, layer, i, device, dtype)
        norms = [RMSNorm(config.dim, eps=config.norm_eps, device=device, dtype=dtype) for _ in range(2)]
        blocks.append(Block(mixer=mixer, ffn=ffn, mixer_norm=norms[0], ffn_norm=norms[1]))
    decoder = Decoder(
        vocab_size=config.vocab_size,
        dim=config.dim,
        blocks=blocks,
        norm_eps=config.norm_eps,
        tie_embeddings=config.tie_embeddings,
        checkpoint_activations=checkpoint_activations,
        padding_token=config.padding_token,
        device=device,
        dtype=dtype,
    )
    decoder.config = config
    initialize(decoder, config.init_std)
    return decoder


@torch.no_grad()
def initialize(decoder: Decoder, std: float | None) -> None:
    """Draw every weight of our layers from N(0, std), or N(0, 1/fan_in) where std is None; biases 0, gains 1.

    One std for all is what Llama 4 in transformers does (0.02); embedding rows have a fan-in of one, so they take
    std 1/sqrt(D) instead. Own parts keep the initialisation they gave themselves.
    """
    if decoder.embedding.weight.is_meta:
        return
    nn.init.normal_(decoder.embedding.weight, std=std or decoder.embedding.embedding_dim**-0.5)
    if decoder.head.weight is not decoder.embedding.weight:
        nn.init.normal_(decoder.head.weight, std=std or decoder.head.in_features**-0.5)
    for block in decoder.layers:
        assert isinstance(block, Block)
        for part in (block.mixer, block.ffn):
            if type(part).__module__.startswith("moesaic."):
                _initialize_part(part, std)


def _initialize_part(module: nn.Module, std: float | None) -> None:
    if not type(module).__module__.startswith(("moesaic.", "torch.")):
        return  # an own part, also one inside ours (a router)
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=std or module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, TopKRouter):
        nn.init.normal_(module.weight, std=std or module.dim**-0.5)
    elif isinstance(module, Experts):
        nn.init.normal_(module.gate_up_proj, std=std or module.dim**-0.5)
        nn.init.normal_(module.down_proj, std=std or module.hidden_dim**-0.5)
    for child in module.children():
        _initialize_part(child, std)


def _build_mixer(
    config: DecoderConfig, layer: LayerConfig, i: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Module:
    mixer = layer.mixer
    if isinstance(mixer, dict):
        return _own_part(mixer, f"layer {i} mixer", device, dtype, dim=config.dim)
    attention = config.attention
    positions = mixer in ("rope", "full_rope")
    return Attention(
        config.dim,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=config.head_dim,
        rotary=RotaryEmbedding(config.head_dim, theta=attention.rope_theta, scaling=attention.rope_scaling)
        if positions
        else None,
        qk_norm=attention.qk_norm and positions,
        norm_eps=config.norm_eps,
        attention_chunk_size=config.chunk_of(mixer),
        temperature=None if positions else attention.temperature,
        bias=attention.bias,
        conv_width=attention.conv_width,
        device=device,
        dtype=dtype,
    )


def _build_ffn(
    config: DecoderConfig, layer: LayerConfig, i: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Module:
    ffn = layer.ffn
    if isinstance(ffn, dict):
        return _own_part(ffn, f"layer {i} ffn", device, dtype, dim=config.dim)
    if ffn != "moe":
        width = config.ffn_width(ffn)
        return FeedForward(config.dim, width, activation=config.activation, device=device, dtype=dtype)
    moe = config.moe
    assert moe is not None  # checked at construction
    layer_moe = MoE.build(
        config.dim,
        moe.hidden_dim,
        moe.num_experts,
        top_k=moe.top_k,
        shared_hidden_dim=moe.shared_width,
        score_function=moe.score_function,
        normalize_scores=moe.normalize_scores,
        score_before_experts=moe.score_before_experts,
        expert_bias=moe.expert_bias,
        activation=config.activation,
        backend=moe.backend,
        device=device,
        dtype=dtype,
    )
    if isinstance(moe.router, dict):
        sizes = {"dim": config.dim, "num_experts": moe.num_experts, "top_k": moe.top_k}
        layer_moe.router = _own_part(moe.router, f"layer {i} router", device, dtype, **sizes)
    elif moe.router == "uniform":
        layer_moe.router = UniformRouter(
            config.dim,
            moe.num_experts,
            top_k=moe.top_k,
            score_function=moe.score_function,
            normalize_scores=moe.normalize_scores,
            device=device,
            dtype=dtype,
        )
    return layer_moe


def _own_part(
    part: OwnPart, where: str, device: torch.device | str | None, dtype: torch.dtype | None, **sizes: int
) -> nn.Module:
    """Import and construct a user's module; it is moved to device and dtype, so it needs no such arguments."""
    path = part["type"]
    module_name, _, class_name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"{where}: type={path!r} cannot be imported ({error}); allowed: the dotted path of a class that Python can "
            "import from here"
        ) from error
    arguments = {key: value for key, value in part.items() if key != "type"}
    try:
        module = cls(**sizes, **arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {path}({', '.join({**sizes, **arguments})}) failed: {error}") from error
    if not isinstance(module, nn.Module):
        raise InputError(f"{where}: {path} made a {type(module).__name__}; allowed: a torch.nn.Module")
    return module.to(device=device, dtype=dtype)
