"""Parameters, FLOPs and bytes of a decoder, from its config alone: what its parts say of themselves, added up.

Our parts state closed forms, because counters miss things: torch's FlopCounterMode counts zero for grouped_mm and for
CPU attention, and a parameter count that mixes total and active parameters is wrong by the number of experts. Custom
modules that state nothing are measured. The tests hold these numbers against built models and against FlopCounterMode
where it can count.
"""

import dataclasses
import math

import torch
from torch import nn

from moesaic.errors import InputError
from moesaic.layers.part import Flops, active_parameters, cache_bytes, flops_per_token, num_parameters, parameter_kinds
from moesaic.models.config import FFN, WITH_ROPE, CustomModule, DecoderConfig, Mixer
from moesaic.models.custom import asks_for, custom_modules
from moesaic.models.decoder import Block, build_block

__all__ = ["Account", "LayerAccount", "account", "kv_cache_bytes"]


@dataclasses.dataclass(frozen=True)
class LayerAccount:
    """One block. FLOPs are per token, forward; a multiply-add counts as two."""

    mixer: str
    ffn: str
    parameters: int
    active_parameters: int
    matmul_flops: int
    """In the active matrices."""
    attention_flops: float
    """In what grows with the sequence."""
    assumed: tuple[str, ...] = ()
    """Parts that say nothing of their FLOPs and could not be measured: two per element of every matrix is assumed."""


@dataclasses.dataclass(frozen=True)
class Account:
    """A whole decoder at one sequence length. Active: what one token meets (top_k of the routed experts)."""

    layers: tuple[LayerAccount, ...]
    parameters: int
    active_parameters: int
    matmul_flops: int
    """Per token, forward, in the active matrices, head included."""
    attention_flops: float
    """Per token, forward, of q k and p v over the keys a token really sees, averaged over the sequence."""

    @property
    def forward_flops(self) -> float:
        """Per token."""
        return self.matmul_flops + self.attention_flops

    @property
    def backward_flops(self) -> float:
        """Per token: gradients of inputs and of weights, without recomputation."""
        return 2 * self.forward_flops

    @property
    def training_flops(self) -> float:
        """Per token, forward and backward."""
        return self.forward_flops + self.backward_flops

    def weight_bytes(self, dtype: torch.dtype = torch.float32) -> int:
        return self.parameters * dtype.itemsize

    def optimizer_bytes(self) -> int:
        """AdamW's two moments in fp32; Muon keeps one of them for the matrices it steps, so it needs less."""
        return 2 * self.parameters * torch.float32.itemsize


def account(config: DecoderConfig, seq_len: int) -> Account:
    """Count `config` at sequences of seq_len tokens.

    Everything is built without memory, except small custom modules that can only be measured on real numbers.

    Raises:
        InputError: a custom module returns something else than its place needs.
    """
    kinds = _kinds_of_layers(config)
    try:
        found = {i: _layer(config, i, seq_len) for i in set(kinds)}
    except ValueError as error:
        raise InputError(str(error)) from error
    layers = [found[i] for i in kinds]
    embedding = config.vocab_size * config.dim
    head = 0 if config.tie_embeddings else embedding
    outside = embedding + head + config.dim
    return Account(
        layers=tuple(layers),
        parameters=outside + sum(layer.parameters for layer in layers),
        active_parameters=outside + sum(layer.active_parameters for layer in layers),
        matmul_flops=2 * embedding + sum(layer.matmul_flops for layer in layers),
        attention_flops=math.fsum(layer.attention_flops for layer in layers),
    )


def kv_cache_bytes(config: DecoderConfig, length: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes that decoding token number `length` of a sequence reads from the caches of all layers.

    For attention these are keys and values; a chunk-local layer never holds more than those of its chunk.
    """
    kinds = _kinds_of_layers(config)
    found = {i: cache_bytes(_build(config, i).mixer, length, dtype, config.dim) for i in set(kinds)}
    return sum(found[i] for i in kinds)


MOST_REAL_PARAMETERS = 2 * 10**7
"""Size of a layer up to which one with custom modules is built with memory, so that it can be run if it must be."""


def _kinds_of_layers(config: DecoderConfig) -> list[int]:
    """For every layer the first one that is like it. With a custom module that asks for its layer, it is itself."""
    if any(asks_for(custom, "layer_index") for custom in custom_modules(config).values()):
        return list(range(config.num_layers))
    return [config.layers.index(layer) for layer in config.layers]


def _build(config: DecoderConfig, i: int) -> Block:
    with torch.device("meta"):
        block = build_block(config, i)
    if custom_modules(config) and num_parameters(block) <= MOST_REAL_PARAMETERS:
        with torch.random.fork_rng(devices=[]):
            return build_block(config, i)
    return block


def _layer(config: DecoderConfig, i: int, seq_len: int) -> LayerAccount:
    block, layer = _build(config, i), config.layers[i]
    mixer = flops_per_token(block.mixer, seq_len, 1, seq_len, config.dim)
    ffn = flops_per_token(block.ffn, seq_len, 1, seq_len, config.dim)
    matrices = 2 * sum(p.numel() for kind, p in _with_kinds(block.mixer) if kind != "vector")
    in_mixer = min(matrices, round(mixer.per_token))
    assumed = [part for part, flops in ((layer.mixer, mixer), (layer.ffn, ffn)) if flops.source == "assumed"]
    parameters = num_parameters(block)
    return LayerAccount(
        mixer=layer.mixer["type"] if isinstance(layer.mixer, dict) else _describe_mixer(config, layer.mixer),
        ffn=layer.ffn["type"] if isinstance(layer.ffn, dict) else _describe_ffn(config, layer.ffn),
        parameters=parameters,
        active_parameters=parameters
        - num_parameters(block.ffn)
        + active_parameters(block.ffn, ffn)
        - (num_parameters(block.mixer) - active_parameters(block.mixer, Flops(0, "declared"))),
        matmul_flops=in_mixer + round(ffn.per_token),
        attention_flops=mixer.per_token - in_mixer,
        assumed=tuple(part["type"] for part in assumed if isinstance(part, dict)),
    )


def _with_kinds(part: nn.Module) -> list[tuple[str, nn.Parameter]]:
    kinds = parameter_kinds(part)
    return [(kinds[name], parameter) for name, parameter in part.named_parameters()]


def _describe_ffn(config: DecoderConfig, ffn: FFN) -> str:
    if ffn != "moe":
        return f"dense {config.ffn_width(ffn)}"
    moe = config.moe
    assert moe is not None  # checked by the config
    shared = f" + shared {moe.shared_width}" if moe.shared_width else ""
    router = "" if moe.router == "top_k" else f", router {_name_of(moe.router)}"
    experts = f" {moe.experts['type']}" if isinstance(moe.experts, dict) else ""
    if moe.experts == "clamped_swiglu":
        experts = f" clamped at {moe.swiglu_limit:g}"
    if moe.experts == "normed_swiglu":
        experts = " normed"
    besides = {"identity": moe.identity_experts, "skip": moe.skip_experts}
    free = "".join(f" + {number} {name}" for name, number in besides.items() if number)
    latent = f" in {moe.latent_dim}" if moe.latent_dim else ""
    return f"MoE {moe.num_experts} x {moe.hidden_dim}{latent}{experts}{free}, top {moe.top_k}{shared}{router}"


def _name_of(part: str | CustomModule) -> str:
    """A built-in name or a dotted path, with what it is given beside."""
    if isinstance(part, str):
        return part
    arguments = ", ".join(f"{key}={value}" for key, value in part.items() if key != "type")
    return part["type"] + (f" ({arguments})" if arguments else "")


def _describe_mixer(config: DecoderConfig, mixer: Mixer) -> str:
    attention = config.attention
    if mixer == "mla":
        assert attention.mla is not None  # checked by the config
        mla = attention.mla
        queries = f", queries {mla.q_lora_rank}" if mla.q_lora_rank else ""
        return f"MLA, latent {mla.kv_lora_rank} + {mla.qk_rope_head_dim}{queries}"
    positions = mixer in WITH_ROPE
    words = ["RoPE" if positions else "NoPE"]
    chunk, window = config.chunk_of(mixer), config.window_of(mixer)
    words.append("full" if chunk is None else f"chunks of {chunk}")
    if window is not None:
        words[1] = f"window of {window}"
    if attention.sinks:
        words.append("sinks")
    if isinstance(attention.qk_norm, str):
        words.append(f"QK norm {attention.qk_norm}")
    elif positions and attention.qk_norm:
        words.append("QK norm")
    if attention.clip_qkv is not None:
        words.append(f"clipped at {attention.clip_qkv:g}")
    if not positions and attention.temperature is not None:
        temperature = attention.temperature
        scale = temperature.scalable_softmax
        described = f"temperature {temperature.attn_scale} / {temperature.floor_scale}"
        words.append(described if scale is None else f"scalable softmax {scale:g}")
    if attention.conv_width:
        words.append(f"conv {attention.conv_width}")
    return ", ".join(words)
