"""Glyphs and what they are called: every character of several typefaces beside its Unicode name."""

import dataclasses
import functools
import hashlib
import json
import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moesaic.data.corpora import expanded
from moesaic.data.images.faces import FACES, Ink, charmap, draw, face_hash, hash_of_faces, require_packages
from moesaic.data.images.keys import PictureKeys, Place
from moesaic.data.images.sample import TRAIN, ImageText, Picture, Pixels, Samples, Text
from moesaic.errors import CannotWrite, InputError, naming
from moesaic.files import atomic, make_folder
from moesaic.reading import read_json, reading

__all__ = ["GlyphPicture", "GlyphSamples", "GlyphTable", "Glyphs", "glyph_table", "is_named"]

VERSION = 1
"""Part of the key of the cached pictures; raise it when a glyph is drawn another way."""

HELD_OUT_SHARE = 10
"""One group of characters in so many is in no training sample."""

MOST_ALIKE = 16
"""Characters of a face that share one picture; more of them, and it is a placeholder (no face listed has over 8)."""

PAPER = 255


@dataclasses.dataclass(frozen=True, kw_only=True)
class Glyphs(PictureKeys):
    """Keys of `data=glyphs`: pairs of a character's picture and its name.

    Args:
        faces: names of faces that matplotlib ships, or paths of others; None: `FACES`.
        held_out_faces: those of them that are in no training sample.
        shift: pixels by which a training picture is moved at most, along each axis.
        warp: how much a training picture is scaled, in units of the natural logarithm, and sheared, at most.
    """

    faces: tuple[str, ...] | None = None
    held_out_faces: tuple[str, ...] = ("DejaVuSerif-Italic", "STIXGeneralBol")
    shift: int = dataclasses.field(default=2, metadata={"most": 64})
    warp: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        faces = self.all_faces
        if not faces or len(set(faces)) < len(faces):
            raise ValueError(f"faces={list(faces)}: must be one or more different faces")
        if unknown := [face for face in self.held_out_faces if face not in faces]:
            raise ValueError(f"held_out_faces={list(self.held_out_faces)}: {unknown[0]} must be among faces")
        if len(set(self.held_out_faces)) == len(faces):
            raise ValueError(f"held_out_faces={list(self.held_out_faces)}: must leave a face to train on")
        if not 0 <= self.shift < self.side // 2:
            raise ValueError(f"shift={self.shift}: must be 0 <= value < side / 2 = {self.side // 2}")
        if not 0 <= self.warp <= 1:
            raise ValueError(f"warp={self.warp}: must be 0 <= value <= 1")

    @property
    def all_faces(self) -> tuple[str, ...]:
        return FACES if self.faces is None else self.faces

    def load(self, place: Place) -> Samples:
        return self.glyphs(place)

    def glyphs(self, place: Place) -> "GlyphSamples":
        """The pairs, from the cache if their pictures are there.

        Raises:
            InputError: a face that cannot be read, or a cache that cannot be written.
        """
        require_packages()
        with naming("data.task.faces"):
            table = glyph_table(self.all_faces, self.side, place.cache_dir)
        return GlyphSamples(self, table)


@dataclasses.dataclass(frozen=True)
class GlyphTable:
    """All pairs of a character and a face that have a glyph, sorted by face and code point."""

    faces: tuple[str, ...]
    codes: npt.NDArray[np.int64]
    """(n,): code points."""
    face: npt.NDArray[np.int64]
    """(n,): numbers of faces."""
    ink: npt.NDArray[np.uint8]
    """(n, side, side): 0 where there is none."""
    left_out: dict[str, int]
    """How many code points that a face maps are no pair, by the reason."""

    def name(self, row: int) -> str:
        return unicodedata.name(chr(int(self.codes[row])))

    @functools.cached_property
    def pictures(self) -> list[bytes]:
        """A hash of each picture; equal ones look the same to any model."""
        return [_hash(picture) for picture in self.ink]

    @functools.cached_property
    def shapes(self) -> list[bytes]:
        """A hash of each picture without its margins, so that one that is only moved has the same."""
        return [_hash(_cropped(picture)) for picture in self.ink]


def is_named(character: str) -> bool:
    """Whether a character has a name and is no separator, control or unassigned one."""
    return unicodedata.category(character)[0] not in "CZ" and bool(unicodedata.name(character, ""))


def glyph_table(
    faces: Sequence[str], side: int, cache_dir: str | None = None, characters: Iterable[str] | None = None
) -> GlyphTable:
    """Every glyph of the faces, drawn into a square.

    An em is three quarters of the side. The ink is in the middle; its height above the baseline is kept as far as the
    square allows. Larger glyphs are drawn smaller. Left out are characters without a name or a glyph, empty pictures,
    the picture for missing glyphs, and pictures that more than `MOST_ALIKE` characters of a face share.

    Args:
        side: pixels.
        cache_dir: where the pictures are kept; None: they are drawn anew.
        characters: those to draw; None: all that a face maps.

    Raises:
        InputError: a face that cannot be read, no glyph at all, or a cache that cannot be written.
    """
    if cache_dir is None:
        return _drawn(faces, side, characters)
    import PIL

    parts = [VERSION, hash_of_faces(faces), side, PIL.__version__, unicodedata.unidata_version]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    folder = expanded(cache_dir)
    if (table := _stored(folder, key, faces)) is None:
        make_folder(folder, "data.cache_dir")
        table = _drawn(faces, side, characters)
        try:
            _store(folder, key, table)
        except CannotWrite:
            raise
        except InputError:  # another process is writing the same pictures
            pass
    return table


def _drawn(faces: Sequence[str], side: int, characters: Iterable[str] | None) -> GlyphTable:
    wanted = None if characters is None else {ord(character) for character in characters}
    left_out, found = Counter[str](), []
    for number, face in enumerate(faces):
        glyphs = charmap(face)
        codes = [code for code in sorted(glyphs if wanted is None else wanted & glyphs.keys()) if glyphs[code]]
        named = [code for code in codes if is_named(chr(code))]
        left_out["no name"] += len(codes) - len(named)
        drawn = [(code, _in_square(face, side, chr(code))) for code in named]
        missing = draw(face, _em(side), "\U0010ffff")[0]
        alike = Counter(ink.tobytes() for _, ink in drawn if ink is not None)
        for code, ink in drawn:
            if ink is None:
                left_out["empty"] += 1
            elif alike[ink.tobytes()] > MOST_ALIKE or (
                missing.any() and np.array_equal(draw(face, _em(side), chr(code))[0], missing)
            ):
                left_out["placeholder"] += 1
            else:
                found.append((number, code, ink))
    if not found:
        raise InputError(f"{', '.join(faces)}: no glyph of a character with a name; must have some")
    return GlyphTable(
        tuple(faces),
        np.array([code for _, code, _ in found], dtype=np.int64),
        np.array([number for number, _, _ in found], dtype=np.int64),
        np.stack([ink for _, _, ink in found]),
        dict(sorted(left_out.items())),
    )


def _em(side: int) -> int:
    return max(1, side * 3 // 4)


def _in_square(face: str, side: int, character: str) -> Ink | None:
    """The picture (side, side) of a character, or None of one without ink."""
    size = _em(side)
    ink, (_, top) = draw(face, size, character)
    while max(ink.shape) > side:
        size = min(size - 1, size * side // max(ink.shape))
        if size < 1:
            return None
        ink, (_, top) = draw(face, size, character)
    if not ink.any():
        return None
    height, width = ink.shape
    baseline = side * 18 // 25  # as far from the top that an em with its ascent and descent is in the middle
    y = min(max(baseline + top, 0), side - height)
    x = (side - width) // 2
    square = np.zeros((side, side), dtype=np.uint8)
    square[y : y + height, x : x + width] = ink
    return square


def _cropped(ink: Ink) -> Ink:
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _hash(ink: Ink) -> bytes:
    return hashlib.blake2b(f"{ink.shape}".encode() + ink.tobytes(), digest_size=16).digest()


def _paths(folder: Path, key: str) -> tuple[Path, Path]:
    return folder / f"glyphs-{key}.npy", folder / f"glyphs-{key}.json"


def _record(side: int) -> np.dtype[np.void]:
    return np.dtype([("code", "<u4"), ("face", "<u2"), ("ink", "u1", (side, side))])


def _store(folder: Path, key: str, table: GlyphTable) -> None:
    """Write the pictures, and beside them a hash of the file, last."""
    pictures, about = _paths(folder, key)
    records = np.zeros(len(table.codes), dtype=_record(table.ink.shape[1]))
    records["code"], records["face"], records["ink"] = table.codes, table.face, table.ink
    with atomic(pictures) as partial, partial.open("wb") as file:
        np.save(file, records)
    digest = hashlib.sha256(pictures.read_bytes()).hexdigest()
    with atomic(about) as partial:
        partial.write_text(json.dumps({"sha256": digest, "left_out": table.left_out}), encoding="utf-8")


def _stored(folder: Path, key: str, faces: Sequence[str]) -> GlyphTable | None:
    """The table as it was stored, or None where it is missing or damaged."""
    pictures, about = _paths(folder, key)
    try:
        facts = read_json(about)
        with reading(pictures):
            content = pictures.read_bytes()
            if hashlib.sha256(content).hexdigest() != facts["sha256"]:
                return None
            records = np.load(pictures, allow_pickle=False)
        codes, face = records["code"].astype(np.int64), records["face"].astype(np.int64)
        return GlyphTable(tuple(faces), codes, face, np.ascontiguousarray(records["ink"]), dict(facts["left_out"]))
    except (InputError, KeyError):
        return None


@dataclasses.dataclass(frozen=True)
class GlyphPicture(Picture):
    """A glyph in one tile, dark on white."""

    ink: Ink
    """(side, side)."""
    channels: int = 1
    shift: int = 0
    warp: float = 0.0

    @property
    def grid(self) -> tuple[int, int]:
        return 1, 1

    def tiles(self, rng: np.random.Generator | None) -> Pixels:
        ink = self.ink if rng is None or not self.shift else moved(self.ink, *self._offsets(rng))
        if rng is not None and self.warp:
            ink = warped(ink, *rng.uniform(-self.warp, self.warp, size=3).tolist())
        return np.broadcast_to(PAPER - ink, (1, self.channels, *ink.shape))

    def _offsets(self, rng: np.random.Generator) -> tuple[int, int]:
        down, right = rng.integers(-self.shift, self.shift + 1, size=2)
        return int(down), int(right)


def moved(ink: Ink, down: int, right: int) -> Ink:
    """The picture moved by so many pixels, less where ink would leave it."""
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    down = int(np.clip(down, -rows[0], len(ink) - 1 - rows[-1]))
    right = int(np.clip(right, -columns[0], ink.shape[1] - 1 - columns[-1]))
    return np.roll(ink, (down, right), axis=(0, 1))


def warped(ink: Ink, down: float, right: float, shear: float) -> Ink:
    """The picture scaled about its center by exp(down) and exp(right), and sheared as a slanted face is.

    Of what would leave the square, only the rest is seen.
    """
    from PIL import Image

    height, width = math.exp(-down), math.exp(-right)
    x, y = (ink.shape[1] - 1) / 2, (len(ink) - 1) / 2
    back = (width, shear, x - width * x - shear * y, 0.0, height, y - height * y)
    picture = Image.fromarray(ink)
    return np.asarray(picture.transform(picture.size, Image.Transform.AFFINE, back, Image.Resampling.BILINEAR))


class GlyphSamples(Samples):
    """A picture, then the character's name.

    Characters whose shape is the same in some face, wherever in the square it is, are one group, and so on through
    chains of them. A group is held out as a whole. So no shape of `unseen_character` or `unseen_both` is in training.
    A glyph of a held-out face is in no split if training has its shape; `facts` says how many there are.
    """

    splits = (TRAIN, "unseen_character", "unseen_font", "unseen_both")

    def __init__(self, keys: Glyphs, table: GlyphTable) -> None:
        self.keys = keys
        self.table = table
        self.side = keys.side
        self.channels = keys.channels
        held_out_faces = [table.faces.index(face) for face in keys.held_out_faces]
        other_face = np.isin(table.face, held_out_faces)
        other_character = held_out(table)
        train = np.flatnonzero(~other_face & ~other_character)
        seen = {table.shapes[row] for row in train.tolist()}
        new_shape = np.array([shape not in seen for shape in table.shapes])
        rows = {
            TRAIN: train,
            "unseen_character": np.flatnonzero(~other_face & other_character),
            "unseen_font": np.flatnonzero(other_face & ~other_character & new_shape),
            "unseen_both": np.flatnonzero(other_face & other_character),
        }
        self.rows: dict[str, npt.NDArray[np.int64]] = {name: _shuffled(each) for name, each in rows.items()}
        """The rows of the table in each split, in an order that has nothing to do with the alphabet."""
        names: dict[bytes, set[str]] = {}
        for row, picture in enumerate(table.pictures):
            names.setdefault(picture, set()).add(table.name(row))
        self._names = {picture: frozenset(each) for picture, each in names.items()}
        digest = hashlib.sha256()
        for part in (table.codes, table.face, table.ink, *self.rows.values()):
            digest.update(np.ascontiguousarray(part).tobytes())
        self.facts = {
            "source": "glyphs",
            "content_hash": digest.hexdigest(),
            "faces": {face: face_hash(face)[:16] for face in table.faces},
            "unicode": unicodedata.unidata_version,
            "characters": len(np.unique(table.codes)),
            **{f"{name}_pairs": len(each) for name, each in self.rows.items()},
            "left_out": {
                **table.left_out,
                "shape seen in training": int((other_face & ~other_character & ~new_shape).sum()),
            },
        }

    def size(self, split: str) -> int:
        return len(self.rows[split])

    def sample(self, split: str, index: int) -> ImageText:
        row = int(self.rows[split][index])
        return ImageText((self.picture(row), self.answer(row)))

    def picture(self, row: int) -> GlyphPicture:
        """The picture of a row of the table."""
        return GlyphPicture(self.table.ink[row], self.channels, self.keys.shift, self.keys.warp)

    def names(self, row: int) -> frozenset[str]:
        """The names of all characters that have the very picture of a row of the table."""
        return self._names[self.table.pictures[row]]

    def answer(self, row: int) -> Text:
        """The name of a row of the table, and beside it the others that are as right."""
        name = self.table.name(row)
        return Text(name, asked=True, also=self.names(row) - {name})


def held_out(table: GlyphTable) -> npt.NDArray[np.bool_]:
    """Mark the rows of characters that are in no training sample: whole groups, by a hash of their first character."""
    groups = _Groups()
    first: dict[bytes, int] = {}
    for code, shape in zip(table.codes.tolist(), table.shapes, strict=True):
        groups.join(code, first.setdefault(shape, code))
    members: dict[int, int] = {}
    for code in table.codes.tolist():
        root = groups.root(code)
        members[root] = min(code, members.get(root, code))
    chosen = {code: _is_chosen(members[groups.root(code)]) for code in set(table.codes.tolist())}
    return np.array([chosen[code] for code in table.codes.tolist()])


def _is_chosen(code: int) -> bool:
    digest = hashlib.sha256(f"moesaic:glyph:{code}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_SHARE == 0


class _Groups:
    """Disjoint sets of numbers."""

    def __init__(self) -> None:
        self._parent: dict[int, int] = {}

    def root(self, item: int) -> int:
        while (parent := self._parent.setdefault(item, item)) != item:
            self._parent[item] = item = self._parent[parent]
        return item

    def join(self, one: int, other: int) -> None:
        self._parent[self.root(one)] = self.root(other)


def _shuffled(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.random.default_rng(len(rows)).permutation(rows)
