"""Lines of code as pictures: lines of unseen files, faces that were never seen, pictures in which they can be read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesaic.config import from_mapping
from moesaic.data import DataConfig, load_pictures
from moesaic.data.corpora import Corpus, Document
from moesaic.data.images import TRAIN, CodeLines, Samples
from moesaic.data.images.code_lines import LinePicture, LineSamples, lines_of
from moesaic.errors import InputError


def corpus() -> Corpus:
    train = Document(
        "a.py", b"import os\n\n    return self\nx = 1\ny" + b" " * 60 + b"z\nprint('\xc3\xa9')\nimport os\n"
    )
    validation = Document("b.py", b"def f(x):\n    return self\n\treturn x + 1\n")
    return Corpus("two files", (train,), (validation,))


def samples(**keys: Any) -> LineSamples:
    settings: dict[str, Any] = {"sizes": (14,), "noise": 0.0, **keys}
    return LineSamples(CodeLines(**settings), corpus(), 8.5)


def test_lines_are_short_plain_and_in_one_split() -> None:
    assert lines_of(corpus().train, 32) == ["import os", "return self", "x = 1"]
    found = samples()
    assert found.lines[TRAIN] == ["import os", "return self", "x = 1"]
    assert found.lines["unseen_line"] == found.lines["unseen_font"] == ["def f(x):", "return x + 1"]
    sample = found.sample("unseen_line", 0)
    assert sample.texts[0].text == "def f(x):"
    assert sample.texts[0].asked


def test_the_splits_have_faces_of_their_own() -> None:
    found = samples()
    faces = {split: set(found.sample(split, 0).pictures[0].faces) for split in found.splits}  # type: ignore[attr-defined]
    assert faces[TRAIN] == faces["unseen_line"] == {"DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique"}
    assert faces["unseen_font"] == {"cmtt10"}


def columns_with_ink(picture: LinePicture, seed: int = 0) -> list[int]:
    tiles = picture.tiles(np.random.default_rng(seed))
    whole = np.concatenate(list(tiles[:, 0]), axis=1)
    return np.flatnonzero((whole < 200).any(axis=0)).tolist()


def line(text: str, **changes: Any) -> LinePicture:
    settings: dict[str, Any] = {"faces": ("DejaVuSansMono",), "sizes": (14,), "noise": 0.0, "side": 32, "columns": 4}
    return LinePicture(text, **{**settings, **changes})


def test_a_line_runs_from_tile_to_tile_and_none_is_cut_off() -> None:
    short, long = columns_with_ink(line("H")), columns_with_ink(line("H" + 8 * " " + "H"))
    assert short[0] == long[0]
    assert long[-1] - short[-1] == pytest.approx(9 * 8.2, abs=4)  # an advance of 0.602 em, or rounded
    found = samples(columns=32)
    for split in found.splits:
        for index in range(found.size(split)):
            picture = found.sample(split, index).pictures[0]
            assert isinstance(picture, LinePicture)
            ink = columns_with_ink(picture)
            assert 0 <= ink[0] <= ink[-1] < 32 * picture.columns - 1
            assert ink[-1] - ink[0] > 7 * (len(picture.line) - 1)


def test_noise_sizes_and_places_are_drawn_from_the_generator() -> None:
    noisy = line("for i in range(3):", noise=40.0, sizes=(12, 16))
    first, again, other = (noisy.tiles(np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(noisy.tiles(None), noisy.tiles(None))
    lengths = {len(columns_with_ink(line("import os", sizes=(12, 16)), seed)) for seed in range(8)}
    assert len(lengths) > 1
    assert line("x = 1", channels=3).tiles(None).shape == (4, 3, 32, 32)


def config(path: Path, **keys: object) -> DataConfig:
    return from_mapping(
        DataConfig,
        {"source": "code_lines", "tokenizer": "bytes", "path": str(path), "validation_fraction": 0.3, "task": keys},
        "data",
    )


def test_lines_of_your_own_text(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(f"value_{i} = {i} * {i}\nshared = line\n")
    found = load_pictures(config(tmp_path, sizes=[12], columns=20))
    pairs: Samples = found.samples
    assert pairs.size(TRAIN) + pairs.size("unseen_line") == 13
    batch = found.training_loader(seq_len=256, batch_size=2, num_batches=1, seed=0).batch(0)
    assert batch["images"].shape[1:] == (1, 32, 32)
    assert len(batch["images"]) * 4 == int((batch["tokens"] == found.layout.image).sum())
    assert found.facts["text"] != found.facts["content_hash"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"faces": []}, "faces=.*: must be one or more different faces"),
        ({"held_out_faces": ["cmr10"]}, "cmr10 must be among faces"),
        ({"faces": ["cmtt10"]}, "held_out_faces=.*: must leave a face"),
        ({"sizes": [3]}, "sizes=.*numbers >= 4"),
        ({"sizes": [30]}, "sizes=.*: must be at most two thirds of side=32"),
        ({"columns": 3}, "columns=3: must be a number >= 4"),
        ({"noise": -1}, "noise=-1.0: must be 0 <= value <= 255"),
    ],
)
def test_impossible_keys(tmp_path: Path, keys: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=rf"data\.task\..*{message}|data\.task\.{message}"):
        config(tmp_path, **keys)


def test_text_or_faces_that_make_no_lines(tmp_path: Path) -> None:
    for i in range(9):
        (tmp_path / f"{i}.txt").write_text(f"é{i}é{i}\n")
    with pytest.raises(InputError, match=r"data\.source='code_lines': 0 lines of 4 to 32 ASCII characters"):
        load_pictures(config(tmp_path))
    with pytest.raises(InputError, match=r"data\.task\.faces: DejaVuSans: its characters have different widths"):
        load_pictures(config(tmp_path, faces=["DejaVuSansMono", "DejaVuSans"], held_out_faces=[]))
