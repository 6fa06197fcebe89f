"""Patches, pixel shuffle, RoPE in two dimensions and the vision transformer, each option for itself."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference.comparing import assert_close, assert_gradients, redraw, run_with_gradients
from torch import Tensor

from moesaic.layers import (
    Parametrization,
    PixelShuffleAdapter,
    RotaryEmbedding2d,
    VisionAttention,
    VisionEncoder,
    VisionTransformer,
    parameter_kinds,
    pixel_shuffle,
    to_patches,
)
from moesaic.layers.part import initialize


def transformer(**changes: Any) -> VisionTransformer:
    sizes: dict[str, Any] = {
        "patch_size": 2,
        "dim": 16,
        "num_layers": 2,
        "num_heads": 2,
        "hidden_dim": 24,
        "learned_grid": (3, 3),
    }
    model = VisionTransformer(**{**sizes, **changes})
    redraw(model)
    return model.eval()


FREE: dict[str, Any] = {"learned_grid": None}
OPTIONS: dict[str, dict[str, Any]] = {
    "as Llama 4": {},
    "without class token": {"class_token": False},
    "without learned positions": FREE,
    "without RoPE": {"rope_theta": None},
    "one channel": {"num_channels": 1},
    "nothing": {"class_token": False, "rope_theta": None, **FREE},
}
PLAIN = OPTIONS["nothing"]


def test_patches_are_those_of_an_unfold() -> None:
    images = torch.randn(2, 3, 6, 4)
    expected = F.unfold(images, 2, stride=2).transpose(1, 2)
    assert torch.equal(to_patches(images, 2).flatten(1, 2), expected)


def test_pixel_shuffle_by_hand() -> None:
    x = torch.arange(8.0).view(1, 2, 4, 1)  # two squares side by side
    assert pixel_shuffle(x, 2).tolist() == [[[[0, 1, 4, 5], [2, 3, 6, 7]]]]
    assert torch.equal(pixel_shuffle(x, 1), x)


def test_adapter_by_hand() -> None:
    adapter = PixelShuffleAdapter(1, 4, factor=2)
    with torch.no_grad():
        adapter.up_proj.weight.copy_(torch.eye(4))
        adapter.down_proj.weight.copy_(2 * torch.eye(4))
    x = torch.randn(1, 2, 4, 1)
    expected = F.gelu(2 * F.gelu(pixel_shuffle(x, 2).flatten(1, 2)))
    torch.testing.assert_close(adapter(x), expected)


def test_rope_sees_differences_of_rows_and_of_columns_alone() -> None:
    rope = RotaryEmbedding2d(8, theta=50.0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).unbind()

    def score(*places: int) -> float:
        """(row, column) of the query, then of the key."""
        at = [torch.tensor([place]) for place in places]
        return float((rope(q, at[0], at[1]) * rope(k, at[2], at[3])).sum())

    assert score(5, 2, 3, 1) == pytest.approx(score(9, 7, 7, 6))
    assert score(5, 2, 3, 1) != pytest.approx(score(2, 5, 1, 3))
    assert score(0, 0, 0, 0) == pytest.approx(float((q * k).sum()))
    one = torch.tensor([1])
    turned = rope(q, 0 * one, one)
    assert torch.equal(turned[..., 4:], q[..., 4:]), "the row turns the second half"
    assert not torch.isclose(turned[..., :4], q[..., :4]).all()


def test_attention_sees_all_patches_and_equals_the_formula() -> None:
    attention: Any = redraw(VisionAttention(8, num_heads=2, dtype=torch.float64))
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    nowhere = torch.zeros(5, dtype=torch.int64)
    heads = [part(x).view(1, 5, 2, 4) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
    weights = (torch.einsum("blnh,bsnh->bnls", heads[0], heads[1]) / 2).softmax(dim=-1)
    expected = attention.o_proj(torch.einsum("bnls,bsnh->blnh", weights, heads[2]).reshape(1, 5, 8))
    assert_close(attention(x, nowhere, nowhere), expected, 1e-12, "attention")


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_gives_features_and_gradients_to_all_parameters(name: str) -> None:
    model = transformer(**OPTIONS[name])
    y, gradients = run_with_gradients(lambda: model(torch.randn(2, model.num_channels, 6, 6)), model)
    assert y.shape == (2, 3, 3, 16)
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
    assert ("class_embedding" in gradients) == OPTIONS[name].get("class_token", True)
    assert ("position_embedding" in gradients) == ("learned_grid" not in OPTIONS[name])


def shuffled_pictures(model: VisionTransformer) -> tuple[Tensor, Tensor]:
    """Features of a picture with two patches exchanged, and those of the picture, exchanged afterwards."""
    image = torch.randn(1, 3, 2, 6)
    exchanged = torch.cat((image[..., 4:], image[..., 2:4], image[..., :2]), dim=3)
    with torch.no_grad():
        return model(exchanged), model(image).flip(2)


def test_only_positions_know_where_a_patch_is() -> None:
    without, expected = shuffled_pictures(transformer(**PLAIN))
    assert_close(without, expected, 1e-5, "features")
    for found, other in map(
        shuffled_pictures, (transformer(**FREE), transformer(learned_grid=(1, 3), rope_theta=None))
    ):
        assert (found - other).abs().max() > 1e-2


@pytest.mark.parametrize("size", [(2, 2), (2, 8), (10, 4), (6, 6)], ids=str)
def test_pictures_of_any_size_that_divides(size: tuple[int, int]) -> None:
    model = VisionEncoder(transformer(**FREE), PixelShuffleAdapter(16, 12, factor=1))
    images = torch.randn(3, 3, *size)
    with torch.no_grad():
        together = model(images)
        assert together.shape == (3, size[0] * size[1] // 4, 12)
        for image, found in zip(images, together, strict=True):
            assert_close(found, model(image[None])[0], 1e-5, "a picture alone")


def test_the_class_token_is_seen_and_not_returned() -> None:
    model = transformer()
    image = torch.randn(1, 3, 6, 6)
    with torch.no_grad():
        before = model(image)
        assert model.class_embedding is not None
        model.class_embedding.normal_()
        after = model(image)
    assert before.shape == after.shape == (1, 3, 3, 16)
    assert (before - after).abs().max() > 1e-3


def test_activation_checkpointing_changes_nothing() -> None:
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        model = transformer(checkpoint_activations=checkpointed).train()
        results.append(run_with_gradients(lambda model=model: model(torch.ones(1, 3, 6, 6)), model))
    assert_close(results[1][0], results[0][0], 0, "features")
    assert_gradients(results[1][1], results[0][1], 1e-6)


def test_kinds_and_draws() -> None:
    model = transformer()
    kinds = parameter_kinds(model)
    assert kinds["patch_embedding.weight"] == kinds["position_embedding"] == "embedding"
    assert kinds["class_embedding"] == kinds["layers.0.mixer.q_proj.bias"] == kinds["norm_after.weight"] == "vector"
    assert kinds["layers.1.ffn.up_proj.weight"] == "matrix"
    wide = VisionTransformer(patch_size=8, dim=256, num_layers=1, num_heads=4, hidden_dim=64, learned_grid=(4, 4))
    initialize(wide, Parametrization(0.02))
    spread = {name: p.std().item() for name, p in wide.named_parameters() if p.dim() == 2}
    assert spread.pop("position_embedding") == pytest.approx(1 / 16, rel=0.1)
    assert all(std == pytest.approx(0.02, rel=0.1) for std in spread.values())
    assert not wide.get_parameter("layers.0.ffn.up_proj.bias").any()


def test_bf16_and_the_meta_device() -> None:
    model = transformer()
    image = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        exact = model(image)
        rounded = model.to(torch.bfloat16)(image.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() < 0.05 * exact.norm()
    meta = VisionTransformer(patch_size=2, dim=8, num_layers=1, num_heads=2, hidden_dim=8, device="meta")
    assert meta(torch.empty(5, 3, 4, 8, device="meta")).shape == (5, 2, 4, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "num_heads=3: must divide dim=16"),
        ({"num_heads": 8}, "head_dim=2: must be a multiple of 4"),
        ({"patch_size": 0}, "patch_size=0: must be a number >= 1"),
        ({"hidden_dim": 1.5}, "hidden_dim=1.5: must be an integer"),
        ({"class_token": 1}, "class_token=1: must be True or False"),
        ({"learned_grid": (3, 0)}, r"learned_grid\[1\]=0: must be a number >= 1"),
        ({"rope_theta": -1.0}, "theta=-1.0: must be a number > 0"),
    ],
)
def test_arguments_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        transformer(**changes)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 6, 7), "6 x 7 pixels: both sides must be multiples of patch_size=2"),
        (torch.zeros(1, 3, 0, 6), "0 x 6 pixels: both sides"),
        (torch.zeros(1, 3, 4, 6), "4 x 6 pixels: must be of 6 x 6, for which positions were learned"),
        (torch.zeros(1, 1, 6, 6), "images of 1 channels: must have num_channels=3"),
        (torch.zeros(3, 6, 6), r"images of shape \(3, 6, 6\)"),
        (torch.zeros(1, 3, 6, 6, dtype=torch.uint8), "images of torch.uint8; must be a floating-point tensor"),
        (torch.zeros(1, 3, 6, 6, dtype=torch.float64), "x of torch.float64; must be torch.float32"),
        ("picture.png", "images of type str"),
    ],
)
def test_pictures_are_refused_by_name(images: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        transformer()(images)


def test_patches_that_do_not_fill_squares_are_refused() -> None:
    with pytest.raises(ValueError, match="x of 3 x 4 patches: both must be multiples of factor=2"):
        pixel_shuffle(torch.zeros(1, 3, 4, 8), 2)
