"""Attention under torch.compile and torch.export, at lengths that were not seen when it was traced."""

import pytest
import torch
from torch.export import Dim
from torch.nn.attention import SDPBackend, sdpa_kernel

from moesaic.layers import Attention, AttentionTemperature, RotaryEmbedding

KINDS = {
    "rope": {"rotary": RotaryEmbedding(4)},
    "chunked": {"rotary": RotaryEmbedding(4), "attention_chunk_size": 8, "qk_norm": True},
    "nope": {"temperature": AttentionTemperature()},
    "convolution": {"rotary": RotaryEmbedding(4), "conv_width": 3},
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),  # torch's own forward mode
    pytest.mark.filterwarnings("ignore:.*performance drop.*"),
]
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


@every_kind
def test_vmap_and_gradients_per_sample(kind: str) -> None:
    attention, x = build(kind), torch.randn(3, 1, 12, 16)
    expected = torch.stack([attention(each) for each in x])
    torch.testing.assert_close(torch.vmap(attention)(x), expected, atol=1e-5, rtol=1e-5)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return attention(x).square().sum()

    x.requires_grad_()
    expected = torch.autograd.grad(loss(x.flatten(0, 1)), x)[0]
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(x), expected, atol=1e-4, rtol=1e-4)


@every_kind
def test_forward_mode(kind: str) -> None:
    attention, x = build(kind).double(), torch.randn(2, 12, 16, dtype=torch.float64)
    tangent, step = torch.randn_like(x), 1e-5
    found = torch.func.jvp(attention, (x,), (tangent,))[1]
    expected = (attention(x + step * tangent) - attention(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@every_kind
def test_second_derivatives(kind: str) -> None:
    """By torch.func.hessian as it is; twice backward on the one kernel that has it."""
    attention, x = build(kind).double(), torch.randn(1, 2, 16, dtype=torch.float64)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return attention(x).square().sum()

    hessian = torch.func.hessian(loss)(x).flatten(0, 2).flatten(1)
    with sdpa_kernel(SDPBackend.MATH):
        leaf = x.clone().requires_grad_()
        gradient = torch.autograd.grad(loss(leaf), leaf, create_graph=True)[0].flatten()
        rows = [torch.autograd.grad(each, leaf, retain_graph=True)[0].flatten() for each in gradient]
    torch.testing.assert_close(hessian, torch.stack(rows), atol=1e-7, rtol=1e-6)
    leaf = x.clone().requires_grad_()
    gradient = torch.autograd.grad(loss(leaf), leaf, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"no second derivatives; the call must be within .*SDPBackend.MATH"):
        gradient.sum().backward()
