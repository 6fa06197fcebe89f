"""Padding changes nothing at real tokens, wherever it stands, whatever stands in it, in one call or in many."""

import pytest
import torch
from reference.comparing import redraw
from torch import Tensor, nn

from moesaic.layers import Attention, RotaryEmbedding, ShortConvolution
from moesaic.losses import load_balance_loss, router_z_loss
from moesaic.models import AttentionConfig, Decoder, DecoderConfig, MoEConfig, build_decoder

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
CONTENTS = (0.0, 1e30, float("inf"), float("nan"))


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
    for content in CONTENTS:
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


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("width", WIDTHS)
def test_gradients_are_as_alone(width: int, content: float) -> None:
    layer, mask = build(width, 4), mask_of(LAYOUTS["both"])
    x = torch.randn(1, LENGTH, DIM, dtype=torch.float64)
    filled = x.masked_fill(~mask[:, :, None], content).requires_grad_()
    gradients = []
    for forward in (lambda: layer(x[mask][None])[0], lambda: layer(filled, None, mask)[mask]):
        layer.zero_grad()
        forward().square().sum().backward()
        gradients.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert filled.grad is not None
    assert filled.grad[mask].abs().min() > 0
    assert not filled.grad[~mask].any()


def test_a_short_convolution_alone_hides_padding_from_its_gradients() -> None:
    convolution, mask = redraw(ShortConvolution(2, 3)), mask_of(LAYOUTS["holes"])
    found = []
    for content in (0.0, float("nan")):
        x = torch.ones(1, LENGTH, 2).masked_fill(~mask[:, :, None], content).requires_grad_()
        y, _ = convolution(x, mask=mask)
        found.append((y[mask], *torch.autograd.grad(y[mask].square().sum(), [x, *convolution.parameters()])))
    torch.testing.assert_close(found[1], found[0], atol=0, rtol=0)


class Spoiling(nn.Module):
    """A mixer that hides padding, as it must, and leaves nan there."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor, cache: None = None, attention_mask: Tensor | None = None) -> Tensor:
        y = self.weight * x
        return y if attention_mask is None else y.masked_fill(~attention_mask[:, :, None], float("nan"))


def decoder(tokens: bool) -> Decoder:
    config = DecoderConfig(
        vocab_size=16,
        dim=DIM,
        num_layers=4,
        hidden_dim=8,
        interleave_moe_layer_step=2,
        nope_layer_interval=4,
        norm_eps=1e-12,
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, attention_chunk_size=4, qk_norm=True, conv_width=3),
        moe=MoEConfig(num_experts=3, hidden_dim=8, top_k=2),
    )
    torch.manual_seed(0)
    model = redraw(build_decoder(config, checkpoint_activations=tokens))
    model.layers[2].mixer = Spoiling()
    return model  # type: ignore[return-value]


@pytest.mark.parametrize("tokens", [False, True], ids=["embeddings", "tokens"])
def test_what_stands_in_padding_reaches_no_gradient_of_a_decoder(tokens: bool) -> None:
    """Through attention, convolution, mixture, norms and a mixer of somebody else."""
    mask = torch.cat([mask_of(layout) for layout in LAYOUTS.values()])
    ids = torch.randint(1, 16, mask.shape).masked_fill(~mask, 0)
    found = []
    for content in CONTENTS:
        model = decoder(tokens)
        with torch.no_grad():
            model.embedding.weight[0] = content
        embeddings = model.embed(ids).detach().requires_grad_()
        given = {"tokens": ids} if tokens else {"embeddings": embeddings}
        hidden, routing = model.hidden_states(attention_mask=mask, **given)
        loss = hidden[mask].square().sum()
        for decided in routing.values():
            loss = loss + load_balance_loss(decided.logits, decided.expert_ids, mask.flatten())
            loss = loss + router_z_loss(decided.logits, mask.flatten())
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert len(gradients) > 20
        if not tokens:
            gradients["input"] = embeddings.grad
        found.append((hidden[mask].detach(), gradients))
    for hidden, gradients in found[1:]:
        torch.testing.assert_close(hidden, found[0][0], atol=0, rtol=0)
        torch.testing.assert_close(gradients, found[0][1], atol=0, rtol=0)
    assert all(gradient.isfinite().all() for gradient in found[0][1].values())
