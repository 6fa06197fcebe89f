"""Padding changes nothing at real tokens, wherever it stands, whatever stands in it, in one call or in many."""

import pytest
import torch
from reference.comparing import redraw
from torch import Tensor

from moesaic.layers import Attention, RotaryEmbedding

DIM, LENGTH = 8, 11
LAYOUTS = {
    "left": "..xxxxxxxxx",
    "left, more than the width": "......xxxxx",
    "right": "xxxxxxxxx..",
    "right, long": "xxx........",
    "both": "...xxxxx...",
    "holes": "x.xx...xx.x",
    "holes after the left": "..x.xxx..xx",
    "one token": "..........x",
}
PIECES = {"at once": [LENGTH], "two pieces": [4, 7], "one by one": [1] * LENGTH, "then decoding": [8, 1, 1, 1]}
WIDTHS, CHUNKS = (0, 2, 3), (None, 4)


def build(width: int, chunk: int | None, rotary: bool = True) -> Attention:
    torch.manual_seed(0)
    layer = Attention(
        DIM,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        rotary=RotaryEmbedding(4) if rotary else None,
        qk_norm=True,
        attention_chunk_size=chunk,
        bias=True,
        conv_width=width,
        dtype=torch.float64,
    )
    return redraw(layer)  # type: ignore[return-value]


def mask_of(layout: str) -> Tensor:
    return torch.tensor([[each == "x" for each in layout]])


def in_pieces(layer: Attention, x: Tensor, mask: Tensor, pieces: list[int]) -> Tensor:
    cache, outputs, end = layer.make_cache(), [], 0
    for piece in pieces:
        begin, end = end, end + piece
        outputs.append(layer(x[:, begin:end], cache, mask[:, :end]))
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("width", WIDTHS)
def test_what_stands_in_padding_does_not_matter(width: int, chunk: int | None) -> None:
    """Rows of all layouts are one batch, so that their tails differ."""
    layer = build(width, chunk)
    mask = torch.cat([mask_of(layout) for layout in LAYOUTS.values()])
    x = torch.randn(len(LAYOUTS), LENGTH, DIM, dtype=torch.float64)
    expected = layer(x.masked_fill(~mask[:, :, None], 0), attention_mask=mask)[mask]
    assert expected.isfinite().all()
    for content in (1.0, 1e30, float("inf"), float("nan")):
        filled = x.masked_fill(~mask[:, :, None], content)
        for name, pieces in PIECES.items():
            found = in_pieces(layer, filled, mask, pieces)[mask]
            torch.testing.assert_close(found, expected, atol=1e-9, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
        found = layer(filled, attention_mask=mask)[mask]
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("layout", ["left", "left, more than the width", "right", "right, long", "both"])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("width", WIDTHS)
def test_real_tokens_are_as_alone(width: int, chunk: int | None, layout: str) -> None:
    layer, mask = build(width, chunk), mask_of(LAYOUTS[layout])
    x = torch.randn(1, LENGTH, DIM, dtype=torch.float64)
    expected = layer(x[mask][None])
    for pieces in (None, *PIECES.values()):
        found = layer(x, attention_mask=mask) if pieces is None else in_pieces(layer, x, mask, pieces)
        torch.testing.assert_close(found[mask][None], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", WIDTHS)
def test_without_positions_holes_are_as_if_they_were_not_there(width: int, layout: str) -> None:
    """The convolution and its cached tail hold each row's last real tokens."""
    layer, mask = build(width, None, rotary=False), mask_of(LAYOUTS[layout])
    x = torch.randn(1, LENGTH, DIM, dtype=torch.float64)
    expected = layer(x[mask][None])
    for pieces in (None, *PIECES.values()):
        found = layer(x, attention_mask=mask) if pieces is None else in_pieces(layer, x, mask, pieces)
        torch.testing.assert_close(found[mask][None], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("width", WIDTHS)
def test_gradients_are_as_alone(width: int) -> None:
    layer, mask = build(width, 4), mask_of(LAYOUTS["both"])
    x = torch.randn(1, LENGTH, DIM, dtype=torch.float64)
    gradients = []
    for forward in (lambda: layer(x[mask][None])[0], lambda: layer(1e6 * x * ~mask[0, :, None] + x, None, mask)[mask]):
        layer.zero_grad()
        forward().square().sum().backward()
        gradients.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
