"""Attention under torch.compile and torch.export, at lengths that were not seen when it was traced."""

import pytest
import torch
from torch.export import Dim

from moesaic.layers import Attention, AttentionTemperature, RotaryEmbedding

KINDS = {
    "rope": {"rotary": RotaryEmbedding(4)},
    "chunked": {"rotary": RotaryEmbedding(4), "attention_chunk_size": 8, "qk_norm": True},
    "nope": {"temperature": AttentionTemperature()},
    "convolution": {"rotary": RotaryEmbedding(4), "conv_width": 3},
}
LENGTHS = (12, 20, 7, 33, 2)

every_kind = pytest.mark.parametrize("kind", KINDS)


def build(kind: str) -> Attention:
    return Attention(16, num_heads=4, num_kv_heads=2, **KINDS[kind])  # type: ignore[arg-type]


@pytest.mark.slow
@every_kind
def test_whole_graphs_over_five_lengths(kind: str) -> None:
    torch.compiler.reset()
    attention = build(kind)
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    for length in LENGTHS:
        x = torch.randn(2, length, 16)
        torch.testing.assert_close(compiled(x), attention(x), atol=1e-5, rtol=1e-5)


@pytest.mark.slow_but_for("rope-False")
@pytest.mark.parametrize("strict", [False, True])
@every_kind
def test_an_export_serves_every_length(kind: str, strict: bool) -> None:
    torch.compiler.reset()
    attention = build(kind)
    shapes = {"x": {1: Dim("length", min=2, max=64)}}
    exported = torch.export.export(attention, (torch.randn(2, 12, 16),), dynamic_shapes=shapes, strict=strict)
    for length in LENGTHS:
        x = torch.randn(2, length, 16)
        torch.testing.assert_close(exported.module()(x), attention(x), atol=1e-5, rtol=1e-5)
