"""The decoder: embedding, blocks of (token mixer, channel mixer), final norm, head."""

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moesaic.errors import InputError
from moesaic.layers import (
    Attention,
    ClampedExperts,
    Dispatcher,
    Experts,
    FeedForward,
    FreeExperts,
    MoE,
    MultiHeadLatentAttention,
    NormedExperts,
    ParameterKind,
    Parametrization,
    RMSNorm,
    RotaryEmbedding,
    RoutedLayer,
    Routing,
    ScaledLogits,
    Transfer,
    WindowedAttention,
    count_tokens,
    parameter_fans,
)
from moesaic.layers.checks import (
    has_values,
    require_dtype,
    require_flags,
    require_floating,
    require_sizes,
    require_tensor,
)
from moesaic.layers.part import initialize as initialize_part
from moesaic.models.config import WITH_ROPE, DecoderConfig, LayerConfig, MoEConfig
from moesaic.models.custom import build_custom, construct
from moesaic.models.routers import build_router

__all__ = [
    "FOREIGN_FILES",
    "Block",
    "Decoder",
    "DecoderOutput",
    "build_block",
    "build_decoder",
    "build_layer_router",
    "initialize",
]

FOREIGN_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Names that `Decoder.foreign_files` may have: whoever writes them back writes nothing else."""


class DecoderOutput(NamedTuple):
    logits: Tensor
    """(B, L, V)."""
    routing: dict[str, Routing]
    """What each MoE layer decided, by module name ("layers.1.ffn"), over the B * L flattened tokens."""


class Block(nn.Module):
    """x += mixer(norm(x)); x += ffn(norm(x)); with a `residual_scale`, both times that."""

    residual_scale = 1.0

    def __init__(self, *, mixer: nn.Module, ffn: nn.Module, mixer_norm: nn.Module, ffn_norm: nn.Module) -> None:
        super().__init__()
        self.mixer_norm = mixer_norm
        self.mixer = mixer
        self.ffn_norm = ffn_norm
        self.ffn = ffn
        self.is_routed = isinstance(ffn, RoutedLayer)  # once: a protocol check is slow
        self.takes_token_ids = bool(getattr(ffn, "takes_token_ids", False))
        self.takes_router_state = bool(getattr(ffn, "takes_router_state", False))

    def forward(
        self,
        x: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        token_ids: Tensor | None = None,
        router_state: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """x (B, L, D) -> (B, L, D), and the routing if the channel mixer is a MoE.

        The token_ids (B, L), and the router_state (B * L, S) of the MoE layer before, are for a MoE whose router asks
        for them. What stands in padding reaches no real token and
        no gradient, whatever it is.
        """
        if attention_mask is not None:  # finite: a gradient of 0 times inf or nan would be nan
            is_padding = ~attention_mask[:, attention_mask.size(1) - x.size(1) :, None]
            x = x.masked_fill(is_padding, 1)  # no norm divides by it
        y = self.mixer_norm(x)
        if attention_mask is not None:
            y = self.mixer(y, cache, attention_mask).masked_fill(is_padding, 0)
        elif cache is not None:
            y = self.mixer(y, cache)
        else:
            y = self.mixer(y)
        x = x + self._scaled(y)
        y = self.ffn_norm(x)
        if self.is_routed:
            asked = {"token_ids": token_ids} if self.takes_token_ids else {}
            if self.takes_router_state:
                asked["router_state"] = router_state
            y, routing = cast(RoutedLayer, self.ffn).forward_with_routing(y, **asked)
            return x + self._scaled(y), routing
        return x + self._scaled(self.ffn(y)), None

    def _scaled(self, y: Tensor) -> Tensor:
        return y if self.residual_scale == 1 else y * self.residual_scale


class Decoder(nn.Module):
    """A decoder-only transformer over given blocks; `build_decoder` makes one from a config.

    Args:
        vocab_size: V.
        dim: model width D.
        blocks: the layers, in order.
        norm_eps: of the final norm.
        tie_embeddings: use the embedding as the head's weight. They stay one parameter after loading, `to_empty` and
            the like. A state dict may hold both or one of them; two that differ are refused.
        checkpoint_activations: recompute each block in backward instead of keeping its activations.
        padding_token: id whose embedding gets no gradient; None for none.
    """

    config: DecoderConfig | None = None
    """What `build_decoder` built this from; None for a decoder put together by hand."""
    parametrization = Parametrization()
    """The rule by which the weights were drawn; optimizers scale learning rates by it."""
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
        require_sizes(vocab_size=vocab_size, dim=dim)
        require_flags(tie_embeddings=tie_embeddings, checkpoint_activations=checkpoint_activations)
        require_dtype(dtype)
        if padding_token is not None:
            require_sizes(0, padding_token=padding_token)
        self.vocab_size = vocab_size
        self.checkpoint_activations = checkpoint_activations
        self.foreign_files = {}
        self.embedding = nn.Embedding(vocab_size, dim, padding_idx=padding_token, device=device, dtype=dtype)
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(dim, eps=norm_eps, device=device, dtype=dtype)
        self.head = nn.Linear(dim, vocab_size, bias=False, device=device, dtype=dtype)
        self.tie_embeddings = tie_embeddings
        self.register_load_state_dict_post_hook(_tie)
        _tie(self)

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    def parameter_kinds(self) -> dict[str, ParameterKind]:
        return {"head.weight": "output"}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Decoder":
        super()._apply(fn, recurse)
        _tie(self)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        both = [f"{prefix}{name}.weight" for name in ("embedding", "head")]
        found = [state_dict[name] for name in both if name in state_dict]
        if self.tie_embeddings and found:
            if not found[0].is_meta and not torch.equal(found[0], found[-1]):
                raise InputError(
                    f"{both[0]} and {both[1]} differ: a decoder with tie_embeddings needs them to be equal"
                )
            state_dict |= dict.fromkeys(both, found[0])  # of a copy, which torch has made
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def forward(
        self, tokens: Tensor, cache: list[Any] | None = None, attention_mask: Tensor | None = None
    ) -> DecoderOutput:
        """tokens (B, L) int64 -> logits (B, L, V); with a cache, tokens continue what the cache has seen.

        Args:
            attention_mask: (B, S) over all S tokens so far, those in the cache and the new ones; 0 or False for
                padding, which changes nothing at real tokens (see `Attention.forward`).

        Padding runs through every layer and is routed as any token. The `tokens_per_expert` of the routing leave it
        out; a loss of `moesaic.losses` leaves it out with `valid=attention_mask.flatten()`.
        """
        hidden, routing = self.hidden_states(tokens, cache, attention_mask)
        return DecoderOutput(self.head(hidden), routing)

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (B, L) int64 -> (B, L, D), what `hidden_states` takes as `embeddings`.

        Raises:
            TypeError: no tensor.
            ValueError: another shape or dtype, or on a CPU an id outside the vocabulary.
        """
        if not isinstance(tokens, Tensor):
            raise TypeError(f"tokens of type {type(tokens).__name__}: must be a tensor (batch, tokens) of torch.int64")
        if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"tokens of shape {tuple(tokens.shape)} and {tokens.dtype}: must be (batch, tokens) of torch.int64"
            )
        if tokens.numel() and has_values(tokens):
            low, high = (int(each) for each in tokens.aminmax())
            if low < 0 or high >= self.vocab_size:
                wrong = low if low < 0 else high
                raise ValueError(f"token id {wrong}: the vocabulary has ids 0 to {self.vocab_size - 1}")
        return self.embedding(tokens)

    def hidden_states(
        self,
        tokens: Tensor | None = None,
        cache: list[Any] | None = None,
        attention_mask: Tensor | None = None,
        *,
        embeddings: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Routing]]:
        """What the head sees, (B, L, D), for losses that never build the (B, L, V) logits.

        Args:
            tokens: (B, L) int64.
            embeddings: (B, L, D) in place of tokens, for inputs that are not all text.

        Raises:
            TypeError: what is given is no tensor of the right kind.
            ValueError: both of them, or neither; tokens that `embed` refuses; another shape; tied weights that came
                apart; embeddings where a router asks for token ids.
            InputError: padding, where a custom mixer cannot hide it.
        """
        if (tokens is None) == (embeddings is None):
            raise ValueError("hidden_states: give either tokens or embeddings")
        self._require_tied()
        if tokens is not None:
            x = self.embed(tokens)
        else:
            require_floating("hidden_states", embeddings=embeddings)
            require_tensor("hidden_states", "embeddings", embeddings, (None, None, self.embedding.embedding_dim))
            x = cast(Tensor, embeddings)
            self._require_no_token_ids()
        if cache is not None and len(cache) != len(self.layers):
            raise ValueError(f"cache of {len(cache)} entries: must be one for each of the {len(self.layers)} layers")
        if attention_mask is not None:
            attention_mask = _as_mask(attention_mask, x, cache is not None)
            if cache is None and attention_mask.shape == x.shape[:2] and bool(attention_mask.all()):
                attention_mask = None  # nothing to hide: the faster path
        is_real = None
        if attention_mask is not None:
            self._require_padding_support()
            is_real = attention_mask[:, attention_mask.size(1) - x.size(1) :].flatten()
        routing: dict[str, Routing] = {}
        state: Tensor | None = None
        for i, block in enumerate(self.layers):
            asked = (
                tokens if getattr(block, "takes_token_ids", False) else None,
                state if getattr(block, "takes_router_state", False) else None,
            )
            if self.checkpoint_activations and self.training and cache is None:
                x, decided = checkpoint(block, x, None, attention_mask, *asked, use_reentrant=False)
            else:
                x, decided = block(x, None if cache is None else cache[i], attention_mask, *asked)
            if decided is not None:
                state = decided.state
                routing[f"layers.{i}.ffn"] = decided if is_real is None else _count_real(decided, is_real)
        return self.norm(x), routing

    def _require_tied(self) -> None:
        """Raise ValueError if something has given one of the two tied modules a weight of its own."""
        if self.tie_embeddings and self.head.weight is not self.embedding.weight:
            raise ValueError(
                "embedding.weight and head.weight are no longer one parameter, but tie_embeddings=True: something "
                "replaced one of them alone, such as load_state_dict(assign=True) or to_empty; call that on the "
                "decoder, or set decoder.head.weight = decoder.embedding.weight afterwards"
            )

    def _require_no_token_ids(self) -> None:
        for i, block in enumerate(self.layers):
            if getattr(block, "takes_token_ids", False):
                raise ValueError(
                    f"hidden_states: embeddings: the router of layer {i} asks for token ids; must be tokens instead"
                )

    def _require_padding_support(self) -> None:
        for i, block in enumerate(self.layers):
            assert isinstance(block, Block)
            if not _takes(block.mixer, 3):
                raise InputError(
                    f"attention_mask: the mixer of layer {i}, {type(block.mixer).__name__}, has no support for "
                    "padding; its forward must take (x, cache=None, attention_mask=None)"
                )
            if not getattr(block.ffn, "causal", True):
                raise InputError(
                    f"attention_mask: the feed-forward layer {i}, {type(block.ffn).__name__}, mixes tokens and would "
                    "mix padding with them; must be sequences of one length"
                )

    def make_cache(self) -> list[Any] | None:
        """One cache per layer; None if a mixer (a user's own) has no `make_cache`, or an FFN sees several tokens."""
        if not all(getattr(block.ffn, "causal", True) for block in self.layers):
            return None
        makers = [getattr(block.mixer, "make_cache", None) for block in self.layers]
        return None if None in makers else [make_cache() for make_cache in makers if make_cache]


def _as_mask(mask: Any, x: Tensor, has_cache: bool) -> Tensor:
    """The attention mask of x (B, L, D) as bool.

    Raises:
        TypeError: no tensor.
        ValueError: another shape, or on a CPU other numbers than 1 and 0, as in masks that are added to the weights.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask of type {type(mask).__name__}: must be a tensor (batch, tokens)")
    batch, new = x.shape[:2]
    fits = mask.dim() == 2 and mask.size(0) == batch and (mask.size(1) >= new if has_cache else mask.size(1) == new)
    if not fits:
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)}: must be ({batch}, {new} new tokens"
            f"{' and those in the cache' if has_cache else ''})"
        )
    if mask.dtype != torch.bool and has_values(mask) and (wrong := mask[(mask != 0) & (mask != 1)]).numel():
        raise ValueError(f"attention_mask has {wrong[0].item():g}: must be 1 for tokens and 0 for padding")
    return mask.bool()


def _tie(decoder: Decoder, *_: Any) -> None:
    """Make the weight of a tied head the embedding again: torch may have made a parameter of its own for each."""
    if decoder.tie_embeddings and decoder.head.weight is not decoder.embedding.weight:
        decoder.head.weight = decoder.embedding.weight


def build_decoder(
    config: DecoderConfig,
    *,
    checkpoint_activations: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Decoder:
    """The decoder that `config` describes, initialized unless it is on the meta device.

    Raises:
        InputError: a custom module that cannot be imported, refuses its arguments, or lacks what its place needs.
    """
    decoder = Decoder(
        vocab_size=config.vocab_size,
        dim=config.dim,
        blocks=[build_block(config, i, device=device, dtype=dtype) for i in range(config.num_layers)],
        norm_eps=config.norm_eps,
        tie_embeddings=config.tie_embeddings,
        checkpoint_activations=checkpoint_activations,
        padding_token=config.padding_token,
        device=device,
        dtype=dtype,
    )
    decoder.config = config
    initialize(decoder, _parametrization_of(config))
    return decoder


def build_block(
    config: DecoderConfig, i: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Block:
    """Layer i of the decoder that `config` describes, before `initialize`."""
    layer = config.layers[i]
    mixer = _build_mixer(config, layer, i, device, dtype)
    ffn = _build_ffn(config, layer, i, device, dtype)
    norms = [RMSNorm(config.dim, eps=config.norm_eps, device=device, dtype=dtype) for _ in range(2)]
    return Block(mixer=mixer, ffn=ffn, mixer_norm=norms[0], ffn_norm=norms[1])


def _parametrization_of(config: DecoderConfig) -> Parametrization:
    """The rule by which the weights of a model are drawn and stepped."""
    if config.parametrization == "standard":
        return Parametrization(config.init_std)
    if config.parametrization == "scaled_logits":
        return ScaledLogits(config.init_std, dim=config.dim)
    assert config.base is not None  # checked at construction
    return Transfer(
        config.init_std,
        dim=config.dim,
        num_layers=config.num_layers,
        base_dim=config.base.dim,
        base_num_layers=config.base.num_layers,
    )


@torch.no_grad()
def initialize(decoder: Decoder, parametrization: Parametrization) -> None:
    """Draw every weight of our layers by the rule; biases are 0 and gains 1.

    The standard rule has one std for all, as Llama 4 in transformers (0.02). Custom modules keep the initialization
    they gave themselves, unless they have an `initialize` of their own.
    """
    decoder.parametrization = parametrization
    for block in decoder.layers:
        assert isinstance(block, Block)
        block.residual_scale = parametrization.residual_scale
    if decoder.embedding.weight.is_meta:
        return
    dim = decoder.embedding.embedding_dim
    nn.init.normal_(decoder.embedding.weight, std=parametrization.std("embedding", dim))
    if decoder.head.weight is not decoder.embedding.weight:
        nn.init.normal_(decoder.head.weight, std=parametrization.std("output", dim))
    for block in decoder.layers:
        assert isinstance(block, Block)
        for part in (block.mixer, block.ffn):
            initialize_part(part, parametrization)
    if parametrization.needs_fans:
        for name, fans in parameter_fans(decoder).items():
            if (factor := parametrization.std_in_sum(fans)) != 1:
                decoder.get_parameter(name).mul_(factor)


def _build_mixer(
    config: DecoderConfig, layer: LayerConfig, i: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Module:
    mixer = layer.mixer
    if isinstance(mixer, dict):
        module = build_custom(mixer, f"layer {i} mixer", device, dtype, **_known(config, i))
        _require_mixer(module, config, f"layer {i} mixer: {mixer['type']}")
        return module
    attention = config.attention
    if mixer == "mla":
        return _build_mla(config, device, dtype)
    positions = mixer in WITH_ROPE
    arguments: dict[str, Any] = {
        "num_heads": attention.num_heads,
        "num_kv_heads": attention.num_kv_heads,
        "head_dim": config.head_dim,
        "rotary": RotaryEmbedding(config.head_dim, theta=attention.rope_theta, scaling=attention.rope_scaling)
        if positions
        else None,
        "qk_norm": attention.qk_norm if positions or isinstance(attention.qk_norm, str) else False,
        "clip_qkv": attention.clip_qkv,
        "norm_eps": config.norm_eps,
        "attention_chunk_size": config.chunk_of(mixer),
        "temperature": None if positions else attention.temperature,
        "bias": attention.bias,
        "conv_width": attention.conv_width,
        "device": device,
        "dtype": dtype,
    }
    window = config.window_of(mixer)
    if window is None and not attention.sinks:
        return Attention(config.dim, **arguments)
    return WindowedAttention(config.dim, window=window, sinks=attention.sinks, **arguments)


def _build_mla(
    config: DecoderConfig, device: torch.device | str | None, dtype: torch.dtype | None
) -> MultiHeadLatentAttention:
    attention, mla = config.attention, config.attention.mla
    assert mla is not None  # checked at construction
    widths = dataclasses.asdict(mla)
    scale, factor = widths.pop("mscale_all_dim"), attention.rope_scaling.factor if attention.rope_scaling else 1.0
    return MultiHeadLatentAttention(
        config.dim,
        num_heads=attention.num_heads,
        rotary=RotaryEmbedding(mla.qk_rope_head_dim, theta=attention.rope_theta, scaling=attention.rope_scaling),
        softmax_factor=(0.1 * scale * math.log(factor) + 1) ** 2,
        bias=attention.bias,
        **widths,
        device=device,
        dtype=dtype,
    )


def _build_ffn(
    config: DecoderConfig, layer: LayerConfig, i: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Module:
    ffn = layer.ffn
    if isinstance(ffn, dict):
        return build_custom(ffn, f"layer {i} ffn", device, dtype, **_known(config, i))
    if ffn != "moe":
        width = config.ffn_width(ffn)
        return FeedForward(config.dim, width, activation=config.activation, device=device, dtype=dtype)
    moe = config.moe
    assert moe is not None  # checked at construction
    return MoE.build(
        config.dim,
        moe.hidden_dim,
        moe.num_experts,
        latent_dim=moe.latent_dim,
        latent_norm_eps=config.norm_eps if moe.latent_norm else None,
        shared_hidden_dim=moe.shared_width,
        score_before_experts=moe.score_before_experts,
        activation=config.activation,
        backend=moe.backend,
        router=build_layer_router(config, moe, i, device, dtype),
        experts=_build_experts(config, moe, i, device, dtype),
        dispatcher=_build_dispatcher(config, moe, i),
        device=device,
        dtype=dtype,
    )


def build_layer_router(
    config: DecoderConfig,
    moe: MoEConfig,
    i: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The router of layer i, before `initialize`.

    Raises:
        InputError: a custom one that cannot be built, or whose forward asks for what no layer has.
    """
    if moe.built_in_router is not None:
        return build_router(config, moe, f"layer {i} router", device, dtype)
    assert isinstance(moe.router, dict)
    router = build_custom(moe.router, f"layer {i} router", device, dtype, **_known(config, i))
    _require_router(router, f"layer {i} router: {moe.router['type']}")
    if moe.expert_bias and not isinstance(getattr(router, "expert_bias", None), Tensor):
        raise InputError(
            f"layer {i} router: moe.expert_bias=true, but {moe.router['type']} has no buffer `expert_bias` (E,) "
            "that balancing could move; it must register one, or moe.expert_bias must be false"
        )
    return router


def _build_experts(
    config: DecoderConfig, moe: MoEConfig, i: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Module | None:
    num_free = moe.identity_experts + moe.skip_experts
    given: dict[str, Any] = {"hidden_dim": moe.hidden_dim, "activation": config.activation, "backend": moe.backend}
    experts: nn.Module | None = None
    if isinstance(moe.experts, dict):
        known = _known(config, i) | {"dim": moe.latent_dim or config.dim, "num_experts": moe.num_experts}
        experts = build_custom(moe.experts, f"layer {i} experts", device, dtype, **known, **given)
    elif moe.experts == "clamped_swiglu":
        experts = ClampedExperts(
            moe.num_experts,
            moe.latent_dim or config.dim,
            moe.hidden_dim,
            alpha=moe.swiglu_alpha,
            limit=moe.swiglu_limit,
            backend=moe.backend,
            device=device,
            dtype=dtype,
        )
    elif moe.experts == "normed_swiglu":
        given["norm_eps"] = moe.experts_norm_eps
        experts = NormedExperts(moe.num_experts, moe.latent_dim or config.dim, **given, device=device, dtype=dtype)
    elif num_free:
        experts = Experts(moe.num_experts, moe.latent_dim or config.dim, **given, device=device, dtype=dtype)
    if experts is None or not num_free:
        return experts
    return FreeExperts(experts, identity=moe.identity_experts, skip=moe.skip_experts)


def _build_dispatcher(config: DecoderConfig, moe: MoEConfig, i: int) -> Dispatcher | None:
    if not isinstance(moe.dispatcher, dict):
        return None
    where = f"layer {i} dispatcher"
    dispatcher: Dispatcher = construct(moe.dispatcher, where, **_known(config, i))
    if not all(callable(getattr(dispatcher, name, None)) for name in ("dispatch", "combine")):
        raise InputError(f"{where}: {moe.dispatcher['type']} must make an object with dispatch and combine")
    return dispatcher


def _known(config: DecoderConfig, i: int) -> dict[str, Any]:
    """What a custom module can ask for by name."""
    known: dict[str, Any] = {"dim": config.dim, "layer_index": i, "num_layers": config.num_layers}
    known["norm_eps"] = config.norm_eps
    if config.moe is not None:
        names = ("num_experts", "top_k", "score_function", "normalize_scores", "expert_bias")
        known |= {name: getattr(config.moe, name) for name in names}
        known["num_experts"] = config.moe.num_routed
    return known


def _require_mixer(mixer: nn.Module, config: DecoderConfig, where: str) -> None:
    """Raise InputError for a custom mixer that would fail in the middle of a batch.

    forward(x) alone is enough for a mixer without a cache, in a model without a padding token.
    """
    takes_padding = _takes(mixer, 3)
    is_plain = (
        _takes(mixer, 1) and not _takes(mixer, 2) and not hasattr(mixer, "make_cache") and config.padding_token is None
    )
    if not takes_padding and not is_plain:
        raise InputError(
            f"{where}: its forward{inspect.signature(mixer.forward)} has no support for padding; it must take (x, "
            "cache=None, attention_mask=None). (x) alone is enough without make_cache and without model.padding_token"
        )


def _require_router(router: nn.Module, where: str) -> None:
    """Raise InputError for a custom router whose forward cannot be called with the tokens and what it may ask for."""
    signature = inspect.signature(router.forward)
    try:
        signature.bind(None, **{name: None for name in ("token_ids", "router_state") if name in signature.parameters})
    except TypeError as error:
        raise InputError(
            f"{where}: its forward{signature}: {error}; must take the tokens (T, dim), and may ask for token_ids and "
            "router_state"
        ) from error


def _count_real(routing: Routing, is_real: Tensor) -> Routing:
    """`routing` with the counts of those tokens alone that `is_real` (T,) names."""
    return routing._replace(counts=count_tokens(routing.expert_ids, routing.logits.size(1), is_real))


def _takes(mixer: nn.Module, count: int) -> bool:
    """Whether `mixer` can be called with so many of x, cache, attention_mask."""
    try:
        inspect.signature(mixer.forward).bind(*range(count))
    except TypeError:
        return False
    return True
