"""Multi-head latent attention is transformers' `DeepseekV3Attention`: outputs, gradients, cache and padding."""

import math
from typing import Any

import pytest
import torch
from reference.comparing import OutputSizes, assert_close, assert_gradients, redraw
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from moesaic.layers import (
    Llama3RopeScaling,
    MultiHeadLatentAttention,
    RotaryEmbedding,
    parameter_fans,
    parameter_kinds,
)
from moesaic.layers.attention import visible_keys
from moesaic.layers.part import cache_bytes, flops_per_token
from moesaic.layers.work import Work

DIM, LENGTH = 24, 11
NAMES = {
    "q_down": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "q_up": "q_b_proj",
    "kv_down": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "kv_up": "kv_b_proj",
}
SIZES: dict[str, Any] = {
    "num_heads": 3,
    "kv_lora_rank": 7,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "q_lora_rank": 9,
}
CASES: dict[str, dict[str, Any]] = {
    "as given": {},
    "no latent of the queries": {"q_lora_rank": None},
    "biases": {"bias": True},
    "biases, no latent of the queries": {"bias": True, "q_lora_rank": None},
    "halves": {"interleaved": False},
    "values wider than keys": {"v_head_dim": 12},
    "one head": {"num_heads": 1, "qk_rope_head_dim": 2},
    "latent wider than all heads": {"kv_lora_rank": 50},
    "sharper scores": {"mscale_all_dim": 1.5},
}
every_case = pytest.mark.parametrize("changes", CASES.values(), ids=CASES)


def pair(changes: dict[str, Any]) -> tuple[MultiHeadLatentAttention, DeepseekV3Attention, DeepseekV3RotaryEmbedding]:
    """Ours and theirs with the same weights."""
    torch.manual_seed(0)
    sizes = {**SIZES, "bias": False, "interleaved": True, **changes}
    theta, scale = 50.0, sizes.pop("mscale_all_dim", None)
    rope = {"rope_type": "default", "rope_theta": theta}
    scaling = None
    if scale is not None:  # with any scaling of RoPE
        bands = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        scaling = Llama3RopeScaling(original_length=16, **bands)
        rope |= {"rope_type": "llama3", "original_max_position_embeddings": 16, "mscale_all_dim": scale, **bands}
    rotary = RotaryEmbedding(sizes["qk_rope_head_dim"], theta=theta, scaling=scaling)
    factor = (0.1 * (scale or 0) * math.log(4.0) + 1) ** 2
    ours = MultiHeadLatentAttention(DIM, **sizes, rotary=rotary, softmax_factor=factor)
    heads, bias, interleaved = sizes.pop("num_heads"), sizes.pop("bias"), sizes.pop("interleaved")
    config = DeepseekV3Config(
        hidden_size=DIM,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        rope_interleave=interleaved,
        attention_bias=bias,
        rope_parameters=rope,
        **sizes,
    )
    config._attn_implementation = "eager"
    theirs = DeepseekV3Attention(config, 0)
    redraw(ours)
    theirs.load_state_dict({theirs_name(name): x for name, x in ours.state_dict().items()})
    return ours, theirs, DeepseekV3RotaryEmbedding(config)


def theirs_name(name: str) -> str:
    module, _, parameter = name.rpartition(".")
    return f"{NAMES.get(module, module)}.{parameter}"


def run_theirs(theirs: DeepseekV3Attention, rotary: DeepseekV3RotaryEmbedding, x: Tensor, mask: Tensor) -> Tensor:
    """With padding where the mask (B, L) is False."""
    length = x.size(1)
    seen = torch.ones(length, length, dtype=torch.bool).tril() & mask[:, None] | torch.eye(length, dtype=torch.bool)
    added = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[:, None]
    angles = rotary(x, torch.arange(length)[None])
    return theirs(x, position_embeddings=angles, attention_mask=added)[0]


@every_case
@pytest.mark.parametrize("is_padded", [False, True], ids=["", "padded"])
def test_outputs_and_gradients_agree(changes: dict[str, Any], is_padded: bool) -> None:
    ours, theirs, rotary = pair(changes)
    x = torch.randn(3, LENGTH, DIM)
    mask = torch.arange(LENGTH) >= torch.tensor([0, 2, 7])[:, None] if is_padded else torch.ones(3, LENGTH).bool()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    expected = run_theirs(theirs, rotary, inputs[0], mask) * mask[:, :, None]
    found = ours(inputs[1], attention_mask=mask if is_padded else None) * mask[:, :, None]
    assert expected.std() > 0.3, "outputs this small hide mistakes"
    assert_close(found, expected, 1e-5, "output")
    upstream = torch.randn_like(expected)
    for y in (expected, found):
        (y * upstream).sum().backward()
    assert inputs[0].grad is not None and inputs[1].grad is not None
    assert_close(inputs[1].grad * mask[:, :, None], inputs[0].grad * mask[:, :, None], 2e-5, "gradient of x")
    gradients = {theirs_name(name): p.grad for name, p in ours.named_parameters()}
    assert_gradients(gradients, {name: p.grad for name, p in theirs.named_parameters()}, 1e-4)


@every_case
@pytest.mark.parametrize("pieces", [[1] * LENGTH, [4, 1, 1, 5]], ids=["token by token", "pieces"])
def test_decoding_with_a_cache_agrees(changes: dict[str, Any], pieces: list[int]) -> None:
    ours, theirs, rotary = pair(changes)
    x = torch.randn(3, LENGTH, DIM)
    for mask in (None, torch.arange(LENGTH) >= torch.tensor([0, 2, 7])[:, None]):
        real = torch.ones(3, LENGTH).bool() if mask is None else mask
        cache, found, end = ours.make_cache(), [], 0
        with torch.no_grad():
            expected = run_theirs(theirs, rotary, x, real)
            for new in pieces:
                start, end = end, end + new
                found.append(ours(x[:, start:end], cache, None if mask is None else mask[:, :end]))
        difference = (torch.cat(found, dim=1) - expected) * real[:, :, None]
        assert_close(difference, torch.zeros_like(difference), 1e-5, "output")


def test_the_cache_holds_the_latent_and_one_rotated_key() -> None:
    ours, *_ = pair({})
    cache = ours.make_cache()
    ours(torch.randn(2, LENGTH, DIM), cache)
    held = cache.append(torch.zeros(2, 1, 1, 7), torch.zeros(2, 1, 1, 4))
    numbers = sum(x[:, :, :LENGTH].numel() for x in held)
    assert numbers == 2 * LENGTH * (7 + 4)
    assert cache_bytes(ours, LENGTH, torch.bfloat16, DIM) == LENGTH * (7 + 4) * 2
    assert cache_bytes(ours, LENGTH, torch.float32, DIM) * 2 == numbers * 4


@every_case
def test_flops_are_those_that_torch_counts(changes: dict[str, Any]) -> None:
    ours, *_ = pair(changes)
    with Work() as work, torch.no_grad():
        ours(torch.randn(1, LENGTH, DIM))
    keys, values = ours.qk_nope_head_dim + ours.qk_rope_head_dim, ours.v_head_dim
    zeros = 2 * ours.num_heads * abs(keys - values) * visible_keys(LENGTH)
    found = flops_per_token(ours, LENGTH, 1, LENGTH, DIM)
    assert found.source == "declared" and found.per_token == pytest.approx(work.flops / LENGTH - zeros)


def test_memory_is_linear_in_the_length() -> None:
    ours, *_ = pair({})
    with OutputSizes() as sizes:
        ours(torch.randn(1, 600, DIM, requires_grad=True)).sum().backward()
    assert sizes.largest < 600 * 100


def test_all_projections_are_matrices_with_fans() -> None:
    ours, *_ = pair({"bias": True})
    kinds = parameter_kinds(ours)
    matrices = {name for name, kind in kinds.items() if kind == "matrix"}
    assert matrices == {f"{name}.weight" for name in ("q_down", "q_up", "kv_down", "kv_up", "o_proj")}
    assert {kinds[name] for name in kinds.keys() - matrices} == {"vector"}
    assert parameter_fans(ours).keys() == matrices


def test_padding_changes_nothing_whatever_stands_there() -> None:
    ours, *_ = pair({"bias": True})
    x = torch.randn(2, LENGTH, DIM)
    mask = torch.arange(LENGTH) >= torch.tensor([0, 3])[:, None]
    hostile = x.masked_fill(~mask[:, :, None], torch.inf)
    assert torch.equal(ours(x, attention_mask=mask)[mask], ours(hostile, attention_mask=mask)[mask])


def test_a_mask_for_some_calls_on_a_cache_is_refused() -> None:
    ours, *_ = pair({})
    cache = ours.make_cache()
    ours(torch.randn(1, 3, DIM), cache)
    with pytest.raises(ValueError, match="give it to all calls on one cache"):
        ours(torch.randn(1, 1, DIM), cache, torch.ones(1, 4).bool())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_lora_rank": 0}, "kv_lora_rank=0"),
        ({"q_lora_rank": 0}, "q_lora_rank=0"),
        ({"v_head_dim": -1}, "v_head_dim=-1"),
        ({"qk_nope_head_dim": 0}, "qk_nope_head_dim=0"),
        ({"qk_rope_head_dim": 6}, "rotary.head_dim=4: must equal qk_rope_head_dim=6"),
        ({"rotary": None}, "rotary=None: must be a RotaryEmbedding"),
        ({"interleaved": 1}, "interleaved=1"),
    ],
)
def test_impossible_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {**SIZES, "rotary": RotaryEmbedding(4), **changes}
    with pytest.raises((TypeError, ValueError), match=message):
        MultiHeadLatentAttention(DIM, **arguments)


def test_bf16_is_as_near_to_the_exact_result_as_theirs() -> None:
    ours, theirs, rotary = pair({})
    x = torch.randn(8, LENGTH, DIM).bfloat16()
    with torch.no_grad():
        theirs.bfloat16()
        halved = MultiHeadLatentAttention(DIM, **SIZES, rotary=ours.rotary, dtype=torch.bfloat16)
        halved.load_state_dict(ours.state_dict())
        ours.load_state_dict(halved.state_dict())  # the rounded weights
        exact = ours(x.float())
        angles = rotary(x, torch.arange(LENGTH)[None])
        added = torch.full((LENGTH, LENGTH), -torch.inf).triu(1).bfloat16()[None, None]
        expected = theirs(x, position_embeddings=angles, attention_mask=added)[0]
        found = halved(x)
    assert found.dtype == torch.bfloat16
    errors = [(y.float() - exact).square().mean().sqrt().item() for y in (found, expected)]
    assert 0 < errors[0] <= 1.1 * errors[1]
