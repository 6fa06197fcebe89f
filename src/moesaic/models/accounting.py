"""Parameters, FLOPs and bytes of a decoder, from its config alone.

Closed forms, because counters miss things: torch's FlopCounterMode counts zero for grouped_mm and for CPU attention,
and a parameter count that mixes total and active parameters is wrong by the number of experts. The tests hold these
numbers against built models and against FlopCounterMode where it can count.
"""

import dataclasses
import math

import torch

from moesaic.models.config import DecoderConfig, LayerConfig
from moesaic.models.decoder import build_decoder

__all__ = ["Account", "LayerAccount", "account", "kv_cache_bytes", "visible_keys"]


@dataclasses.dataclass(frozen=True)
class LayerAccount:
    """One block. FLOPs are per token, forward; a multiply-add counts as two."""

    mixer: str
    ffn: str
    parameters: int
    active_parameters: int
    matmul_flops: int
    attention_flops: float


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

    Own parts are built on the meta device and counted as matrices that every token meets.
    """
    layers = tuple(_layer(config, i, layer, seq_len) for i, layer in enumerate(config.layers))
    embedding = config.vocab_size * config.dim
    head = 0 if config.tie_embeddings else embedding
    outside = embedding + head + config.dim
    return Account(
        layers=layers,
        parameters=outside + sum(layer.parameters for layer in layers),
        active_parameters=outside + sum(layer.active_parameters for layer in layers),
        matmul_flops=2 * embedding + sum(layer.matmul_flops for layer in layers),
        attention_flops=math.fsum(layer.attention_flops for layer in layers),
    )


def visible_keys(seq_len: int, chunk: int | None = None) -> float:
    """Keys that a query sees under the causal (chunked) mask, averaged over seq_len positions."""
    if chunk is None or chunk >= seq_len:
        return (seq_len + 1) / 2
    whole, rest = divmod(seq_len, chunk)
    return (whole * chunk * (chunk + 1) / 2 + rest * (rest + 1) / 2) / seq_len


def kv_cache_bytes(config: DecoderConfig, length: int, dtype: torch.dtype = torch.float32) -> int:
    """Keys and values that decoding token number `length` of a sequence reads; chunk-local layers: of its chunk only.

    That is the most they ever hold. Own mixers are not counted.
    """
    tokens = 0
    for layer in config.layers:
        if isinstance(layer.mixer, str):
            chunk = config.chunk_of(layer.mixer)
            tokens += length if chunk is None else min(length, chunk)
    return tokens * 2 * config.num_kv_heads * config.head_dim * dtype.itemsize


def _layer(config: DecoderConfig, i: int, layer: LayerConfig, seq_len: int) -> LayerAccount:
    dim, attention = config.dim, config.attention
    if isinstance(layer.mixer, dict):
        mixer_matrices, mixer_rest = _own_part_sizes(config, i, "mixer")
        mixer_name, attention_flops = layer.mixer["type"], 0.0
    else:
        queries, keys = attention.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        channels = queries + 2 * keys
        mixer_matrices = dim * channels + queries * dim
        mixer_rest = (channels + dim if attention.bias else 0) + attention.conv_width * channels
        chunk = config.chunk_of(layer.mixer)
        attention_flops = 2 * 2 * queries * visible_keys(seq_len, chunk)
        mixer_name = _describe_mixer(config, layer.mixer)

    idle = 0  # parameters of the experts that a token does not meet
    if isinstance(layer.ffn, dict):
        ffn_matrices, ffn_rest = _own_part_sizes(config, i, "ffn")
        ffn_name = layer.ffn["type"]
    elif layer.ffn == "moe":
        moe = config.moe
        assert moe is not None  # checked by the config
        if isinstance(moe.router, dict):
            router_matrices, ffn_rest = _own_part_sizes(config, i, "ffn.router")
        else:
            router_matrices, ffn_rest = dim * moe.num_experts, 0
        expert = 3 * dim * moe.hidden_dim
        ffn_matrices = router_matrices + moe.num_experts * expert + 3 * dim * moe.shared_width
        idle = (moe.num_experts - moe.top_k) * expert
        shared = f" + shared {moe.shared_width}" if moe.shared_width else ""
        ffn_name = f"MoE {moe.num_experts} x {moe.hidden_dim}, top {moe.top_k}{shared}"
    else:
        width = config.ffn_width(layer.ffn)
        ffn_matrices, ffn_rest = 3 * dim * width, 0
        ffn_name = f"dense {width}"

    parameters = mixer_matrices + mixer_rest + ffn_matrices + ffn_rest + 2 * dim
    return LayerAccount(
        mixer=mixer_name,
        ffn=ffn_name,
        parameters=parameters,
        active_parameters=parameters - idle,
        matmul_flops=2 * (mixer_matrices + ffn_matrices - idle),
        attention_flops=attention_flops,
    )


def _describe_mixer(config: DecoderConfig, mixer: str) -> str:
    attention = config.attention
    positions = mixer in ("rope", "full_rope")
    words = ["RoPE" if positions else "NoPE"]
    chunk = config.chunk_of(mixer)  # type: ignore[arg-type]
    words.append("full" if chunk is None else f"chunks of {chunk}")
    if positions and attention.qk_norm:
        words.append("QK norm")
    if not positions and attention.temperature is not None:
        temperature = attention.temperature
        scale = temperature.scalable_softmax
        described = f"temperature {temperature.attn_scale} / {temperature.floor_scale}"
        words.append(described if scale is None else f"scalable softmax {scale:g}")
    if attention.conv_width:
        words.append(f"conv {attention.conv_width}")
    return ", ".join(words)


def _own_part_sizes(config: DecoderConfig, i: int, name: str) -> tuple[int, int]:
    """(parameters in matrices, other parameters) of a user's own module."""
    with torch.device("meta"):
        part = build_decoder(config).get_submodule(f"layers.{i}.{name}")
    sizes = [(parameter.dim() >= 2, parameter.numel()) for parameter in part.parameters()]
    return sum(n for matrix, n in sizes if matrix), sum(n for matrix, n in sizes if not matrix)
