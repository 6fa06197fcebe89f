"""Checkpoints of models that see pictures: read whole, read as their text models, and refused by name."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from seeing import LAYOUT, VISION, seeing

from moesaic.checkpoints import load_checkpoint, load_model, load_multimodal, save_model
from moesaic.errors import InputError
from moesaic.evaluation.extension import keep_start, start_of
from moesaic.models import MultimodalDecoder


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, MultimodalDecoder]:
    torch.manual_seed(0)
    path, made = tmp_path / "seeing.ckpt", seeing()
    save_model(path, made, LAYOUT.tokenizer)
    return path, made


def test_it_comes_back_whole(saved: tuple[Path, MultimodalDecoder]) -> None:
    path, made = saved
    found = load_multimodal(path)
    assert found.multimodal is not None and not found.multimodal.training
    assert found.multimodal.config == made.config and found.multimodal.decoder is found.decoder
    expected = made.state_dict()
    assert found.multimodal.state_dict().keys() == expected.keys()
    assert all(torch.equal(each, expected[name]) for name, each in found.multimodal.state_dict().items())


def test_its_text_model_is_read_as_one(saved: tuple[Path, MultimodalDecoder], tmp_path: Path) -> None:
    path, made = saved
    tokens = torch.randint(LAYOUT.tokenizer.vocab_size, (2, 9))
    assert torch.equal(load_model(path).decoder(tokens).logits, made.decoder(tokens).logits)
    keep_start(tmp_path / "run", load_checkpoint(path))
    kept = load_model(start_of(tmp_path / "run"))
    assert kept.multimodal is None and torch.equal(kept.decoder(tokens).logits, made.decoder(tokens).logits)


def test_a_text_model_sees_nothing(tmp_path: Path) -> None:
    save_model(tmp_path / "text.ckpt", seeing().decoder)
    assert not load_checkpoint(tmp_path / "text.ckpt")["hyper_parameters"].keys() & {"vision", "image_token"}
    assert load_model(tmp_path / "text.ckpt").multimodal is None
    with pytest.raises(InputError, match=r"text\.ckpt: a text model; must be one that sees pictures"):
        load_multimodal(tmp_path / "text.ckpt")


def without_config() -> MultimodalDecoder:
    made = seeing()
    return MultimodalDecoder(made.decoder, made.vision, made.projector, image_token=3)


def test_a_model_without_config_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no config"):
        save_model(tmp_path / "it.ckpt", without_config())
    assert not list(tmp_path.iterdir())


def drop(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["state_dict"].pop(key)


def put(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["hyper_parameters"].update({key: value})


def weight(key: str, tensor: torch.Tensor) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["state_dict"].update({key: tensor})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("projector.weight"), r"projector.weight: found absent; must be floating \[16, 6\]"),
        (weight("vision.more", torch.zeros(2)), r"vision.more: found floating \[2\]; must be absent"),
        (weight("projector.weight", torch.zeros(6, 16)), r"projector.weight: found floating \[6, 16\]"),
        (weight("projector.weight", torch.full((16, 6), torch.nan)), "projector.weight holds numbers that are not fin"),
        (put("image_token", None), "image_token=None: must stand beside vision, or neither"),
        (put("vision", None), f"image_token={LAYOUT.image}: must stand beside vision, or neither"),
        (put("image_token", 263), "image_token=263: must be a token id below text.vocab_size=263"),
        (put("vision", {"dim": 8}), "vision.image_size: missing"),
        (put("vision", {**dataclasses.asdict(VISION), "num_layers": 2}), "vision.transformer.layers.1.*found absent"),
        (put("vision", {**dataclasses.asdict(VISION), "deep": 2}), "vision.deep: unknown key"),
    ],
)
def test_what_does_not_fit_is_named(
    damage: Callable[[dict[str, Any]], Any], message: str, saved: tuple[Path, MultimodalDecoder]
) -> None:
    content = torch.load(saved[0], weights_only=True)
    damage(content)
    torch.save(content, saved[0])
    with pytest.raises(InputError, match=f"checkpoint .*seeing.ckpt: .*{message}"):
        load_model(saved[0])
