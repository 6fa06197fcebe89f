"""moesaic generate with a picture: what is said of it, and which files and checkpoints are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from seeing import LAYOUT, VISION, seeing

from moesaic.checkpoints import save_model
from moesaic.cli import generate as command
from moesaic.data.images import ImageText, Text, pixel_values
from moesaic.data.images.picture_files import FittedPicture
from moesaic.evaluation.sampling import SampleConfig, sample_of_picture, sample_text
from moesaic.models import MultimodalConfig, MultimodalDecoder, build_multimodal, generate, llama4_toy


@pytest.fixture
def model() -> MultimodalDecoder:
    return seeing()


@pytest.fixture
def here(model: MultimodalDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_model("seeing.ckpt", model, LAYOUT.tokenizer)
    save_model("text.ckpt", model.decoder, LAYOUT.tokenizer)
    save_model("silent.ckpt", model)
    noise = np.random.default_rng(0).integers(0, 256, (21, 30, 4), dtype=np.uint8)
    for mode, name in (("RGBA", "it.png"), ("L", "gray.png"), ("P", "palette.gif"), ("RGB", "color.jpg")):
        Image.fromarray(noise).convert(mode).save(name)
    return tmp_path


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    command.main(arguments)
    return capsys.readouterr().out


def picture(path: str) -> FittedPicture:
    return FittedPicture(Path(path), (21, 30), side=8, channels=1, most_tiles=1)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("prompt", ["", "What is it? "])
def test_it_is_the_models_continuation_of_the_picture(
    here: Path, model: MultimodalDecoder, prompt: str, use_cache: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [prompt] if prompt else []
    printed = said(["seeing.ckpt", *given, "image=it.png", "temperature=0", "max_new_tokens=9"], capsys)
    [encoded] = LAYOUT.encode([ImageText((picture("it.png"), Text(prompt)))])
    images = pixel_values(picture("it.png").tiles(None))
    assert images.shape == (1, 1, 8, 8)
    whole = generate(
        model, torch.from_numpy(encoded.tokens)[None], 9, images=images, temperature=0, stop_token=256,
        use_cache=use_cache,
    )[0].tolist()  # fmt: skip
    new = whole[len(encoded.tokens) :]
    new = new[: new.index(256)] if 256 in new else new
    expected = prompt.encode() + bytes(each for each in new if each < 256)
    assert printed.strip() == expected.decode(errors="replace").strip()


def test_any_file_of_gray_or_color_is_taken(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("gray.png", "palette.gif", "color.jpg"):
        assert said(["seeing.ckpt", f"image={name}", "seed=1", "max_new_tokens=20"], capsys)


def test_the_picture_counts(here: Path, model: MultimodalDecoder) -> None:
    Image.new("L", (30, 21)).save("black.png")
    sampling = SampleConfig(prompt="", max_new_tokens=30)
    found = {sample_of_picture(model, LAYOUT, picture(name), sampling, 0) for name in ("it.png", "black.png")}
    assert len(found) == 2


def test_without_a_picture_it_continues_text(
    here: Path, model: MultimodalDecoder, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = said(["seeing.ckpt", "def f(", "temperature=0", "max_new_tokens=9"], capsys)
    sampling = SampleConfig("def f(", 9, 0.0)
    assert printed.strip() == sample_text(model, LAYOUT.tokenizer, sampling, 0).strip()


def huge(path: Path) -> None:
    Image.new("1", (9000, 9000)).save(path, "PNG")


def without_pixels(path: Path) -> None:
    path.write_bytes(
        b"GIF89a" + bytes(4) + b"\x00\x00\x00" + b",\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x02\x44\x01\x00;"
    )


def animated(path: Path) -> None:
    frames = [Image.new("L", (8, 8), value) for value in (0, 100)]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])


@pytest.mark.slow_but_for("animated", "no such file")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_text("hello"), "bad.png: no picture of a known format"),
        (lambda path: path.write_bytes(b""), "bad.png: empty; must be a picture"),
        (lambda path: Image.new("CMYK", (8, 8)).save(path, "JPEG"), "bad.png: colors of mode CMYK; must be one of"),
        (animated, "bad.png: 2 frames; must be one picture that does not move"),
        (huge, "bad.png: a picture of 9000 x 9000 pixels; must be at most"),
        (without_pixels, "bad.png: "),
        (lambda path: None, "bad.png: no such file"),
    ],
)
def test_a_file_that_is_no_picture_is_named(
    here: Path, spoil: Callable[[Path], Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(here / "bad.png")
    refused(["seeing.ckpt", "image=bad.png"], f"image: {message}", capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["text.ckpt", "image=it.png"], "checkpoint text.ckpt: a text model; must be one that sees pictures"),
        (["silent.ckpt", "image=it.png"], "checkpoint silent.ckpt: it has no tokenizer"),
        (["seeing.ckpt", "image=7"], "image=7: must be a path"),
        (["other.ckpt", "image=it.png"], "checkpoint other.ckpt: image_token=3; must be 257"),
    ],
)
def test_what_does_not_fit_a_picture_is_named(
    here: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = llama4_toy(vocab_size=263, num_layers=2, dim=16, hidden_dim=24)
    save_model("other.ckpt", build_multimodal(MultimodalConfig(text, VISION, image_token=3)), LAYOUT.tokenizer)
    refused(arguments, message, capsys)


def refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
