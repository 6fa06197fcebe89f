"""Muse Spark's block in transformers and our MoE layer of the same config keys: outputs, gradients and weights."""

from typing import Any

import pytest
import torch
from reference.comparing import assert_close, assert_gradients, gradients, redraw, run_with_gradients
from torch import Tensor
from transformers.models.muse_spark.configuration_muse_spark import MuseSparkTextConfig
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkMoE, MuseSparkTextModel

from moesaic.errors import InputError
from moesaic.interop import (
    accelerate,
    accelerated_blocks,
    block_from_hf,
    block_gradients_to_hf,
    block_to_hf,
    moe_config_from_hf,
    restore,
)
from moesaic.layers import BACKENDS, MoE, TopKRouter
from moesaic.models import account, build_decoder, muse_spark, tiny_twin

DIM = 24
SIZES: dict[str, Any] = {
    "hidden_size": DIM,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "moe_hidden_size": 16,
    "moe_intermediate_size": 20,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "output_multiplier": 0.7,
}
CASES: dict[str, dict[str, Any]] = {
    "as published": {},
    "scaled scores, another activation": {"routed_scaling_factor": 2.5, "hidden_act": "gelu"},
    "every expert, other eps": {"num_experts_per_tok": 6, "rms_norm_eps": 1e-2, "post_norm_eps": 1e-3},
}
every_case = pytest.mark.parametrize("name", CASES)


def theirs(name: str = "as published", dtype: torch.dtype = torch.float64) -> MuseSparkMoE:
    torch.manual_seed(0)
    config = MuseSparkTextConfig(**SIZES | CASES[name])
    config._experts_implementation = "eager"
    block = redraw(MuseSparkMoE(config)).to(dtype)
    block.gate.e_score_correction_bias.normal_(std=0.3)
    return block


def inputs(tokens: int = 40, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, tokens // 2, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)


@every_case
@pytest.mark.parametrize("tokens", [40, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 2e-5)])
def test_outputs_and_every_gradient_both_ways(name: str, tokens: int, dtype: torch.dtype, tolerance: float) -> None:
    block, x = theirs(name, dtype), inputs(tokens, dtype).requires_grad_()
    expected, expected_gradients = run_with_gradients(lambda: block(x), block)
    at_input, x.grad = x.grad, None
    ours = block_from_hf(block)
    found, _ = run_with_gradients(lambda: ours(x), ours)
    assert_close(found, expected, tolerance, "output")
    assert x.grad is not None and at_input is not None
    assert_close(x.grad, at_input, tolerance, "gradient of the input")
    used = {
        key: g if g is not None else torch.zeros_like(block.get_parameter(key)) for key, g in expected_gradients.items()
    }
    assert_gradients(block_gradients_to_hf(ours), used, tolerance)
    again = block_to_hf(ours)
    assert_close(run_with_gradients(lambda: again(x), again)[0], expected, 1e-12, "back again")
    assert_gradients(gradients(again), expected_gradients, 1e-12)


@every_case
def test_weights_come_back_bit_equal_and_are_not_shared(name: str) -> None:
    block = theirs(name, torch.float32)
    block.gate.float(), block.experts.bfloat16()
    ours = block_from_hf(block)
    again, before = block_to_hf(ours), block.state_dict()
    assert again.state_dict().keys() == before.keys()
    for key, tensor in again.state_dict().items():
        assert tensor.dtype == before[key].dtype and torch.equal(tensor, before[key]), key
        assert tensor.data_ptr() != before[key].data_ptr()
    fields = ("hidden_size", "moe_hidden_size", "output_multiplier", "routed_scaling_factor", "hidden_act")
    fields += ("rms_norm_eps", "post_norm_eps", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size")
    assert all(getattr(again.config, key) == getattr(block.config, key) for key in fields)


@pytest.mark.parametrize("backend", sorted(BACKENDS.keys() - {"fp8", "fp8_emulated"}))
def test_on_every_backend(backend: Any) -> None:
    block, x = theirs(dtype=torch.float32), inputs(dtype=torch.float32)
    assert_close(block_from_hf(block, backend=backend)(x), block(x), 2e-5, "output")


def test_bf16_is_as_near_to_the_exact_result_as_theirs() -> None:
    block, x = theirs(dtype=torch.float32), inputs(200, torch.float32)
    exact = block(x)
    half = theirs(dtype=torch.float32).to(torch.bfloat16)
    half.gate.float()
    ours = block_from_hf(half)
    with torch.no_grad():
        far = [(each(x.bfloat16()).float() - exact).abs().amax(dim=-1).median() for each in (ours, half)]
    assert far[0] <= 1.2 * far[1]


def test_accelerated_blocks_agree_and_go_back() -> None:
    block, x = theirs(), inputs()
    expected, expected_gradients = run_with_gradients(lambda: block(x), block)
    accelerate(block)
    assert accelerated_blocks(block) == ["experts"]
    found, found_gradients = run_with_gradients(lambda: block(x), block)
    assert_close(found, expected, 1e-6, "output")
    assert_gradients(found_gradients, expected_gradients, 1e-6)
    assert type(restore(block).experts).__name__ == "MuseSparkExperts"


def test_what_is_another_block_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="Linear: must be a MuseSparkMoE"):
        block_from_hf(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"normalize_scores=True: with top_k=1 every score is 1"):
        moe_config_from_hf({"num_experts_per_tok": 1})
    with pytest.raises(InputError, match=r"hidden_act='mish': must be one of "):
        moe_config_from_hf({"hidden_act": "mish"})
    with pytest.raises(InputError, match=r"gate.weight|weight is on the meta device"):
        block_from_hf(theirs().to("meta"))
    message = r"experts: found Experts, must be NormedExperts; latent_dim: found NoneType, must be Latent; "
    with pytest.raises(InputError, match=message + r"shared_hidden_dim: found FeedForward.*expert_bias: found False"):
        block_to_hf(MoE.build(8, 8, 4))
    moe = block_from_hf(theirs())
    moe.router = TopKRouter(DIM, 6, top_k=3, score_function="softmax", expert_bias=True, normalize_scores=True)
    with pytest.raises(InputError, match="score_function: found softmax, must be sigmoid"):
        block_to_hf(moe)


def test_the_preset_has_the_published_layer() -> None:
    published = MuseSparkTextConfig()
    preset = muse_spark()
    assert moe_config_from_hf(published.to_dict()) == preset.moe
    assert (preset.dim, preset.num_layers, preset.vocab_size) == (8192, 62, 202048)
    assert (preset.hidden_dim, preset.norm_eps) == (published.intermediate_size, published.rms_norm_eps)
    attention = preset.attention
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (128, 16, 64)
    assert published.rope_parameters["rope_theta"] == attention.rope_theta
    assert attention.window == published.sliding_window
    kinds = {"nope": "full_attention", "windowed_rope": "sliding_attention"}
    assert [kinds[str(layer.mixer)] for layer in preset.layers] == published.layer_types
    assert [layer.mixer == "nope" for layer in preset.layers] == [not theta for theta in published.layer_rope_theta]


def test_published_counts_and_what_the_preset_leaves_out() -> None:
    """816B and 42B are published. Which parameters these count is not, and both readings are here."""
    published = MuseSparkTextConfig()
    with torch.device("meta"):
        model = MuseSparkTextModel(published)
    whole = sum(p.numel() for p in model.parameters())
    table = published.vocab_size * published.hidden_size
    idle = (256 - 8) * 3 * 4096 * 4096 * 62
    assert round((whole - table) / 1e9, 2) == 816.68 and round((whole - table - idle) / 1e9, 2) == 42.78
    assert round((whole + table) / 1e9, 2) == 819.99 and round((whole + table - idle) / 1e9, 2) == 46.09
    preset = muse_spark()
    found = account(preset, 8192)
    absent = [p for name, p in model.named_parameters() if "gate_proj" in name and "self_attn" in name]
    absent += [
        p for name, p in model.named_parameters() if "residual_gate" in name or "post_feedforward_layernorm" in name
    ]
    assert found.parameters == whole + table - sum(p.numel() for p in absent)  # theirs has no head
    assert (round(found.parameters / 1e9, 2), round(found.active_parameters / 1e9, 2)) == (815.83, 41.93)
    assert found.parameters == sum(p.numel() for p in build_decoder(preset, device="meta").parameters())


def test_the_tiny_twin_learns_in_every_parameter() -> None:
    twin = tiny_twin(muse_spark(), vocab_size=60)
    assert twin.moe is not None and twin.moe.latent_dim == 16 and twin.attention.window == 8
    decoder = build_decoder(twin)
    decoder(torch.randint(60, (2, 20))).logits.square().sum().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in decoder.parameters())
    layer = decoder.layers[0].ffn
    assert isinstance(layer, MoE)
    x = torch.randn(2, 9, 32)
    assert_close(block_to_hf(layer)(x), layer(x), 2e-5, "output")
