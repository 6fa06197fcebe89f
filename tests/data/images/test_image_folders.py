"""Pictures with captions: folders and data sets, equal pictures on one side, and everything that can be wrong."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moesaic.config import from_mapping
from moesaic.data import DataConfig, PictureData, load_pictures
from moesaic.data.images import TRAIN
from moesaic.errors import InputError


def config(path: str | Path, **changes: object) -> DataConfig:
    given = {"source": "image_folder", "tokenizer": "bytes", "path": str(path), "validation_fraction": 0.3}
    return from_mapping(DataConfig, {**given, "task": {"side": 16, "most_tiles": 4}, **changes}, "data")


def picture(value: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    """Of one color, whose red part is `value`."""
    return Image.new("RGB", size, (value, 0, 0))


def folder(path: Path, rows: list[dict[str, str]], kind: str = "csv") -> Path:
    lines = ["file_name,text", *(f"{row['file_name']},{row['text']}" for row in rows)]
    lines = lines if kind == "csv" else [json.dumps(row) for row in rows]
    (path / f"metadata.{kind}").write_text("\n".join(lines) + "\n")
    return path


def some(path: Path, number: int = 12, kind: str = "csv") -> Path:
    for i in range(number):
        picture(20 * i).save(path / f"{i}.png")
    return folder(path, [{"file_name": f"{i}.png", "text": f"red {20 * i}"} for i in range(number)], kind)


def pairs(data: PictureData) -> dict[str, set[tuple[int, str]]]:
    """The red part of each picture and its caption, by split."""
    found: dict[str, set[tuple[int, str]]] = {}
    for split in data.samples.splits:
        samples = [data.samples.sample(split, i) for i in range(data.samples.size(split))]
        found[split] = {(int(s.pictures[0].tiles(None)[0, 0, 0, 0]), s.texts[0].text) for s in samples}
    return found


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_every_picture_has_its_caption(tmp_path: Path, kind: str) -> None:
    found = pairs(load_pictures(config(some(tmp_path, kind=kind))))
    assert found[TRAIN] | found["unseen_picture"] == {(20 * i, f"red {20 * i}") for i in range(12)}
    assert found[TRAIN]
    assert found["unseen_picture"]


def test_a_folder_goes_through_the_loader(tmp_path: Path) -> None:
    picture(7, (48, 16)).save(some(tmp_path, 3) / "wide.jpg", quality=95)
    with (tmp_path / "metadata.csv").open("a") as file:
        file.write('wide.jpg,"a wide, red one"\n')
    data = load_pictures(config(tmp_path))
    batches = [
        *data.training_loader(seq_len=128, batch_size=2, num_batches=1, seed=0),
        *data.evaluation_loader(seq_len=128, batch_size=4),
    ]
    for batch in batches:
        assert batch["images"].shape[1:] == (3, 16, 16)
        assert 4 * len(batch["images"]) == int((batch["tokens"] == data.layout.image).sum())
    everything = [
        data.samples.sample(split, i) for split in data.samples.splits for i in range(data.samples.size(split))
    ]
    wide = [sample for sample in everything if "wide" in sample.texts[0].text]
    assert wide[0].texts[0].text == "a wide, red one"
    assert wide[0].pictures[0].grid == (1, 3)
    assert wide[0].pictures[0].tiles(None).shape == (4, 3, 16, 16)  # and all of it in one


def test_equal_pictures_are_on_one_side(tmp_path: Path) -> None:
    rows = []
    for i in range(30):
        picture(8 * (i // 3)).save(tmp_path / f"{i}.{'png' if i % 3 else 'bmp'}")  # other files, the same pixels
        rows.append({"file_name": f"{i}.{'png' if i % 3 else 'bmp'}", "text": f"caption {i}"})
    data = load_pictures(config(folder(tmp_path, rows)))
    found = pairs(data)
    assert not {red for red, _ in found[TRAIN]} & {red for red, _ in found["unseen_picture"]}
    assert sum(map(len, found.values())) == 30
    assert data.facts["pictures with several captions"] == 30


def test_the_hash_follows_pixels_and_captions(tmp_path: Path) -> None:
    first = load_pictures(config(some(tmp_path))).facts["content_hash"]
    assert load_pictures(config(tmp_path)).facts["content_hash"] == first
    picture(3).save(tmp_path / "0.png")
    second = load_pictures(config(tmp_path)).facts["content_hash"]
    text = (tmp_path / "metadata.csv").read_text()
    (tmp_path / "metadata.csv").write_text(text.replace("red 20\n", "red 21\n"))
    assert len({first, second, load_pictures(config(tmp_path)).facts["content_hash"]}) == 3


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_other_colors_become_gray_or_rgb_and_what_is_transparent_white(tmp_path: Path, mode: str) -> None:
    whole = Image.new("RGBA", (16, 16), (0, 0, 0, 0 if mode in ("LA", "RGBA") else 255))
    whole.convert(mode).save(some(tmp_path) / "0.png")
    for channels in (1, 3):
        data = load_pictures(config(tmp_path, task={"side": 16, "channels": channels}))
        reds = {red for red, text in set.union(*pairs(data).values()) if text == "red 0"}
        assert reds == {255 if mode in ("LA", "RGBA") else 0}
        assert data.samples.sample(TRAIN, 0).pictures[0].tiles(None).shape[1] == channels


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    turned = picture(0, (32, 16))
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned.save(some(tmp_path) / "0.png", exif=exif)
    data = load_pictures(config(tmp_path))
    grids = {
        s.texts[0].text: s.pictures[0].grid
        for split in data.samples.splits
        for s in (data.samples.sample(split, i) for i in range(data.samples.size(split)))
    }
    assert grids["red 0"] == (2, 1)


def test_a_photograph_with_its_preview_is_one_picture(tmp_path: Path) -> None:
    picture(0).save(some(tmp_path) / "0.png", "MPO", save_all=True, append_images=[picture(255)])
    found = set.union(*pairs(load_pictures(config(tmp_path))).values())
    assert {red < 10 for red, text in found if text == "red 0"} == {True}


def cmyk(path: Path) -> None:
    Image.new("CMYK", (8, 8)).save(path, "JPEG")


def animated(path: Path) -> None:
    picture(1).save(path, "GIF", save_all=True, append_images=[picture(2), picture(3)])


def cut_off(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:2000])


def huge(path: Path) -> None:
    Image.new("1", (9000, 9000)).save(path, "PNG")


def without_pixels(path: Path) -> None:
    """A header of a GIF that says 0 x 0."""
    path.write_bytes(
        b"GIF89a" + bytes(4) + b"\x00\x00\x00" + b",\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x02\x44\x01\x00;"
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cmyk, "colors of mode CMYK; must be one of 1, L, LA"),
        (animated, "3 frames; must be one picture that does not move"),
        (cut_off, "damaged|cannot be read"),
        (huge, r"a picture of 9000 x 9000 pixels; must be at most 67,108,864 in all"),
        (without_pixels, "damaged|no picture|must have some"),
        (lambda path: path.write_text("hello"), "no picture of a known format; must be PNG"),
        (lambda path: path.write_bytes(b""), "empty; must be a picture"),
        (lambda path: path.unlink(), "no such file"),
        (lambda path: (path.unlink(), path.mkdir()), "a directory; must be a picture"),
    ],
)
def test_a_file_that_is_no_picture_is_named_before_training(tmp_path: Path, spoil: Any, message: str) -> None:
    spoil(some(tmp_path) / "5.png")
    with pytest.raises(InputError, match=rf"5\.png: ({message})"):
        load_pictures(config(tmp_path))


def test_a_picture_that_changes_during_a_run_is_named(tmp_path: Path) -> None:
    data = load_pictures(config(some(tmp_path)))
    for i in range(12):
        picture(0, (64, 16)).save(tmp_path / f"{i}.png")
    with pytest.raises(InputError, match=r"\.png: \(16, 64\) pixels, and had \(16, 16\); must stay the same"):
        data.samples.sample(TRAIN, 0).pictures[0].tiles(None)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"0 files of captions; must be one, metadata\.csv or metadata\.jsonl"),
        ({"metadata.csv": "file_name,text\n", "metadata.jsonl": ""}, "2 files of captions; must be one"),
        ({"metadata.csv": "file_name,text\n"}, "no rows; must have file_name and text"),
        ({"metadata.csv": "file,caption\na.png,x\n"}, "row 1: must have file_name and text"),
        ({"metadata.csv": "file_name,text\na.png,x\nb.png, \n"}, "row 2: must have file_name and text"),
        ({"metadata.csv": "file_name,text\na.png,x\na.png,y\n"}, r"row 2: a\.png stands twice"),
        ({"metadata.csv": "file_name,text\n../a.png,x\n"}, "must be a file within the folder"),
        ({"metadata.jsonl": "{"}, r"metadata\.jsonl: damaged"),
        ({"metadata.jsonl": "[1]"}, r"metadata\.jsonl: each line must be a mapping"),
        ({"metadata.jsonl": '{"file_name": 3, "text": "x"}'}, "row 1: must have file_name and text"),
    ],
)
def test_captions_that_cannot_be_used(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        load_pictures(config(tmp_path))


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.path=None: source=image_folder needs one"):
        from_mapping(DataConfig, {"source": "image_folder", "tokenizer": "bytes"}, "data")
    with pytest.raises(InputError, match=r"no such folder; must be one with metadata\.csv or metadata\.jsonl"):
        load_pictures(config(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="1 different pictures; must be at least 2"):
        load_pictures(config(some(tmp_path, 1)))


def test_missing_datasets_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"data\.source='image_dataset': it needs pip install 'moesaic\[datasets\]'"):
        load_pictures(config("someone/pictures", source="image_dataset"))


def test_rows_of_a_data_set_become_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some(tmp_path)
    images: list[dict[str, Any]] = [{"bytes": (tmp_path / f"{i}.png").read_bytes(), "path": None} for i in range(6)]
    images += [{"bytes": None, "path": str(tmp_path / f"{i}.png")} for i in range(6, 12)]
    columns: dict[str, list[Any]] = {"image": images, "text": [f"red {20 * i}" for i in range(12)]}

    class Rows(dict[str, list[Any]]):
        def cast_column(self, name: str, kind: object) -> "Rows":
            assert (name, kind) == ("image", "not decoded")
            return self

    def load_dataset(name: str, split: str) -> Rows:
        if name != "someone/pictures":
            raise ValueError("unknown")
        return Rows(columns)

    def not_decoded(decode: bool) -> str:
        return "decoded" if decode else "not decoded"

    fake = types.SimpleNamespace(load_dataset=load_dataset, Image=not_decoded)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    found = pairs(load_pictures(config("someone/pictures", source="image_dataset")))
    assert found[TRAIN] | found["unseen_picture"] == {(20 * i, f"red {20 * i}") for i in range(12)}
    with pytest.raises(InputError, match=r"data\.path='other': no data set with columns `image` and `text`"):
        load_pictures(config("other", source="image_dataset"))
    images[3] = {"bytes": b"", "path": None}
    with pytest.raises(InputError, match="row 000000003: empty; must be a picture"):
        load_pictures(config("someone/pictures", source="image_dataset"))
