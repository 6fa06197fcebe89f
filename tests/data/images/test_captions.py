"""Texts of pictures as training text: those of training samples only, and nothing else changes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moesaic.config import from_mapping
from moesaic.data import DataConfig, load_data
from moesaic.data.images import TRAIN
from moesaic.data.pictures import load_pictures
from moesaic.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Some text, and forty pictures with names below it."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    draw = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(draw.integers(0, 256, (8, 8)).astype(np.uint8)).save(pictures / f"{i}.png")
    rows = [f"{i}.png,SHADE OF NUMBER {i}" for i in range(40)]
    (pictures / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(8):
        (texts / f"{i}.txt").write_text("all work and no play\n" * (i + 3))
    return tmp_path


def config_of(folder: Path, captions: bool = True) -> DataConfig:
    task = {"side": 8, "tile_tokens": 1, "channels": 1, "most_tiles": 1}
    given = {"source": "image_folder", "path": str(folder / "pictures"), "task": task}
    text = {"source": "files", "path": str(folder / "texts"), "vocab_size": 300, "cache_dir": str(folder / "cache")}
    return from_mapping(DataConfig, {**text, "captions": given if captions else None}, "data")


def test_the_texts_of_training_pictures_are_read_and_no_others(folder: Path) -> None:
    plain, data = load_data(config_of(folder, captions=False)), load_data(config_of(folder))
    assert data.tokenizer is not None
    read = data.tokenizer.decode(data.train.tokens.tolist()).decode()
    source = config_of(folder).caption_source()
    assert source is not None
    samples = load_pictures(source).samples
    for split in samples.splits:
        names = [samples.sample(split, i).texts[-1].text for i in range(samples.size(split))]
        assert names
        assert [name in read.split("\n") or read.endswith(name) for name in names] == [split == TRAIN] * len(names)

    assert plain.tokenizer is not None
    assert np.array_equal(
        data.tokenizer.decode(data.validation.tokens.tolist()), plain.tokenizer.decode(plain.validation.tokens.tolist())
    )
    assert data.facts["content_hash"] != plain.facts["content_hash"]
    assert len(data.tokenizer.encode(b"SHADE OF")) < len(plain.tokenizer.encode(b"SHADE OF"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"captions": {"source": "stdlib"}}, "data.captions.source='stdlib': must be one of glyphs"),
        ({"captions": {"source": "glyphs", "sides": 3}}, "data.captions"),
        ({"source": "induction", "captions": {"source": "glyphs"}}, "captions: source=induction takes none"),
    ],
)
def test_what_has_no_texts_is_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_mapping(DataConfig, keys, "data")
