"""Samples without a typeface, whose pixels say which sample they are of."""

import dataclasses

import numpy as np

from moesaic.data.images import TRAIN, ImageText, Layout, Picture, Samples, Text
from moesaic.data.images.sample import Pixels
from moesaic.data.tokenizers import ByteTokenizer

LAYOUT = Layout(ByteTokenizer(), tile_tokens=2)
IMAGE, BEGIN, END, WHOLE, COLUMN, ROW = range(257, 263)
END_OF_TEXT = 256


@dataclasses.dataclass(frozen=True)
class Plain(Picture):
    """Tiles of one value; a generator adds noise to the last pixel of each."""

    value: int
    grid: tuple[int, int] = (1, 1)
    overview: bool = False

    def tiles(self, rng: np.random.Generator | None) -> Pixels:
        tiles = np.full((self.num_tiles, 1, 8, 8), self.value, dtype=np.uint8)
        if rng is not None:
            tiles[:, :, -1, -1] = rng.integers(256)
        return tiles


class Numbers(Samples):
    """Sample i has a picture of value i, and asks for i written as often as i % 5 + 1."""

    splits = (TRAIN, "test", "other")
    side = 8
    channels = 1

    def __init__(self, train: int = 50, test: int = 7, other: int = 3) -> None:
        self.sizes = {TRAIN: train, "test": test, "other": other}
        self.facts = {"source": "numbers"}

    def size(self, split: str) -> int:
        return self.sizes[split]

    def sample(self, split: str, index: int) -> ImageText:
        parts: list[Picture | Text] = (
            [Plain(index), Text("say ")] if index % 2 else [Text("say "), Plain(index, (1, 2))]
        )
        return ImageText((*parts, Text(f"{index};" * (index % 5 + 1), asked=True)))
