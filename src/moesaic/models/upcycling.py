"""Upcycling: a dense model becomes a mixture of experts that computes the same function, to be trained on from there.

Each expert begins as a copy of a dense FFN (Komatsuzaki et al. 2022, arXiv 2212.05055), or of a shard of it. Experts
of shards stand in virtual groups with equal rows of the router, so that top-k takes whole FFNs (He et al. 2024, arXiv
2410.07524).
"""

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from moesaic.config import require_same, to_mapping
from moesaic.errors import InputError
from moesaic.layers import Experts, FeedForward, MoE, TopKRouter
from moesaic.layers.checks import require_numbers, require_sizes
from moesaic.models.config import DecoderConfig
from moesaic.models.decoder import Block, Decoder, build_decoder

__all__ = ["upcycle", "upcycled_weights"]

TINY = 2.0**-64
"""Factor on the rows of a router whose scores must be constant.

Logits of this size still rank as any others do, and all scores of them are the same floating-point number."""

OF_FFNS = ("moe", "pattern", "interleave_moe_layer_step", "nope_layer_interval", "dense_twin", "hidden_dim")
"""Keys that may differ between the two models: they say which layer has which mixer and FFN, which is compared."""


def upcycle(dense: Decoder, config: DecoderConfig, *, noise: float = 0.0, seed: int = 0) -> Decoder:
    """Make the model of `config`, whose MoE layers come from dense FFNs. Its function is that of `dense`.

    A dense FFN of width W becomes a shared expert of its first columns, if there is one, and G = (W - shared) /
    moe.hidden_dim shards, each copied num_experts / G times. Expert e has shard e % G and is of group e // G.

    Scales correct for the scores. Normalized scores behind the experts sum to a constant, so a factor on the down
    projections is enough. All others must be constant themselves, so the router begins with rows of a size near zero.
    What the scores then are is divided out, before or behind the experts.

    Args:
        dense: a decoder that was built from a config; it is left as it is.
        config: the same model but for its FFNs.
        noise: standard deviation of what is added to each copy, in units of that of its weights. It changes the
            function.
        seed: of the router's rows and the noise.

    Raises:
        InputError: the models differ beyond their FFNs, or the sizes do not fit; it names the key.
    """
    if dense.config is None:
        raise InputError("this decoder has no config: only decoders of build_decoder can be upcycled")
    require_sizes(0, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = build_decoder(config, dtype=dense.dtype)
    generator = torch.Generator().manual_seed(seed)
    weights = {name: weight.cpu() for name, weight in dense.state_dict().items()}
    decoder.load_state_dict(upcycled_weights(weights, dense.config, decoder, noise, generator))
    return decoder.to(dense.device)


@torch.no_grad()
def upcycled_weights(
    weights: Mapping[str, Tensor], dense: DecoderConfig, decoder: Decoder, noise: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """The state dict for a new `decoder` that makes it compute what these weights of a `dense` model compute.

    Args:
        decoder: as it was drawn; its routers are the ones that the state dict has, but for the groups.
        noise: see `upcycle`.
        generator: of the noise.

    Raises:
        InputError: see `upcycle`.
    """
    require_numbers(noise=noise)
    assert decoder.config is not None  # built from a config
    _require_same_rest(dense, decoder.config)
    made, drawn = dict(weights), decoder.state_dict()
    for i, block in enumerate(decoder.layers):
        assert isinstance(block, Block)
        if decoder.config.layers[i].ffn == "moe":
            assert isinstance(block.ffn, MoE)
            prefix = f"layers.{i}.ffn."
            of_dense = {name: made.pop(name) for name in weights if name.startswith(prefix)}
            ffn = tuple(of_dense[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))
            made |= {name: drawn[name] for name in drawn if name.startswith(f"{prefix}router.")}
            made |= {f"{prefix}{name}": tensor for name, tensor in _cut(ffn, block.ffn, i, noise, generator).items()}
    return made


def _require_same_rest(dense: DecoderConfig, config: DecoderConfig) -> None:
    """Refuse models that differ in more than their FFNs, and layers that are not dense in the one to begin from."""
    if all(layer.ffn != "moe" for layer in config.layers):
        raise InputError("model: no layer of it is MoE; must have some where the other one is dense")
    there, here = ({"model": _without_ffns(each)} for each in (dense, config))
    require_same("a dense model of another shape", there, here, ("model.init_std", "model.format"))
    for i, (before, after) in enumerate(zip(dense.layers, config.layers, strict=True)):
        mixers = ({f"layers.{i}.mixer": each.mixer} for each in (before, after))
        require_same("a dense model of another shape", *mixers)
        found, wanted = (_describe_ffn(each, i) for each in (dense, config))
        if after.ffn == "moe" and before.ffn not in ("dense", "dense_twin"):
            raise InputError(f"layers.{i}.ffn: {found} there, MoE now; must be dense there, to be cut into experts")
        if after.ffn != "moe" and found != wanted:
            raise InputError(f"layers.{i}.ffn: {found} there, {wanted} now; must be equal where no MoE is made")


def _without_ffns(config: DecoderConfig) -> dict[str, object]:
    return {key: value for key, value in to_mapping(config).items() if key not in OF_FFNS}


def _describe_ffn(config: DecoderConfig, i: int) -> str:
    ffn = config.layers[i].ffn
    if isinstance(ffn, dict):
        return str(ffn)
    return "MoE" if ffn == "moe" else f"dense of width {config.ffn_width(ffn)}"


def _cut(ffn: tuple[Tensor, ...], moe: MoE, i: int, noise: float, generator: torch.Generator) -> dict[str, Tensor]:
    """The weights of the MoE layer i, and of its router those that groups share, from a dense FFN.

    Args:
        ffn: gate (W, D), up (W, D) and down (D, W).
    """
    gate, up, down = ffn
    shared = moe.shared_expert.down_proj.in_features if isinstance(moe.shared_expert, FeedForward) else 0
    experts, router = moe.experts, moe.router
    if type(experts) is not Experts or moe.latent is not None:
        kind = type(experts).__name__ if moe.latent is None else "experts of a latent width"
        raise InputError(f"model.moe: layer {i} has {kind}; must have swiglu experts alone, to be cut from a dense FFN")
    if getattr(router, "may_skip", True) or not hasattr(router, "score_function"):
        raise InputError(f"model.moe.router: {type(router).__name__} may leave out experts; must be top_k")
    router = cast(TopKRouter, router)
    shards = _num_shards(gate.size(0), shared, experts, router, i)
    groups = router.top_k // shards
    # scores of one group are equal, so normalized ones of a single group are constant anyhow
    near_zero = not router.normalize_scores or (moe.score_before_experts and groups > 1)
    _require_router(router, shards, near_zero, down.dtype)
    score = _mean_score(router)
    before, behind = (1 / score, 1 / groups) if moe.score_before_experts else (1.0, 1 / (groups * score))
    sizes = shards, experts.hidden_dim
    gate_up = torch.cat([part[shared:].unflatten(0, sizes).transpose(1, 2) for part in (gate, up)], dim=-1)
    stacks = {
        "experts.gate_up_proj": gate_up * before,
        "experts.down_proj": down[:, shared:].unflatten(1, sizes).permute(1, 2, 0) * behind,
    }
    made = {name: stack.repeat(experts.num_experts // shards, 1, 1) for name, stack in stacks.items()}
    if noise:
        made = {name: _with_noise(copies, noise, generator) for name, copies in made.items()}
    if shared:
        of_shared = {"gate": gate[:shared], "up": up[:shared], "down": down[:, :shared]}
        made |= {f"shared_expert.{name}_proj.weight": part.clone() for name, part in of_shared.items()}
    if type(router) is TopKRouter:
        made["router.weight"] = router.weight[::shards].repeat_interleave(shards, dim=0) * (TINY if near_zero else 1)
    return made


def _with_noise(copies: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    return copies + noise * copies.std() * torch.randn(copies.shape, generator=generator, dtype=copies.dtype)


def _num_shards(width: int, shared: int, experts: Experts, router: TopKRouter, i: int) -> int:
    """G, the number of experts that make up the dense FFN of this width less the shared expert."""
    rest = width - shared
    of = f"the width {width} of the dense FFN of layer {i}" + (f" less {shared} of the shared expert" if shared else "")
    if rest <= 0:
        raise InputError(
            f"model.moe.shared_hidden_dim={shared}: must be less than {width}, the width of the dense FFN of layer {i}"
        )
    if rest % experts.hidden_dim:
        raise InputError(f"model.moe.hidden_dim={experts.hidden_dim}: must divide {rest}, {of}")
    shards = rest // experts.hidden_dim
    for name, number in (("num_experts", experts.num_experts), ("top_k", router.top_k)):
        if number % shards:
            raise InputError(
                f"model.moe.{name}={number}: must be a multiple of {shards}, as so many experts of "
                f"hidden_dim={experts.hidden_dim} make up {of}"
            )
    return shards


def _require_router(router: TopKRouter, shards: int, near_zero: bool, dtype: torch.dtype) -> None:
    """Refuse a router whose choice or scores would change the function; `near_zero`: its rows begin near zero."""
    if type(router) is not TopKRouter and (shards > 1 or near_zero):
        raise InputError(
            f"model.moe.router: {type(router).__name__} chooses otherwise than by rows alone; must be top_k, unless "
            "every expert is a whole FFN and has a normalized score behind it"
        )
    if near_zero and router.expert_bias is not None:
        raise InputError(
            "model.moe.expert_bias=True: must be false, as it would choose by scores that all begin equal; or "
            "model.moe.normalize_scores=true with model.moe.score_before_experts=false"
        )
    if near_zero and torch.finfo(dtype).tiny > TINY:
        raise InputError(f"dtype={dtype}: must have the range of float32, as the router begins near zero")


def _mean_score(router: TopKRouter) -> float:
    """The mean of a token's scores, which is the same for all tokens."""
    of_zero = {"sigmoid": 0.5, "softmax": 1 / router.num_experts, "sqrt_softplus": math.sqrt(math.log(2))}
    return router.scale * (1 / router.top_k if router.normalize_scores else of_zero[router.score_function])
