"""Lines of code as pictures, to be read back: faces for typewriters, several sizes, noise."""

import dataclasses
import hashlib
from collections.abc import Iterable

import numpy as np

from moesaic.data.corpora import Corpus, Document, load_files, load_stdlib
from moesaic.data.images.faces import draw, face_hash, hash_of_faces, require_packages
from moesaic.data.images.glyphs import PAPER
from moesaic.data.images.keys import PictureKeys, Place
from moesaic.data.images.sample import TRAIN, ImageText, Picture, Pixels, Samples, Text
from moesaic.errors import InputError, naming

__all__ = ["CodeLines", "LinePicture", "LineSamples", "lines_of"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeLines(PictureKeys):
    """Keys of `data=code_lines`: lines of the text in `data.path`, by default the standard library.

    Args:
        faces: names of faces that matplotlib ships, or paths of others; every character as wide as any other. (cmtt10
            draws ' and ` as curly quotes.)
        held_out_faces: those of them that are in no training sample.
        sizes: pixels of an em, equally frequent.
        columns: the most characters of a line; longer lines are left out, as are those of less than 4.
        noise: the largest standard deviation of the noise of a pixel, of 255; that of a picture is drawn from 0 to it.
    """

    faces: tuple[str, ...] = ("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "cmtt10")
    held_out_faces: tuple[str, ...] = ("cmtt10",)
    sizes: tuple[int, ...] = dataclasses.field(default=(12, 14, 16), metadata={"most": 2**10})
    columns: int = dataclasses.field(default=32, metadata={"most": 2**10})
    noise: float = 25.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.faces or len(set(self.faces)) < len(self.faces):
            raise ValueError(f"faces={list(self.faces)}: must be one or more different faces")
        if unknown := [face for face in self.held_out_faces if face not in self.faces]:
            raise ValueError(f"held_out_faces={list(self.held_out_faces)}: {unknown[0]} must be among faces")
        if not self.train_faces:
            raise ValueError(f"held_out_faces={list(self.held_out_faces)}: must leave a face to train on")
        if not self.sizes or len(set(self.sizes)) < len(self.sizes) or min(self.sizes) < 4:
            raise ValueError(f"sizes={list(self.sizes)}: must be one or more different numbers >= 4")
        if max(self.sizes) * 3 > self.side * 2:
            raise ValueError(f"sizes={list(self.sizes)}: must be at most two thirds of side={self.side}")
        if self.columns < SHORTEST:
            raise ValueError(f"columns={self.columns}: must be a number >= {SHORTEST}")
        if not 0 <= self.noise <= 255:
            raise ValueError(f"noise={self.noise}: must be 0 <= value <= 255")

    @property
    def train_faces(self) -> tuple[str, ...]:
        return tuple(face for face in self.faces if face not in self.held_out_faces)

    def load(self, place: Place) -> Samples:
        require_packages()
        fraction = place.validation_fraction
        corpus = load_stdlib(fraction) if place.path is None else load_files(place.path, fraction)
        with naming("data.task.faces"):
            widths = {face: _advance(face, max(self.sizes)) for face in self.faces}
        return LineSamples(self, corpus, max(widths.values()))


SHORTEST = 4
"""Characters of a line below which it says little."""

MARGIN = 4
"""Pixels left of a line, the most by which it is moved right of that, and above and below."""


def lines_of(documents: Iterable[Document], columns: int) -> list[str]:
    """The different lines of 4 to `columns` printable ASCII characters, without the space around them, in order."""
    found: dict[str, None] = {}
    for document in documents:
        for line in document.text.decode().splitlines():
            stripped = line.strip()
            if SHORTEST <= len(stripped) <= columns and stripped.isascii() and stripped.isprintable():
                found[stripped] = None
    return list(found)


@dataclasses.dataclass(frozen=True)
class LinePicture(Picture):
    """A line in one row of tiles, dark on white."""

    line: str
    faces: tuple[str, ...]
    sizes: tuple[int, ...]
    noise: float
    side: int
    columns: int
    """Tiles."""
    channels: int = 1

    @property
    def grid(self) -> tuple[int, int]:
        return 1, self.columns

    def tiles(self, rng: np.random.Generator | None) -> Pixels:
        """Face, size, place, contrast and noise are drawn; without a generator from one that the line seeds."""
        if rng is None:
            rng = np.random.default_rng(int.from_bytes(hashlib.blake2b(self.line.encode(), digest_size=8).digest()))
        face, size = self.faces[rng.integers(len(self.faces))], self.sizes[rng.integers(len(self.sizes))]
        ink, (_, top) = draw(face, size, self.line)
        ink = ink[: self.side, : self.columns * self.side]
        paper = np.zeros((self.side, self.columns * self.side))
        y = self.side // 2 + size // 3 + top + int(rng.integers(-MARGIN // 2, MARGIN // 2 + 1))
        x = int(rng.integers(MARGIN))
        y, x = min(max(y, 0), self.side - len(ink)), min(x, paper.shape[1] - ink.shape[1])
        paper[y : y + len(ink), x : x + ink.shape[1]] = ink
        pixels = PAPER - paper * rng.uniform(0.5, 1) + rng.normal(0, rng.uniform(0, self.noise), paper.shape)
        tiles = pixels.round().clip(0, 255).astype(np.uint8).reshape(self.side, self.columns, self.side)
        return np.broadcast_to(tiles.transpose(1, 0, 2)[:, None], (self.columns, self.channels, self.side, self.side))


class LineSamples(Samples):
    """The picture of a line of code, then the line.

    Test lines are of files that are in no training sample, and no test line is a training line. "unseen_font" has the
    same lines as "unseen_line", in faces that are in no training sample.
    """

    splits = (TRAIN, "unseen_line", "unseen_font")

    def __init__(self, keys: CodeLines, corpus: Corpus, advance: float) -> None:
        self.keys = keys
        self.side = keys.side
        self.channels = keys.channels
        self.advance = advance
        """Pixels of a character of the largest size, in the widest face."""
        train = lines_of(corpus.train, keys.columns)
        known = set(train)
        test = [line for line in lines_of(corpus.validation, keys.columns) if line not in known]
        self.lines = {TRAIN: train, "unseen_line": test, "unseen_font": test if keys.held_out_faces else []}
        if not train or not test:
            raise InputError(
                f"data.source='code_lines': {len(train)} lines of {SHORTEST} to {keys.columns} ASCII characters to "
                f"train on, {len(test)} to test; must have some of both"
            )
        of_faces = hash_of_faces(keys.faces)
        of_keys = [keys.held_out_faces, keys.sizes, keys.columns, keys.noise, keys.side]
        digest = hashlib.sha256(f"{corpus.facts()['content_hash']} {of_faces} {of_keys}".encode()).hexdigest()
        self.facts = {
            "source": "code_lines",
            "content_hash": digest,
            "text": corpus.facts()["content_hash"],
            "faces": {face: face_hash(face)[:16] for face in keys.faces},
            "train_lines": len(train),
            "test_lines": len(test),
        }

    def size(self, split: str) -> int:
        return len(self.lines[split])

    def sample(self, split: str, index: int) -> ImageText:
        line, keys = self.lines[split][index], self.keys
        faces = keys.held_out_faces if split == "unseen_font" else keys.train_faces
        width = MARGIN + len(line) * self.advance + MARGIN
        picture = LinePicture(
            line, faces, keys.sizes, keys.noise, self.side, -(-int(np.ceil(width)) // self.side), self.channels
        )
        return ImageText((picture, Text(line, asked=True)))


def _advance(face: str, size: int) -> float:
    """Pixels from one character to the next.

    Raises:
        InputError: a face whose characters are not equally wide.
    """
    widths = {letter: draw(face, size, f"{letter * 100}|")[0].shape[1] for letter in "iW."}
    if max(widths.values()) - min(widths.values()) > size:
        raise InputError(f"{face}: its characters have different widths; must be a face for typewriters")
    return max(widths.values()) / 100
