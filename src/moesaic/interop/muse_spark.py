"""Muse Spark's mixture-of-experts block, theirs to ours and back: the whole model waits for parts of its attention."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.models.muse_spark.configuration_muse_spark import MuseSparkTextConfig
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkMoE

from moesaic.errors import InputError
from moesaic.interop.fields import ACTIVATION_OF, activation_name
from moesaic.layers import BackendName, MoE, NormedExperts, TopKRouter
from moesaic.layers.latent import Latent
from moesaic.models import AttentionConfig, DecoderConfig, LayerConfig, MoEConfig
from moesaic.models.decoder import build_block

__all__ = ["block_from_hf", "block_gradients_to_hf", "block_to_hf", "moe_config_from_hf"]

NAMES = {
    "router.weight": "gate.weight",
    "router.expert_bias": "gate.e_score_correction_bias",
    "latent.down_proj.weight": "pre_expert_proj.weight",
    "latent.norm.weight": "pre_expert_norm.weight",
    "latent.up_proj.weight": "post_expert_proj.weight",
    "experts.experts.gate_up_proj": "experts.gate_up_proj",
    "experts.experts.down_proj": "experts.down_proj",
    "experts.norm_weight": "experts.post_expert_norm.weight",
}
"""Our tensors -> theirs. Stacked matrices are (in, out) here and (out, in) there; nothing else differs."""


def moe_config_from_hf(fields: Mapping[str, Any]) -> MoEConfig:
    """`model.moe` of a Muse Spark from the fields of its text config; a missing one has transformers' default.

    The `norm_eps` of the model, their `rms_norm_eps`, is that of the latent width's norm.

    Raises:
        InputError: an activation that we do not have, or a value that no MoE layer can have.
    """
    theirs = MuseSparkTextConfig(**{key: value for key, value in fields.items() if key in READ})
    if theirs.hidden_act not in ACTIVATION_OF:
        raise InputError(f"hidden_act={theirs.hidden_act!r}: must be one of {', '.join(ACTIVATION_OF)}")
    router = {"type": "top_k", "logit_scale": theirs.output_multiplier}
    if theirs.routed_scaling_factor != 1:
        router["scale"] = theirs.routed_scaling_factor
    try:
        return MoEConfig(
            num_experts=theirs.num_local_experts,
            hidden_dim=theirs.moe_intermediate_size,
            top_k=theirs.num_experts_per_tok,
            shared_hidden_dim=0,
            router=router,
            normalize_scores=True,
            score_before_experts=False,
            expert_bias=True,
            experts="normed_swiglu",
            experts_norm_eps=theirs.post_norm_eps,
            latent_dim=theirs.moe_hidden_size,
            latent_norm=True,
        )
    except ValueError as error:
        raise InputError(f"{theirs.model_type}: {error}") from error


READ = (
    "num_local_experts", "moe_intermediate_size", "num_experts_per_tok", "output_multiplier", "routed_scaling_factor",
    "post_norm_eps", "moe_hidden_size", "hidden_act",
)  # fmt: skip
"""Fields that `moe_config_from_hf` reads."""


def block_from_hf(block: nn.Module, *, backend: BackendName = "auto") -> MoE:
    """Our `MoE` with the weights of a `MuseSparkMoE`, built from `moe_config_from_hf`; nothing is shared with theirs.

    Tensors are copied in their own dtypes, so the way back is bit-equal.

    Args:
        backend: of the experts, see `moesaic.layers.BACKENDS`.

    Raises:
        InputError: another block, weights on the meta device, or a value that our layer cannot have.
    """
    if not isinstance(block, MuseSparkMoE):
        raise InputError(f"{type(block).__name__}: must be a MuseSparkMoE, the block of transformers' muse_spark")
    fields = block.config.to_dict()
    moe = moe_config_from_hf(fields)
    config = DecoderConfig(
        vocab_size=1,
        dim=block.config.hidden_size,
        num_layers=1,
        attention=AttentionConfig(num_heads=1, qk_norm=False),
        hidden_dim=1,
        moe=moe,
        pattern=(LayerConfig("nope", "moe"),),
        activation=ACTIVATION_OF[fields["hidden_act"]],
        norm_eps=block.config.rms_norm_eps,
    )
    ours = build_block(config, 0, device="meta").ffn
    assert isinstance(ours, MoE) and isinstance(ours.experts, NormedExperts)
    ours.experts.experts.backend = backend
    theirs = block.state_dict()
    return _filled(ours, {name: theirs[NAMES[name]] for name in ours.state_dict()}).train(block.training)


def block_to_hf(moe: MoE) -> MuseSparkMoE:
    """A `MuseSparkMoE` with the weights of our layer, the inverse of `block_from_hf`; nothing is shared with ours.

    Its experts run by their reference, `_experts_implementation="eager"`.

    Raises:
        InputError: a layer that computes something else; every difference is named.
    """
    if differing := _differences(moe):
        listed = "; ".join(f"{key}: found {found}, must be {allowed}" for key, (found, allowed) in differing.items())
        raise InputError(f"this layer is not a Muse Spark's: {listed}")
    router: Any = moe.router
    experts: Any = moe.experts
    latent: Any = moe.latent
    config = MuseSparkTextConfig(
        hidden_size=router.dim,
        num_attention_heads=1,
        num_key_value_heads=1,
        moe_hidden_size=experts.dim,
        moe_intermediate_size=experts.experts.hidden_dim,
        num_local_experts=experts.num_experts,
        num_experts_per_tok=router.top_k,
        output_multiplier=float(router.logit_scale),
        routed_scaling_factor=float(router.scale),
        rms_norm_eps=latent.norm.eps,
        post_norm_eps=experts.norm_eps,
        hidden_act=activation_name(experts.experts.activation, None),
    )
    config._experts_implementation = "eager"
    with torch.device("meta"):
        theirs = MuseSparkMoE(config)
    return _filled(theirs, {NAMES[name]: tensor for name, tensor in moe.state_dict().items()}).train(moe.training)


def block_gradients_to_hf(moe: MoE) -> dict[str, Tensor | None]:
    """Copies of the gradients of a layer of `block_from_hf`, by their names and in their layouts; None where none is.

    Raises:
        InputError: a layer that computes something else.
    """
    if differing := _differences(moe):
        raise InputError(f"this layer is not a Muse Spark's: {', '.join(differing)}")
    gradients = {NAMES[name]: parameter.grad for name, parameter in moe.named_parameters()}
    return {name: None if gradient is None else _turned(gradient).clone() for name, gradient in gradients.items()}


def _differences(moe: MoE) -> dict[str, tuple[Any, Any]]:
    """What a layer has and Muse Spark's has not: key of `model.moe` -> (what was found, what it must be)."""
    parts = {
        "router": (moe.router, TopKRouter),
        "experts": (moe.experts, NormedExperts),
        "latent_dim": (moe.latent, Latent),
    }
    found: dict[str, tuple[Any, Any]] = {
        key: (type(part).__name__, allowed.__name__)
        for key, (part, allowed) in parts.items()
        if type(part) is not allowed
    }
    if moe.shared_expert is not None:
        found["shared_hidden_dim"] = (type(moe.shared_expert).__name__, 0)
    if moe.score_before_experts:
        found["score_before_experts"] = (True, False)
    if isinstance(moe.latent, Latent) and moe.latent.norm is None:
        found["latent_norm"] = (False, True)
    if isinstance(router := moe.router, TopKRouter):
        values = {"score_function": "sigmoid", "normalize_scores": True}
        found |= {key: (getattr(router, key), x) for key, x in values.items() if getattr(router, key) != x}
        if router.expert_bias is None:
            found["expert_bias"] = (False, True)
        if router.bias is not None:
            found["router.bias"] = (True, False)
    return found


Filled = TypeVar("Filled", bound=nn.Module)


def _filled(module: Filled, tensors: Mapping[str, Tensor]) -> Filled:
    """Replace all that a module on the meta device has by copies of these."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise InputError(f"{name} is on the meta device, it has no data to read")
    copies = {
        name: _turned(tensor).detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    module.load_state_dict(copies, assign=True)
    return module


def _turned(x: Tensor) -> Tensor:
    return x.transpose(1, 2) if x.dim() == 3 else x
