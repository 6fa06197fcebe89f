"""The Llama 4 text model, slow and obvious, on plain weight tensors under their names in transformers' state dict.

Written from the semantics of transformers' `Llama4ForCausalLM` alone; it shares no code with moesaic. Heads, tokens,
experts and mask entries are explicit Python loops. It runs in the dtype of the weights; angles, temperatures and
scores are at least fp32, as there.
"""

import dataclasses
import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class Llama4Settings:
    """Fields as in transformers' `Llama4TextConfig`; an interval or step of 0 stands for never."""

    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts_per_tok: int
    interleave_moe_layer_step: int
    no_rope_layer_interval: int
    attention_chunk_size: int
    use_qk_norm: bool
    rope_theta: float
    rope_scaling: RopeScaling | None
    attn_temperature_tuning: bool
    attn_scale: float
    floor_scale: int
    rms_norm_eps: float


def logits(settings: Llama4Settings, weights: Weights, tokens: Tensor) -> Tensor:
    """tokens (B, S) -> logits (B, S, V)."""
    return torch.stack([_logits_of_one(settings, weights, row) for row in tokens])


def _logits_of_one(settings: Llama4Settings, weights: Weights, tokens: Tensor) -> Tensor:
    embedding = weights["model.embed_tokens.weight"]
    x = torch.stack([embedding[token] for token in tokens])
    for i in range(settings.num_hidden_layers):
        layer = f"model.layers.{i}."
        y = rms_norm(x, weights[layer + "input_layernorm.weight"], settings.rms_norm_eps)
        x = x + attention(settings, weights, i, y)
        y = rms_norm(x, weights[layer + "post_attention_layernorm.weight"], settings.rms_norm_eps)
        if is_moe(settings, i):
            x = x + mixture_of_experts(settings, weights, layer + "feed_forward.", y)
        else:
            x = x + gated_mlp(weights, layer + "feed_forward.", y)
    x = rms_norm(x, weights["model.norm.weight"], settings.rms_norm_eps)
    return x @ weights.get("lm_head.weight", embedding).T


def uses_rope(settings: Llama4Settings, i: int) -> bool:
    interval = settings.no_rope_layer_interval
    return interval == 0 or (i + 1) % interval != 0


def is_moe(settings: Llama4Settings, i: int) -> bool:
    step = settings.interleave_moe_layer_step
    return step > 0 and i in range(step - 1, settings.num_hidden_layers, step)


def rms_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    y = (wide / torch.sqrt((wide * wide).sum(-1, keepdim=True) / x.size(-1) + eps)).to(x.dtype)
    return y if gain is None else y * gain


def attention(settings: Llama4Settings, weights: Weights, i: int, x: Tensor) -> Tensor:
    """x (S, d) -> (S, d)."""
    prefix = f"model.layers.{i}.self_attn."
    length, width = x.size(0), settings.head_dim
    rope = uses_rope(settings, i)
    mask = visible(length, settings.attention_chunk_size if rope else None)

    def project(name: str, y: Tensor) -> Tensor:
        y = y @ weights[f"{prefix}{name}.weight"].T
        bias = weights.get(f"{prefix}{name}.bias")
        return y if bias is None else y + bias

    def positioned(y: Tensor) -> Tensor:
        if rope:
            y = rotate(settings, y)
            if settings.use_qk_norm:
                y = rms_norm(y, None, settings.rms_norm_eps)
        return y

    queries, keys, values = project("q_proj", x), project("k_proj", x), project("v_proj", x)
    repeats = settings.num_attention_heads // settings.num_key_value_heads
    outputs = []
    for head in range(settings.num_attention_heads):
        group = head // repeats
        q = positioned(queries[:, head * width : (head + 1) * width])
        k = positioned(keys[:, group * width : (group + 1) * width])
        v = values[:, group * width : (group + 1) * width]
        if settings.attn_temperature_tuning and not rope:
            factors = []
            for position in range(length):
                floor = torch.tensor(math.floor((position + 1) / settings.floor_scale), dtype=torch.float32)
                factors.append(1 + settings.attn_scale * torch.log1p(floor))
            q = (q * torch.stack(factors)[:, None]).to(x.dtype)
        weights_of_keys = torch.softmax((q @ k.T / math.sqrt(width)).masked_fill(~mask, -math.inf), dim=-1)
        outputs.append(weights_of_keys @ v)
    return project("o_proj", torch.cat(outputs, dim=-1))


def visible(length: int, chunk: int | None) -> Tensor:
    """(S, S): whether query i sees key j."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        for j in range(length):
            mask[i, j] = j <= i and (chunk is None or i // chunk == j // chunk)
    return mask


def rotate(settings: Llama4Settings, x: Tensor) -> Tensor:
    """x (S, D), rotated by its position: pairs (2j, 2j + 1) are complex numbers."""
    length, width = x.shape
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    per_token = 1.0 / settings.rope_theta**exponents
    if settings.rope_scaling is not None:
        per_token = torch.stack([_scale(settings.rope_scaling, w) for w in per_token])
    angles = torch.stack([position * per_token for position in range(length)])
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    turn = torch.complex(angles.cos().to(wide), angles.sin().to(wide))
    pairs = torch.complex(x[:, 0::2].to(wide), x[:, 1::2].to(wide)) * turn
    return torch.stack((pairs.real, pairs.imag), dim=-1).reshape(length, width).to(x.dtype)


def _scale(scaling: RopeScaling, w: Tensor) -> Tensor:
    turns = float(scaling.original_max_position_embeddings * w / (2 * math.pi))
    if turns > scaling.high_freq_factor:
        return w
    if turns < scaling.low_freq_factor:
        return w / scaling.factor
    t = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - t) * w / scaling.factor + t * w


def gated_mlp(weights: Weights, prefix: str, x: Tensor) -> Tensor:
    gate = x @ weights[prefix + "gate_proj.weight"].T
    up = x @ weights[prefix + "up_proj.weight"].T
    return (gate * torch.sigmoid(gate) * up) @ weights[prefix + "down_proj.weight"].T


def mixture_of_experts(settings: Llama4Settings, weights: Weights, prefix: str, x: Tensor) -> Tensor:
    """x (S, d) -> (S, d): the score multiplies the input of the expert."""
    router = weights[prefix + "router.weight"]
    outputs = []
    for token in x:
        z = router @ token
        ranked = sorted(range(z.size(0)), key=lambda e: -z[e].item())
        routed = torch.zeros_like(token)
        for e in sorted(ranked[: settings.num_experts_per_tok]):
            wide = z[e] if x.dtype == torch.float64 else z[e].float()
            u = torch.sigmoid(wide).to(x.dtype) * token
            gate_up = weights[prefix + "experts.gate_up_proj"][e]
            width = gate_up.size(1) // 2
            gate, up = u @ gate_up[:, :width], u @ gate_up[:, width:]
            routed = routed + (gate * torch.sigmoid(gate) * up) @ weights[prefix + "experts.down_proj"][e]
        outputs.append(gated_mlp(weights, prefix + "shared_expert.", token) + routed)
    return torch.stack(outputs)


def transformers_name(name: str) -> str:
    """The name in transformers' state dict of a parameter of moesaic's decoder."""
    top = {"embedding.weight": "embed_tokens.weight", "norm.weight": "norm.weight"}
    if name == "head.weight":
        return "lm_head.weight"
    if name in top:
        return "model." + top[name]
    for ours, theirs in (
        (".mixer_norm.", ".input_layernorm."),
        (".ffn_norm.", ".post_attention_layernorm."),
        (".mixer.", ".self_attn."),
        (".ffn.", ".feed_forward."),
    ):
        name = name.replace(ours, theirs)
    return "model." + name
