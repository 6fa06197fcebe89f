"""Every layer: on the meta device, in another dtype, initialized, by one line."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from moesaic.layers import (
    Attention,
    AttentionTemperature,
    Experts,
    FeedForward,
    MoE,
    RMSNorm,
    RotaryEmbedding,
    ShortConvolution,
    TopKRouter,
    UniformRouter,
)

LAYERS: dict[str, Callable[..., nn.Module]] = {
    "RMSNorm": lambda **where: RMSNorm(64, **where),
    "FeedForward": lambda **where: FeedForward(64, 32, **where),
    "TopKRouter": lambda **where: TopKRouter(64, 8, expert_bias=True, **where),
    "UniformRouter": lambda **where: UniformRouter(64, 8, **where),
    "Experts": lambda **where: Experts(8, 64, 32, **where),
    "MoE": lambda **where: MoE.build(64, 32, 8, top_k=2, **where),
    "Attention": lambda **where: Attention(
        64,
        num_heads=4,
        num_kv_heads=2,
        rotary=RotaryEmbedding(16),
        qk_norm=True,
        conv_width=3,
        bias=True,
        **where,
    ),
    "Attention without positions": lambda **where: Attention(
        64, num_heads=4, temperature=AttentionTemperature(floor_scale=2), attention_chunk_size=4, **where
    ),
    "ShortConvolution": lambda **where: ShortConvolution(64, 3, **where),
}


@pytest.mark.parametrize("name", LAYERS)
def test_meta_device(name: str) -> None:
    layer = LAYERS[name](device="meta")
    tensors = [*layer.parameters(), *layer.buffers()]
    assert tensors and all(tensor.is_meta for tensor in tensors)


@pytest.mark.parametrize("name", LAYERS)
def test_bfloat16(name: str) -> None:
    layer = LAYERS[name](dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
    if name in ("TopKRouter", "UniformRouter", "Experts", "ShortConvolution"):
        return
    y = layer(torch.randn(2, 6, 64, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()


@pytest.mark.parametrize("name", LAYERS)
def test_default_is_initialized_fp32(name: str) -> None:
    layer = LAYERS[name]()
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float32}
    assert all(parameter.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("name", ["RMSNorm", "TopKRouter", "Experts", "ShortConvolution"])
def test_reset_parameters_redraws_the_initial_distribution(name: str) -> None:
    """What a model made on the meta device needs after `to_empty`."""
    layer, fresh = LAYERS[name](device="meta").to_empty(device="cpu"), LAYERS[name]()
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.fill_(torch.nan)
    layer.reset_parameters()  # type: ignore[operator]
    for key, expected in fresh.state_dict().items():
        found = layer.state_dict()[key]
        assert abs(found.mean() - expected.mean()) < 0.05, key
        assert abs(found.std() - expected.std()) <= 0.15 * expected.std(), key


def test_initial_scale_keeps_the_variance() -> None:
    experts = Experts(8, 64, 32)
    assert TopKRouter(64, 32).weight.std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert experts.gate_up_proj.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert experts.down_proj.std().item() == pytest.approx(32**-0.5, rel=0.05)


@pytest.mark.parametrize("name", LAYERS)
def test_repr_names_the_sizes(name: str) -> None:
    expected: dict[str, Any] = {"FeedForward": "in_features=64", "ShortConvolution": "ShortConvolution"}
    text = repr(LAYERS[name]())
    assert expected.get(name, "64" if not name.startswith("Attention") else "num_heads=4") in text
