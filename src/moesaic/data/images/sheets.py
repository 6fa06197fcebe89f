"""Sheets: several glyphs on a grid or one after another, and questions about what is where."""

import dataclasses
import hashlib
from typing import Literal

import numpy as np

from moesaic.data.images.glyphs import PAPER, Glyphs, GlyphSamples
from moesaic.data.images.keys import Place
from moesaic.data.images.sample import TRAIN, ImageText, Picture, Pixels, Samples, Text
from moesaic.data.tasks.task import Ints
from moesaic.errors import InputError

__all__ = ["SheetPicture", "SheetSamples", "Sheets"]

Kind = Literal["what", "where", "which"]
KINDS: tuple[Kind, ...] = ("what", "where", "which")

TRIES = 100
"""Glyphs that are drawn for each cell of a sheet before there count as too few that differ."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sheets(Glyphs):
    """Keys of `data=sheets`, beside those of `data=glyphs`.

    Three kinds of sheets are equally frequent. "what" asks for the name at a row and column of one picture, "where" for
    the row and column of a name. "which" shows every glyph as a picture of its own, with its number before it, and asks
    for the number of a name: a sequence of several images.

    Args:
        rows, columns: of glyphs.
        questions: asked about one sheet, all of one kind.
        sheets: how many there are to train on.
        test_sheets: how many each test split has.
    """

    rows: int = dataclasses.field(default=2, metadata={"most": 16})
    columns: int = dataclasses.field(default=3, metadata={"most": 16})
    questions: int = dataclasses.field(default=2, metadata={"most": 256})
    sheets: int = dataclasses.field(default=20_000, metadata={"most": 2**22})
    test_sheets: int = dataclasses.field(default=600, metadata={"most": 2**20})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rows", "columns", "sheets", "test_sheets"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be a number >= 1")
        if not 1 <= self.questions <= self.rows * self.columns:
            raise ValueError(f"questions={self.questions}: must be 1 to rows * columns = {self.rows * self.columns}")

    def load(self, place: Place) -> Samples:
        return SheetSamples(self, self.glyphs(place))


@dataclasses.dataclass(frozen=True)
class SheetPicture(Picture):
    """Glyphs on a grid, one in each tile, dark on white."""

    ink: Pixels
    """(rows, columns, side, side)."""
    channels: int = 1

    @property
    def grid(self) -> tuple[int, int]:
        rows, columns = self.ink.shape[:2]
        return rows, columns

    def tiles(self, rng: np.random.Generator | None) -> Pixels:
        tiles = (PAPER - self.ink).reshape(-1, 1, *self.ink.shape[2:])
        return np.broadcast_to(tiles, (len(tiles), self.channels, *tiles.shape[2:]))


class SheetSamples(Samples):
    """Sheets of glyphs, each about glyphs that differ in shape and in name.

    Sheet i of a split is always the same one. "seen_glyphs" has new sheets of glyphs that are in training,
    "unseen_character" and "unseen_font" those of glyphs that are in no training sheet.
    """

    splits = (TRAIN, "seen_glyphs", "unseen_character", "unseen_font")

    def __init__(self, keys: Sheets, glyphs: GlyphSamples) -> None:
        self.keys = keys
        self.glyphs = glyphs
        self.side = glyphs.side
        self.channels = glyphs.channels
        rest = {name: value for name, value in glyphs.facts.items() if name not in ("source", "content_hash")}
        of_keys = [keys.rows, keys.columns, keys.questions, keys.sheets, keys.test_sheets]
        digest = hashlib.sha256(f"{glyphs.facts['content_hash']} {of_keys}".encode()).hexdigest()
        self.facts = {"source": "sheets", "content_hash": digest, **rest}

    def size(self, split: str) -> int:
        there = len(self.glyphs.rows[_glyphs_of(split)])
        wanted = self.keys.sheets if split == TRAIN else self.keys.test_sheets
        return wanted if there >= self.keys.rows * self.keys.columns else 0

    def sample(self, split: str, index: int) -> ImageText:
        rng = np.random.default_rng((self.splits.index(split), index))
        rows = self._glyphs(split, rng)
        asked = rng.permutation(len(rows))[: self.keys.questions]
        kind = KINDS[index % len(KINDS)]
        parts: list[Picture | Text] = []
        if kind == "which":
            for number, row in enumerate(rows.tolist(), start=1):
                parts += [Text(f"Picture {number}:"), self.glyphs.picture(row)]
        else:
            ink = self.glyphs.table.ink[rows]
            parts += [SheetPicture(ink.reshape(self.keys.rows, self.keys.columns, *ink.shape[1:]), self.channels)]
        for cell in asked.tolist():
            parts += self._question(kind, rows, cell)
        return ImageText(tuple(parts))

    def _question(self, kind: Kind, rows: Ints, cell: int) -> list[Text]:
        """A question about the glyph of a cell, and its answer."""
        name = self.glyphs.answer(int(rows[cell]))
        row, column = divmod(cell, self.keys.columns)
        place = f"row {row + 1}, column {column + 1}"
        if kind == "what":
            return [Text(f"What is at {place}? "), name]
        if kind == "where":
            return [Text(f"Where is {name.text}? "), Text(place, asked=True)]
        return [Text(f"Which picture shows {name.text}? "), Text(str(cell + 1), asked=True)]

    def _glyphs(self, split: str, rng: np.random.Generator) -> Ints:
        """Rows of the table, one for each cell; no two have the same shape, or a name in common."""
        pool, table = self.glyphs.rows[_glyphs_of(split)], self.glyphs.table
        cells = self.keys.rows * self.keys.columns
        chosen, shapes, names = list[int](), set[bytes](), set[str]()
        for row in (int(row) for _ in range(TRIES) for row in pool[rng.integers(len(pool), size=cells)]):
            shape, called = table.shapes[row], self.glyphs.names(row)
            if shape in shapes or not called.isdisjoint(names):
                continue
            shapes.add(shape)
            names |= called
            chosen.append(row)
            if len(chosen) == cells:
                return np.array(chosen, dtype=np.int64)
        raise InputError(
            f"data.task.rows={self.keys.rows}, columns={self.keys.columns}: {TRIES * cells} glyphs of {split} had only "
            f"{len(chosen)} that differ; must be fewer cells, or more faces"
        )


def _glyphs_of(split: str) -> str:
    """The split of glyphs that the sheets of a split show."""
    return TRAIN if split == "seen_glyphs" else split
