"""Llama 4 whole, vision included: bit-equal both ways, and the same logits and gradients as transformers'."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from llama4_samples import SMALL
from reference.comparing import assert_close, assert_gradients, redraw
from safetensors.torch import load_file, save_file
from saved_weights import edit_config, save, weights
from torch import Tensor
from transformers import Llama4Config, Llama4ForConditionalGeneration

from moesaic.cli import convert
from moesaic.errors import InputError
from moesaic.interop import (
    accelerate,
    accelerated_blocks,
    check_hf,
    from_hf,
    gradients_to_hf,
    multimodal_from_hf,
    to_hf,
)
from moesaic.interop.__main__ import main
from moesaic.models import MultimodalDecoder, TileTokens, build_multimodal, generate

IMAGE = 60
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vision_output_dim": 12,
    "image_size": 8,
    "patch_size": 2,
    "projector_input_dim": 12,
    "projector_output_dim": 12,
}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "maverick": ({"use_qk_norm": False}, {}),
    "scout": ({"interleave_moe_layer_step": 1}, {}),
    "one token a picture": ({}, {"image_size": 4}),
    "every patch a token": ({}, {"pixel_shuffle_ratio": 1.0, "intermediate_size": 16, "image_size": 4}),
    "nine patches a token": ({}, {"pixel_shuffle_ratio": 1 / 3, "intermediate_size": 144, "image_size": 12}),
    "a quarter": ({}, {"pixel_shuffle_ratio": 0.25, "intermediate_size": 256}),
    "other sizes": (
        {"hidden_size": 40, "num_attention_heads": 2},
        {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 96, "num_hidden_layers": 1},
    ),
    "one head": ({}, {"num_attention_heads": 1}),
    "one channel": ({}, {"num_channels": 1}),
    "patches of one pixel": ({}, {"patch_size": 1, "image_size": 4}),
    "projector": ({}, {"vision_output_dim": 20, "projector_input_dim": 20, "projector_output_dim": 20}),
    "theta": ({}, {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}}),
    "all features": ({}, {"vision_feature_select_strategy": "full", "hidden_act": "relu", "norm_eps": 0.1}),
    "tied head": ({"tie_word_embeddings": True}, {}),
    "padding token": ({"pad_token_id": 3}, {}),
    "top 2, biases": ({"num_experts_per_tok": 2, "attention_bias": True}, {}),
}


def theirs_of(text: dict[str, Any], vision: dict[str, Any], **whole: Any) -> Any:
    """A `Llama4ForConditionalGeneration`, whose types promise less than it has."""
    config = Llama4Config(
        text_config={**SMALL, **text}, vision_config={**VISION, **vision}, **{"image_token_index": IMAGE, **whole}
    )
    return redraw(Llama4ForConditionalGeneration(config)).eval()


def tokens_per_picture(model: Any) -> int:
    vision = model.config.vision_config
    return round((vision.image_size / vision.patch_size * vision.pixel_shuffle_ratio) ** 2)


def inputs(model: Any, *pictures: int, batch: int = 2) -> tuple[Tensor, Tensor | None]:
    """Tokens with so many pictures in each row, and their pixels."""
    each, vision = tokens_per_picture(model), model.config.vision_config
    length = 5 + max(pictures, default=0) * (each + 1)
    tokens = torch.randint(4, IMAGE, (len(pictures) or batch, length))
    for row, number in enumerate(pictures):
        for i in range(number):
            end = length - 3 - i * (each + 1)
            tokens[row, end - each : end] = IMAGE
    pixels = torch.randn(sum(pictures), vision.num_channels, vision.image_size, vision.image_size)
    return tokens, pixels if len(pixels) else None


def left_padding(tokens: Tensor, *amounts: int) -> Tensor:
    return torch.stack([(torch.arange(tokens.size(1)) >= amount).long() for amount in amounts])


def assert_same_function(
    model: Any,
    ours: MultimodalDecoder,
    tokens: Tensor,
    pixels: Tensor | None,
    mask: Tensor | None = None,
) -> None:
    """Logits and every gradient."""
    expected = model(tokens, pixel_values=pixels, attention_mask=mask, use_cache=False).logits
    found = ours(tokens, attention_mask=mask, images=pixels).logits
    assert expected.std() > 0.3, "logits this small hide mistakes"
    upstream = torch.randn_like(expected) * (1 if mask is None else mask[:, :, None])
    assert_close(found * upstream.ne(0), expected * upstream.ne(0), 5e-5, "logits")
    for logits in (expected, found):
        (logits * upstream).sum().backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients = gradients_to_hf(ours)
    assert theirs.keys() <= gradients.keys() == dict(model.named_parameters()).keys()
    assert any(name.startswith("vision_model.") for name in theirs) == (pixels is not None)
    assert_gradients({name: gradients[name] for name in theirs}, theirs, 2e-4)
    assert not any(x.any() for name, x in gradients.items() if name not in theirs and x is not None)


@pytest.mark.slow_but_for("maverick", "nine patches")
@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_agree(name: str) -> None:
    model = theirs_of(*CASES[name])
    assert_same_function(model, multimodal_from_hf(model), *inputs(model, 1, 2))


@pytest.mark.slow_but_for("several")
@pytest.mark.parametrize("pictures", [(), (1, 0), (1, 1), (3, 2)], ids=["text only", "one", "one each", "several"])
def test_any_number_of_pictures_with_and_without_padding(pictures: tuple[int, ...]) -> None:
    text = {"num_hidden_layers": 2, "no_rope_layer_interval": 2}
    model = theirs_of(text, {"num_hidden_layers": 1, "image_size": 4})
    tokens, pixels = inputs(model, *pictures)
    for mask in (None, left_padding(tokens, 0, 2)):
        model.zero_grad()
        assert_same_function(model, multimodal_from_hf(model), tokens, pixels, mask)


def test_tiles_agree() -> None:
    """Two pictures, of 2 x 1 tiles and of one: the order of tiles is that of their tokens."""
    model = theirs_of({}, {"num_hidden_layers": 1})
    ids = TileTokens(image_start=1, patch=IMAGE, tile_x_separator=2, tile_y_separator=3, image=4, image_end=5)
    each = tokens_per_picture(model)
    tokens = torch.tensor([[7, *ids.of_picture((2, 1), each), 8, *ids.of_picture((1, 1), each), 9]])
    assert_same_function(model, multimodal_from_hf(model), tokens, torch.randn(4, 3, 8, 8))


def test_cached_generation_after_pictures_agrees() -> None:
    model = theirs_of({}, {"image_size": 4})
    ours = multimodal_from_hf(model)
    tokens, pixels = inputs(model, 2, 2)
    expected = model.generate(
        tokens, pixel_values=pixels, max_new_tokens=8, do_sample=False, suppress_tokens=[IMAGE], eos_token_id=None,
        attention_mask=torch.ones_like(tokens), pad_token_id=0,
    )  # fmt: skip
    assert pixels is not None
    assert torch.equal(generate(ours, tokens, 8, temperature=0.0, images=pixels), expected)


@pytest.mark.slow
def test_bf16_lies_within_their_own_spread() -> None:
    model, exact = theirs_of({}, {}), theirs_of({}, {})
    for p, wide in zip(model.parameters(), exact.parameters(), strict=True):
        p.data = p.data.bfloat16()  # .to() would round the frequencies, and take the imaginary part of those of patches
        wide.data = p.data.float()
    tokens, pixels = inputs(model, *[2] * 8)
    assert pixels is not None
    pixels = pixels.bfloat16()
    with torch.no_grad():
        reference = exact(tokens, pixel_values=pixels.float(), use_cache=False).logits
        theirs = model(tokens, pixel_values=pixels, use_cache=False).logits.float()
        ours = multimodal_from_hf(model)(tokens, images=pixels).logits.float()

    def distance(a: Tensor) -> float:
        return (a - reference).abs().median().item()

    assert 0 < distance(ours) <= 1.1 * distance(theirs)


def test_accelerated_blocks_compute_the_same_inside() -> None:
    model = theirs_of({"interleave_moe_layer_step": 1}, {"image_size": 4})
    tokens, pixels = inputs(model, 1, 2)
    ours = multimodal_from_hf(model)
    accelerate(model)
    assert len(accelerated_blocks(model)) == 4
    assert_same_function(model, ours, tokens, pixels)


# ---- files


def save_with(model: Any, directory: Path, **files: str) -> Path:
    save(model, directory)
    for name, text in files.items():
        (directory / f"{name}.json").write_text(text)
    return directory


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model's directory, which tests copy."""
    torch.manual_seed(0)
    return save_with(theirs_of({"num_hidden_layers": 1}, {}), tmp_path_factory.mktemp("saved") / "source")


@pytest.mark.slow_but_for("tied head")
@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_bit_equal_and_loads_in_transformers(name: str, tmp_path: Path) -> None:
    directory = save_with(theirs_of(*CASES[name]), tmp_path / "source", preprocessor_config='{"size": 8}')
    edit_config(directory, None, boi_token_index=58)
    report = check_hf(directory, with_vision=True)
    to_hf(multimodal_from_hf(directory), tmp_path / "copy", max_shard_bytes=20_000)
    found, expected = weights(tmp_path / "copy"), weights(directory)
    assert found.keys() == expected.keys() and report.tensors == len(expected) and not report.skipped
    assert report.vision is not None and report.vision.patch_size == CASES[name][1].get("patch_size", 2)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert (tmp_path / "copy/preprocessor_config.json").read_text() == '{"size": 8}'
    loaded: Any = Llama4ForConditionalGeneration.from_pretrained(tmp_path / "copy", output_loading_info=True)
    again, loading = loaded
    assert not any(loading.values())
    before, after = (json.loads((path / "config.json").read_text()) for path in (directory, tmp_path / "copy"))
    parts = ("text_config", "vision_config")
    for old, new in [*((before.pop(part), after.pop(part)) for part in parts), (before, after)]:
        old["tie_word_embeddings"] = new.get("tie_word_embeddings")  # above the text's it says nothing
        assert {key: new.get(key) for key in old} == old
    assert again.config.boi_token_index == 58


def test_a_model_of_ours_is_written_as_llama_4(tmp_path: Path) -> None:
    config = multimodal_from_hf(theirs_of({}, {})).config
    assert config is not None
    ours = build_multimodal(config)
    redraw(ours)
    to_hf(ours, tmp_path / "new", dtype=torch.bfloat16)
    again: Any = Llama4ForConditionalGeneration.from_pretrained(tmp_path / "new")
    assert again.dtype == torch.bfloat16 and again.config.image_token_index == IMAGE
    back = multimodal_from_hf(tmp_path / "new")
    assert all(torch.equal(p, ours.get_parameter(name).bfloat16()) for name, p in back.named_parameters())


def test_the_text_alone_is_read_as_before(tmp_path: Path) -> None:
    model = theirs_of({}, {})
    directory = save_with(model, tmp_path / "source")
    decoder, whole = from_hf(directory), multimodal_from_hf(directory)
    assert check_hf(directory).skipped == len([name for name in weights(directory) if "language" not in name])
    assert check_hf(directory).vision is None
    assert all(torch.equal(p, whole.decoder.get_parameter(name)) for name, p in decoder.named_parameters())
    assert json.loads(decoder.foreign_files["config.json"])["model_type"] == "llama4_text"


def test_nothing_is_shared_with_the_source() -> None:
    model = theirs_of({}, {})
    ours = multimodal_from_hf(model, checkpoint_activations=True, backend="loop")
    pointers = {p.data_ptr() for p in model.parameters()}
    assert not pointers & {p.data_ptr() for p in ours.parameters()}
    assert ours.config is not None and ours.config.text.moe is not None and ours.config.text.moe.backend == "loop"
    assert multimodal_from_hf(model, dtype=torch.float64).get_parameter("projector.weight").dtype == torch.float64


def test_the_entry_point_takes_pixels(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = Llama4ForConditionalGeneration.from_pretrained(saved)
    tokens, pixels = inputs(model, 1, 2)
    assert pixels is not None
    save_file({"input_ids": tokens, "pixel_values": pixels}, tmp_path / "in.safetensors")
    with torch.no_grad():
        expected = model(tokens, pixel_values=pixels, use_cache=False).logits
    arguments = ["logits", str(saved), str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors")]
    for prefill in ([], ["--prefill", str(tokens.size(1) - 2)]):
        main([*arguments, *prefill])
        assert_close(load_file(tmp_path / "out.safetensors")["logits"], expected, 2e-5, "logits")
    main(["roundtrip", "--with-vision", str(saved), str(tmp_path / "copy")])
    assert weights(tmp_path / "copy").keys() == weights(saved).keys()
    for wrong, message in ((pixels[:1], "must be 4, as many"), (pixels[0], "must be floating-point (tiles, channels")):
        save_file({"input_ids": tokens, "pixel_values": wrong.clone()}, tmp_path / "in.safetensors")
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_convert_takes_the_whole_model(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert.main([str(saved), str(tmp_path / "new"), "with_vision=true", "dtype=bfloat16"])
    assert "parameters with vision" in capsys.readouterr().out
    found, expected = weights(tmp_path / "new"), weights(saved)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in expected.items())
    convert.main([str(saved), "with_vision=true", "dry_run=true"])
    assert f"{len(expected)}, all accounted for" in capsys.readouterr().out
    convert.main([str(saved), str(tmp_path / "new.ckpt"), "with_vision=true"])
    convert.main([str(tmp_path / "new.ckpt"), str(tmp_path / "again"), "with_vision=true"])
    capsys.readouterr()
    convert.main([str(tmp_path / "new.ckpt"), "with_vision=true", "dry_run=true"])
    assert "Llama4ForConditionalGeneration" in capsys.readouterr().out
    found = weights(tmp_path / "again")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    for taken in ("new.ckpt", "other.ckpt"):
        with pytest.raises(SystemExit):
            convert.main([str(tmp_path / "new.ckpt"), str(tmp_path / taken), "with_vision=true"])
    told = capsys.readouterr().err
    assert "new.ckpt: exists already" in told and "new.ckpt: no directory of transformers" in told


@pytest.mark.slow_but_for("intermediate_size", "missing tensors", "image_token_index=61", "quantization")
@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("vision_config", {"intermediate_size": 48}, "intermediate_size=48: must be hidden_size / pixel_shuffle_ratio"),
        ("vision_config", {"projector_output_dim": 16}, "projector_output_dim=16: must be projector_input_dim=12"),
        ("vision_config", {"vision_output_dim": 16}, "vision_output_dim=16: must be projector_input_dim=12"),
        ("vision_config", {"projector_dropout": 0.1}, "projector_dropout=0.1: must be 0"),
        ("vision_config", {"attention_dropout": 0.1}, "attention_dropout=0.1: must be 0"),
        ("vision_config", {"pixel_shuffle_ratio": 0.4}, "pixel_shuffle_ratio=0.4: must be 1 / n"),
        ("vision_config", {"pixel_shuffle_ratio": 2.0}, "pixel_shuffle_ratio=2.0: must be 1 / n"),
        ("vision_config", {"image_size": 9}, "image_size=9: must be a multiple of"),
        ("vision_config", {"image_size": [8, 8]}, "vision_config.image_size"),
        ("vision_config", {"patch_size": 4, "image_size": 16}, "patch_embedding.linear.weight: found shape"),
        ("vision_config", {"num_attention_heads": 3}, "num_heads=3: must divide dim=16"),
        ("vision_config", {"num_attention_heads": 8}, "dim / num_heads = 2 must be a multiple of 4"),
        ("vision_config", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ("vision_config", {"num_hidden_layers": 3}, "missing tensors vision_model.model.layers.2."),
        ("vision_config", {"num_hidden_layers": 1}, "unexpected tensors vision_model.model.layers.1."),
        ("vision_config", {"num_hidden_layers": 900}, "num_hidden_layers=900: the files hold"),
        ("vision_config", {"use_registers": True}, "use_registers=True: not a field of Llama 4's vision_config"),
        ("text_config", {"hidden_act": "mish"}, "hidden_act='mish'"),
        (None, {"image_token_index": 61}, "image_token_index=61: must be a token id below text_config.vocab_size=61"),
        (None, {"image_token_index": ...}, "image_token_index=200092: must be"),
        (None, {"image_token_id": 3}, "image_token_index=60, 3: must be one token id"),
        (None, {"image_token_index": [60]}, r"image_token_index=\[60\]: must be one token id"),
        (None, {"vision_config": None}, "vision_config=None: must be a mapping"),
        (None, {"fusion": "late"}, "fusion='late': not a field of Llama 4"),
        (None, {"quantization_config": {"bits": 4}}, "quantization_config="),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    part: str | None, changes: dict[str, Any], message: str, saved: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(saved, tmp_path / "source")
    edit_config(directory, part, **changes)
    for read in (multimodal_from_hf, lambda path: check_hf(path, with_vision=True)):
        with pytest.raises(InputError, match=message):
            read(directory)


def test_damaged_files_and_models_of_others_are_refused(tmp_path: Path) -> None:
    model = theirs_of({"num_hidden_layers": 1}, {})
    with pytest.raises(InputError, match=r"must be Llama4ForConditionalGeneration"):
        multimodal_from_hf(model.language_model)
    model.save_pretrained(tmp_path)
    kept = load_file(tmp_path / "model.safetensors")
    for name in ("vision_model.class_embedding", "multi_modal_projector.linear_1.weight"):
        save_file({key: x for key, x in kept.items() if key != name}, tmp_path / "model.safetensors")
        with pytest.raises(InputError, match=f"missing tensor {name}"):
            multimodal_from_hf(tmp_path)
    save_file({**kept, "vision_model.extra": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"unexpected tensor vision_model\.extra"):
        multimodal_from_hf(tmp_path)


@pytest.mark.slow_but_for("class_token")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_token": False}, "vision.class_token: found False, must be True"),
        ({"learned_positions": False}, "vision.learned_positions: found False, must be True"),
        ({"rope_theta": None}, "vision.rope_theta: found None, must be a number"),
        ({"hidden_dim": 60}, "vision.hidden_dim: found 60, must be 64"),
    ],
)
def test_models_that_llama_4_is_not_are_not_written(
    changes: dict[str, Any], message: str, saved: Path, tmp_path: Path
) -> None:
    config = multimodal_from_hf(saved).config
    assert config is not None
    other = build_multimodal(dataclasses.replace(config, vision=dataclasses.replace(config.vision, **changes)))
    with pytest.raises(InputError, match=message):
        to_hf(other, tmp_path / "new")
    assert not (tmp_path / "new").exists()
