"""Pictures with captions: a folder of yours, or a Hugging Face data set."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moesaic.data.corpora import expanded
from moesaic.data.images.faces import require_packages
from moesaic.data.images.keys import PictureKeys, Place
from moesaic.data.images.picture_files import FittedPicture, decoded
from moesaic.data.images.sample import TRAIN, ImageText, Samples, Text
from moesaic.errors import InputError
from moesaic.reading import read_csv, reading, require_file

__all__ = ["CaptionedPictures", "ImageDataset", "ImageFolder", "read_captions"]

CAPTIONS = ("metadata.csv", "metadata.jsonl")
"""Names of the file with captions, as Hugging Face's `imagefolder` has them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFolder(PictureKeys):
    """Keys of `data=image_folder`: a folder, `data.path`, with pictures and a file of captions.

    The file is metadata.csv or metadata.jsonl. Its columns or keys are `file_name`, relative to the folder, and `text`.

    Args:
        most_tiles: tiles of a picture, without the one that shows all of it.
    """

    channels: int = 3
    most_tiles: int = dataclasses.field(default=4, metadata={"most": 64})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.most_tiles < 1:
            raise ValueError(f"most_tiles={self.most_tiles}: must be a number >= 1")

    def load(self, place: Place) -> Samples:
        require_packages()
        assert place.path is not None  # checked by the config
        folder = expanded(place.path)
        with reading(folder):
            if not folder.is_dir():
                raise InputError(f"data.path={place.path!r}: no such folder; must be one with {' or '.join(CAPTIONS)}")
        pairs = ((folder / name, (folder / name), text) for name, text in read_captions(folder))
        return CaptionedPictures(self, f"image_folder: {place.path}", pairs, place.validation_fraction)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageDataset(ImageFolder):
    """Keys of `data.source=image_dataset`: the columns `image` and `text` of a data set on the Hugging Face hub."""

    def load(self, place: Place) -> Samples:
        require_packages()
        assert place.path is not None  # checked by the config
        pairs = _rows_of_dataset(place.path)
        return CaptionedPictures(self, f"image_dataset: {place.path}", pairs, place.validation_fraction)


def read_captions(folder: Path) -> list[tuple[str, str]]:
    """The name of each file in a folder that has a caption, and the caption, in the order of the captions' file.

    Raises:
        InputError: no such file or both, a row without a name or a text, or a file named twice or outside the folder.
    """
    there = [folder / name for name in CAPTIONS if (folder / name).exists()]
    if len(there) != 1:
        raise InputError(f"{folder}: {len(there)} files of captions; must be one, {' or '.join(CAPTIONS)}")
    rows = read_csv(there[0]) if there[0].suffix == ".csv" else _read_json_lines(there[0])
    found: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        name, text = row.get("file_name"), row.get("text")
        if not isinstance(name, str) or not isinstance(text, str) or not name or not text.strip():
            raise InputError(f"{there[0]}: row {number}: must have file_name and text, both not empty")
        if name in found:
            raise InputError(f"{there[0]}: row {number}: {name} stands twice; must be there once")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{there[0]}: row {number}: {name}; must be a file within the folder")
        found[name] = text.strip()
    if not found:
        raise InputError(f"{there[0]}: no rows; must have file_name and text of each picture")
    return list(found.items())


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    import json

    with reading(path):
        require_file(path)
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        rows = [json.loads(line) for line in lines]
        if not all(isinstance(row, dict) for row in rows):
            raise InputError("each line must be a mapping with file_name and text")
        return rows


def _rows_of_dataset(name: str) -> Iterator[tuple[str, bytes, str]]:
    """What each row of a data set is called, the content of its picture's file, and its text.

    Raises:
        InputError: the `datasets` package is missing, or there is no such data set or column.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError("data.source='image_dataset': it needs pip install 'moesaic[datasets]'") from error
    try:
        rows = datasets.load_dataset(name, split="train").cast_column("image", datasets.Image(decode=False))
        images, texts = rows["image"], rows["text"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"data.path={name!r}: no data set with columns `image` and `text` ({error})") from error
    for number, (image, text) in enumerate(zip(images, texts, strict=True)):
        content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"data.path={name!r}: row {number}: must have a text")
        yield f"row {number:09d}", content, text.strip()


class CaptionedPictures(Samples):
    """A picture, then its caption.

    Every picture is decoded once before anything else happens, so a file that cannot be used ends nothing later. Equal
    pictures are on one side: what decides is a hash of the pixels.

    Args:
        pairs: name, file or content, and caption of each.

    Raises:
        InputError: a picture that cannot be used, by its name; or too few to have some in both splits.
    """

    splits = (TRAIN, "unseen_picture")

    def __init__(
        self, keys: ImageFolder, source: str, pairs: Iterator[tuple[Any, Path | bytes, str]], fraction: float
    ) -> None:
        self.keys = keys
        self.side = keys.side
        self.channels = keys.channels
        self.pairs: dict[str, list[tuple[FittedPicture, str]]] = {split: [] for split in self.splits}
        digest, repeated, seen = hashlib.sha256(), 0, Counter[bytes]()
        found: list[tuple[bytes, FittedPicture, str]] = []
        for name, given, caption in pairs:
            with reading(name):
                if isinstance(given, Path):
                    require_file(given, "a picture")
                pixels = decoded(given.read_bytes() if isinstance(given, Path) else given, keys.channels)
            key = hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).digest()
            digest.update(key + caption.encode() + b"\0")
            size = (pixels.shape[0], pixels.shape[1])
            found.append((key, FittedPicture(given, size, keys.side, keys.channels, keys.most_tiles), caption))
            seen[key] += 1
        chosen = _test_keys(list(seen), fraction, source)
        for key, picture, caption in found:
            self.pairs["unseen_picture" if key in chosen else TRAIN].append((picture, caption))
            repeated += seen[key] > 1
        self.facts = {
            "source": source,
            "content_hash": digest.hexdigest(),
            **{f"{name}_pairs": len(each) for name, each in self.pairs.items()},
            "pictures with several captions": repeated,
        }

    def size(self, split: str) -> int:
        return len(self.pairs[split])

    def sample(self, split: str, index: int) -> ImageText:
        picture, caption = self.pairs[split][index]
        return ImageText((picture, Text(caption, asked=True)))


def _test_keys(keys: list[bytes], fraction: float, source: str) -> set[bytes]:
    """Which pictures are for tests: about `fraction` of them by their hash, at least one, never all."""
    if len(keys) < 2:
        raise InputError(
            f"{source}: {len(keys)} different pictures; must be at least 2, one of them for the test split"
        )
    places = {key: int.from_bytes(hashlib.sha256(b"moesaic:" + key).digest()[:8], "big") / 2**64 for key in keys}
    chosen = {key for key, place in places.items() if place < fraction} or {min(keys, key=places.__getitem__)}
    return chosen if len(chosen) < len(keys) else chosen - {max(keys, key=places.__getitem__)}
