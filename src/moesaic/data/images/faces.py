"""Typefaces: a fixed list of those that matplotlib ships, others by path; and pictures of one line of text."""

import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moesaic.data.corpora import expanded
from moesaic.errors import InputError
from moesaic.reading import reading, require_file

__all__ = ["FACES", "Ink", "charmap", "draw", "face_hash", "face_path", "hash_of_faces", "require_packages"]

FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSerif-BoldItalic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
)
"""Faces for text that every matplotlib ships. Its others are symbols in several sizes, or placeholders."""

Ink = npt.NDArray[np.uint8]
"""(height, width): 0 where there is none, 255 where all is covered."""


def require_packages() -> None:
    """Raise InputError where Pillow or matplotlib is missing."""
    try:
        import matplotlib.ft2font  # noqa: F401
        import PIL.ImageFont  # noqa: F401
    except ImportError as error:
        raise InputError(f"data.source: pictures need pip install 'moesaic[train]' ({error})") from error


def face_path(face: str) -> Path:
    """The file of a face: one that matplotlib ships by its name, any other by its path.

    Raises:
        InputError: no such face, or a file that is no typeface.
    """
    import matplotlib

    shipped = Path(matplotlib.get_data_path()) / "fonts/ttf" / f"{face}.ttf"
    path = shipped if os.sep not in face and shipped.is_file() else expanded(face)
    if not path.exists():
        raise InputError(f"face {face!r}: no such file; must be a file, or one of {', '.join(FACES)}")
    return path


@functools.cache
def face_hash(face: str) -> str:
    """SHA-256 of the file of a face."""
    path = face_path(face)
    with reading(path):
        require_file(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()


def charmap(face: str) -> dict[int, int]:
    """The glyph number of each code point that a face maps.

    Raises:
        InputError: the file is no typeface.
    """
    from matplotlib.ft2font import FT2Font

    path = face_path(face)
    with reading(path):
        require_file(path)
        return dict(FT2Font(os.fspath(path)).get_charmap())


@functools.lru_cache(maxsize=256)
def _font(face: str, size: int) -> Any:
    from PIL import ImageFont

    path = face_path(face)
    with reading(path):
        require_file(path)
        # the basic layout: what it draws depends on no library but FreeType, which comes with Pillow
        return ImageFont.truetype(os.fspath(path), size, layout_engine=ImageFont.Layout.BASIC)


def draw(face: str, size: int, text: str) -> tuple[Ink, tuple[int, int]]:
    """One line of text: its ink, and where its upper left corner is from the start of the baseline, (x, y).

    Args:
        size: pixels of an em.
    """
    mask, (x, y) = _font(face, size).getmask2(text, mode="L", anchor="ls")
    width, height = mask.size
    return np.frombuffer(bytes(mask), dtype=np.uint8).reshape(height, width), (int(x), int(y))


def hash_of_faces(faces: Sequence[str]) -> str:
    """One hash of the files of several faces, in their order."""
    return hashlib.sha256("".join(face_hash(face) for face in faces).encode()).hexdigest()
