"""A decoder that sees pictures: where embeddings go, caches, generation, tiles, and what is refused."""

import dataclasses
from typing import Any

import pytest
import torch
from reference.comparing import assert_close, assert_gradients, gradients, redraw
from torch import Tensor, nn

from moesaic.config import from_mapping, to_mapping
from moesaic.errors import InputError
from moesaic.layers import AttentionTemperature, parameter_kinds
from moesaic.models import (
    DecoderConfig,
    MultimodalConfig,
    MultimodalDecoder,
    TileTokens,
    VisionConfig,
    account,
    build_decoder,
    build_multimodal,
    generate,
    llama4_maverick,
    llama4_scout,
    llama4_toy,
    llama4_vision,
    split_into_tiles,
    tile_grid,
)
from moesaic.models.config import BaseShape

IMAGE = 30
TINY: dict[str, Any] = {"patch_size": 2, "dim": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": 12, "output_dim": 6}


def config(text: dict[str, Any] | None = None, **vision: Any) -> MultimodalConfig:
    """Pictures of 4 x 4 pixels, 4 tokens each, and of any size unless the changes say otherwise."""
    sizes = {"image_size": 4, "pixel_shuffle": 1, "learned_positions": False, **TINY, **vision}
    toy = llama4_toy(vocab_size=31, num_layers=4, dim=16, hidden_dim=24)
    attention = dataclasses.replace(
        toy.attention, attention_chunk_size=4, temperature=AttentionTemperature(attn_scale=0.5, floor_scale=3)
    )
    return MultimodalConfig(dataclasses.replace(toy, attention=attention, **(text or {})), VisionConfig(**sizes), IMAGE)


def model_of(given: MultimodalConfig | None = None, **changes: Any) -> MultimodalDecoder:
    model = build_multimodal(given or config(), **changes)
    redraw(model)
    return model.eval()


def tokens_with(*lengths: tuple[int, ...], length: int = 13) -> Tensor:
    """Text with runs of image tokens of these lengths in each row, one text token before each."""
    tokens = torch.randint(IMAGE, (len(lengths), length))
    for row, runs in enumerate(lengths):
        start = 1
        for run in runs:
            tokens[row, start : start + run] = IMAGE
            start += run + 1
    return tokens


def pictures(*sizes: tuple[int, int]) -> list[Tensor]:
    return [torch.randn(3, *size) for size in sizes]


# ---- what comes from pictures


def test_text_alone_has_the_bits_of_the_decoder() -> None:
    model, tokens = model_of(), tokens_with((), ())
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    nothing: list[Any] = [None, [], torch.zeros(0, 3, 4, 4)]
    for given in (None, mask):
        expected = model.decoder(tokens, attention_mask=given)
        for images in nothing:
            found = model(tokens, attention_mask=given, images=images, image_rows=None if images is None else [])
            assert torch.equal(found.logits, expected.logits)
            assert found.routing.keys() == expected.routing.keys()


def test_a_seed_draws_the_decoder_that_it_draws_without_an_encoder() -> None:
    torch.manual_seed(3)
    whole = build_multimodal(config())
    torch.manual_seed(3)
    alone = build_decoder(config().text)
    assert all(torch.equal(p, whole.decoder.get_parameter(name)) for name, p in alone.named_parameters())
    drawn = [p for name, p in whole.named_parameters() if name.endswith("proj.weight") and "vision" in name]
    assert all(p.std() < 0.03 for p in [*drawn, whole.get_parameter("projector.weight")])
    kinds = parameter_kinds(whole)
    assert kinds["projector.weight"] == kinds["vision.adapter.up_proj.weight"] == "matrix"
    assert (
        kinds["decoder.head.weight"] == "output" and kinds["vision.transformer.patch_embedding.weight"] == "embedding"
    )


def test_embeddings_of_pictures_stand_at_their_image_tokens() -> None:
    model, tokens = model_of(), tokens_with((4, 2), (8,))
    images = pictures((4, 4), (2, 4), (4, 8))
    found = model.embed(tokens, images=images)
    for row, start, image in ((0, 1, images[0]), (0, 6, images[1]), (1, 1, images[2])):
        expected = model.projector(model.vision(image[None]))[0]
        assert_close(found[row, start : start + len(expected)], expected, 1e-6, f"row {row} from {start}")
    text = tokens != IMAGE
    assert torch.equal(found[text], model.decoder.embed(tokens)[text])


def test_rows_may_be_given_in_any_order() -> None:
    model, tokens = model_of(), tokens_with((4, 2), (8,))
    images = pictures((4, 4), (2, 4), (4, 8))
    expected = model(tokens, images=images).logits
    assert torch.equal(model(tokens, images=images, image_rows=torch.tensor([0, 0, 1])).logits, expected)
    moved = [images[2], images[0], images[1]]
    assert_close(model(tokens, images=moved, image_rows=[1, 0, 0]).logits, expected, 1e-6, "logits")
    assert (model(tokens, images=[images[1], images[0], images[2]]).logits - expected).abs().max() > 1e-2


def test_one_tensor_is_the_list_of_its_pictures() -> None:
    model, tokens, images = model_of(), tokens_with((4, 4), (4,)), torch.randn(3, 3, 4, 4)
    assert_close(model(tokens, images=images).logits, model(tokens, images=list(images)).logits, 1e-6, "logits")


def test_gradients_reach_all_parts_and_equal_those_of_one_row_at_a_time() -> None:
    model, tokens = model_of(dtype=torch.float64), tokens_with((4, 2), (8,), ())
    images = [image.double() for image in pictures((4, 4), (2, 4), (4, 8))]
    weights = torch.randn(3, 13, 31, dtype=torch.float64)
    (model(tokens, images=images).logits * weights).sum().backward()
    together = gradients(model)
    assert all(gradient is not None and gradient.any() for name, gradient in together.items() if "expert" not in name)
    embedding = together["decoder.embedding.weight"]
    assert embedding is not None and not embedding[IMAGE].any()
    model.zero_grad()
    for row, of_row in enumerate((images[:2], images[2:], None)):
        (model(tokens[row : row + 1], images=of_row).logits * weights[row]).sum().backward()
    assert_gradients(gradients(model), together, 1e-9)


def test_activation_checkpointing_changes_nothing() -> None:
    tokens, images, results = tokens_with((4,), (4,)), torch.randn(2, 3, 4, 4), []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        model = model_of(checkpoint_activations=checkpointed).train()
        model(tokens, images=images).logits.square().sum().backward()
        results.append(gradients(model))
    assert_gradients(results[1], results[0], 1e-6)


# ---- caches and generation


@pytest.mark.slow_but_for("[1, 4, 1, 7]-left padding", "[7, 6]-]")
@pytest.mark.parametrize("padded", [False, True], ids=["", "left padding"])
@pytest.mark.parametrize("pieces", [[7, 6], [6, 1, 1, 1, 1, 1, 1, 1], [1, 4, 1, 7]], ids=str)
def test_cached_equals_uncached(pieces: list[int], padded: bool) -> None:
    """Pictures are given with the piece that their tokens are in."""
    model, tokens, image = model_of(), tokens_with((4,), (4,)), torch.randn(2, 3, 4, 4)
    mask = torch.ones_like(tokens)
    mask[1, 0] = 0
    given = mask if padded else None
    with torch.no_grad():
        expected = model(tokens, attention_mask=given, images=image).logits
        cache, start, found = model.make_cache(), 0, []
        for length in pieces:
            piece, seen = tokens[:, start : start + length], None if given is None else mask[:, : start + length]
            images = image if bool((piece == IMAGE).any()) else None
            found.append(model(piece, cache, seen, images=images).logits)
            start += length
    real = mask[:, :, None] if padded else 1
    assert_close(torch.cat(found, dim=1) * real, expected * real, 2e-5, "logits")


def test_generation_after_a_picture() -> None:
    model, tokens, images = model_of(), tokens_with((4,), (4,), length=6), torch.randn(2, 3, 4, 4)
    greedy: dict[str, Any] = {"temperature": 0.0, "images": images}
    found = generate(model, tokens, 8, **greedy)
    assert torch.equal(generate(model, tokens, 8, use_cache=False, **greedy), found)
    again = tokens
    for _ in range(8):
        with torch.no_grad():
            logits = model(again, images=images).logits[:, -1]
        again = torch.cat((again, logits[:, :IMAGE].argmax(dim=-1, keepdim=True)), dim=1)
    assert torch.equal(found, again)
    swapped = generate(model, tokens, 8, temperature=0.0, images=images, image_rows=[1, 0])
    assert not torch.equal(swapped, found), "the pictures say nothing"


@pytest.mark.slow
def test_an_image_token_is_never_drawn() -> None:
    model, tokens = model_of(), tokens_with((), length=3)
    with torch.no_grad():
        model.decoder.head.weight[IMAGE] = 100 * model.decoder.hidden_states(tokens)[0][0, -1]
        assert model(tokens).logits[0, -1].argmax() == IMAGE
    for use_cache in (False, True):
        assert not bool((generate(model, tokens, 20, use_cache=use_cache) == IMAGE).any())
    with pytest.raises(InputError, match="images: a decoder without an encoder"):
        generate(model.decoder, tokens, 1, images=torch.randn(1, 3, 4, 4))


# ---- bad input


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"tokens has 8 image tokens \(id 30\); must be none without images"),
        ({"images": torch.zeros(1, 3, 4, 4)}, "tokens has 8 image tokens .*; must be 4, as many as its images have"),
        ({"images": torch.zeros(3, 3, 4, 4)}, "must be 12"),
        ({"images": torch.zeros(2, 3, 4, 4), "image_rows": [0, 1]}, "row 0 of tokens has 8 .*; must be 4"),
        ({"images": torch.zeros(2, 3, 4, 4), "image_rows": [0]}, r"image_rows of shape \(1,\); must be \(2\)"),
        ({"images": torch.zeros(2, 3, 4, 4), "image_rows": [0, 2]}, "image_rows has 2; must be 0 to 1"),
        ({"images": torch.zeros(2, 3, 4, 4), "image_rows": torch.zeros(2)}, "image_rows of torch.float32"),
        ({"images": torch.zeros(2, 3, 4, 5)}, "4 x 5 pixels: both sides must be multiples of patch_size=2"),
        ({"images": torch.zeros(2, 4, 4)}, r"images of shape \(2, 4, 4\)"),
        ({"images": torch.zeros(2, 1, 4, 4)}, "images of 1 channels"),
        ({"images": [torch.zeros(3, 4, 4), torch.zeros(3, 4)]}, r"images\[1\] of shape \(3, 4\)"),
        ({"images": [torch.zeros(3, 4, 4), "x.png"]}, r"images\[1\] of type str"),
        ({"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, "of torch.uint8; must be a floating-point"),
    ],
)
def test_pictures_that_do_not_fit_the_tokens_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        model_of()(tokens_with((4, 4), ()), **given)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vision.image_size", 6, "image_size=6: must be a multiple of patch_size x pixel_shuffle = 4"),
        ("vision.image_size", [4, 4], "vision.image_size"),
        ("vision.patch_size", 0, "patch_size=0: must be a number > 0"),
        ("vision.num_heads", 3, "num_heads=3: must divide dim=8"),
        ("vision.num_heads", 4, "dim / num_heads = 2 must be a multiple of 4"),
        ("vision.rope_theta", 0.5, "rope_theta=0.5: must be a number from 1"),
        ("vision.num_layers", 2000, "must be a number that is at most 1024"),
        ("vision.norm_eps", 1e-5, "vision.norm_eps: unknown key"),
        ("image_token", 31, "image_token=31: must be a token id below text.vocab_size=31"),
        ("image_token", -1, "image_token=-1: must be"),
        ("text.padding_token", IMAGE, "image_token=30: must differ from text.padding_token"),
    ],
)
def test_configs_are_refused_by_name(key: str, value: Any, message: str) -> None:
    mapping = to_mapping(config(pixel_shuffle=2))
    assert from_mapping(MultimodalConfig, mapping) == config(pixel_shuffle=2)
    *path, name = key.split(".")
    place = mapping
    for each in path:
        place = place[each]
    place[name] = value
    with pytest.raises(InputError, match=message):
        from_mapping(MultimodalConfig, mapping)


def test_models_that_cannot_be_right_are_refused() -> None:
    transfer = {"parametrization": "transfer", "base": BaseShape(16, 4)}
    with pytest.raises(ValueError, match="parametrization='transfer': must be standard or scaled_logits"):
        config(transfer)
    text = config().text
    assert text.moe is not None
    hashed = dataclasses.replace(text, moe=dataclasses.replace(text.moe, router="hash"))
    with pytest.raises(InputError, match="layer 1: its router asks for token ids"):
        build_multimodal(dataclasses.replace(config(), text=hashed))
    with pytest.raises(ValueError, match="image_token=31: must be a token id below 31"):
        MultimodalDecoder(build_decoder(text), nn.Identity(), nn.Identity(), image_token=31)


def test_the_config_counts_the_tokens_of_a_picture() -> None:
    vision = config(image_size=12, pixel_shuffle=3).vision
    assert vision.num_tokens() == 4
    assert vision.num_tokens(6, 18) == 3
    with pytest.raises(ValueError, match="a picture of 6 x 8 pixels: both must be multiples of 6"):
        vision.num_tokens(6, 8)
    with pytest.raises(ValueError, match="both must be image_size=12 with learned_positions=true"):
        dataclasses.replace(vision, learned_positions=True).num_tokens(6, 12)
    model = build_multimodal(config(image_size=12, pixel_shuffle=3), device="meta")
    assert model.vision(torch.empty(2, 3, 6, 18, device="meta")).shape == (2, 3, 6)


# ---- published models


@pytest.mark.slow_but_for("scout")
@pytest.mark.parametrize(
    ("text", "total", "active"),
    [(llama4_scout(), 108_641_793_536, 17_172_894_720), (llama4_maverick(), 401_583_781_376, 17_184_691_200)],
    ids=["scout", "maverick"],
)
def test_published_models_with_vision(text: DecoderConfig, total: int, active: int) -> None:
    """Published are 109B and 400B in all, 17B active. Both totals are those of transformers' model as well."""
    model = build_multimodal(llama4_vision(text), device="meta")
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in model.vision.parameters()) == 850_960_896
    assert account(text, 8192).active_parameters == active
    assert llama4_vision(text).vision.num_tokens() == 144


# ---- tiles


def test_grids_are_those_that_fit_best() -> None:
    grids = {(10, 10): (1, 1), (4, 4): (1, 1), (20, 10): (2, 1), (10, 31): (1, 4), (35, 25): (2, 2), (900, 10): (4, 1)}
    assert {size: tile_grid(*size, 10, max_tiles=4) for size in grids} == grids
    assert tile_grid(500, 40, 10, max_tiles=1) == (1, 1)


def test_tiles_put_together_are_the_picture_and_the_last_is_the_whole() -> None:
    image = torch.randint(256, (3, 8, 16), dtype=torch.uint8)
    tiles, grid = split_into_tiles(image, 8, max_tiles=4)
    assert grid == (1, 2) and tiles.shape == (3, 3, 8, 8) and tiles.dtype == torch.float32
    together = torch.cat((tiles[0], tiles[1]), dim=2)
    assert_close(together, image.float() / 127.5 - 1, 8e-3, "pixels in bf16")
    assert torch.equal(together, together.bfloat16().float())
    assert_close(tiles[2].mean(), together.mean(), 0.02, "the whole picture")


def test_small_pictures_are_padded_and_enlarged_to_one_tile_at_most() -> None:
    white = torch.full((1, 4, 8), 255, dtype=torch.uint8)
    tiles, grid = split_into_tiles(white, 8)
    assert grid == (1, 1)
    assert (tiles[0, 0, :4] == 1).all() and (tiles[0, 0, 4:] == -1).all()
    tall, grid = split_into_tiles(torch.full((1, 2, 1), 255, dtype=torch.uint8), 8)
    assert grid == (1, 1) and (tall[0, 0, :, :4] == 1).all() and (tall[0, 0, :, 4:] == -1).all()


def test_tokens_around_tiles() -> None:
    ids = TileTokens(image_start=1, patch=IMAGE, tile_x_separator=2, tile_y_separator=3, image=4, image_end=5)
    assert ids.of_picture((1, 1), 2) == [1, 4, 30, 30, 5]
    assert ids.of_picture((2, 2), 1) == [1, 30, 2, 30, 3, 30, 2, 30, 3, 4, 30, 5]


def test_a_tiled_picture_goes_through_the_model() -> None:
    model = model_of(config(image_size=8, pixel_shuffle=2, learned_positions=True))
    tiles, grid = split_into_tiles(torch.randint(256, (3, 16, 16), dtype=torch.uint8), 8, max_tiles=4)
    ids = TileTokens(1, IMAGE, 2, 3, 4, 5).of_picture(grid, config(image_size=8, pixel_shuffle=2).vision.num_tokens())
    assert grid == (2, 2) and len(tiles) == 5
    logits = model(torch.tensor([ids]), images=tiles).logits
    assert logits.shape == (1, len(ids), 31) and bool(logits.isfinite().all())


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 0, 4, dtype=torch.uint8), "height=0: must be a number >= 1"),
        (torch.zeros(3, 4, 4), "image of torch.float32; must be torch.uint8"),
        (torch.zeros(4, 4, dtype=torch.uint8), r"image of shape \(4, 4\)"),
    ],
)
def test_pictures_that_cannot_be_tiled_are_refused(image: Tensor, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        split_into_tiles(image, 8)
