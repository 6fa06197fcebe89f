"""Pictures of other people: opened with all that can be wrong named, fitted into tiles as Llama 4 does it."""

import dataclasses
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.data.images.sample import Picture, Pixels
from moesaic.errors import InputError
from moesaic.models.tiles import tile_grid
from moesaic.reading import reading, require_file

__all__ = ["MOST_PIXELS", "FittedPicture", "decoded", "fitted", "open_picture"]

MOST_PIXELS = 1 << 26
"""A larger picture is refused before it is decoded: 67 million pixels are 200 MB in color."""

MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA"})
"""Pillow's names of what is taken; what is transparent becomes white."""


def open_picture(path: Path, channels: int) -> Pixels:
    """The picture in a file, (H, W, C), upright.

    Raises:
        InputError: it names the file that is no picture, damaged, animated, larger than `MOST_PIXELS`, without pixels,
            or of other colors than gray and RGB.
    """
    with reading(path):
        require_file(path)
        return decoded(path.read_bytes(), channels)


def decoded(content: bytes, channels: int) -> Pixels:
    """The picture in the content of a file, as `open_picture` has it; InputError without the name of a file."""
    from PIL import Image, UnidentifiedImageError

    if not content:
        raise InputError("empty; must be a picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about sizes and oddities: what matters is refused here
            image = Image.open(io.BytesIO(content))
            return _as_array(image, channels)
    except UnidentifiedImageError as error:
        raise InputError("no picture of a known format; must be PNG, JPEG or another that Pillow reads") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"a picture of too many pixels; must be at most {MOST_PIXELS:,}") from error


def _as_array(image: Any, channels: int) -> Pixels:
    from PIL import Image, ImageOps

    width, height = image.size
    if width < 1 or height < 1:
        raise InputError(f"a picture of {width} x {height} pixels; must have some")
    if width * height > MOST_PIXELS:
        raise InputError(f"a picture of {width} x {height} pixels; must be at most {MOST_PIXELS:,} in all")
    # an MPO is a photograph, with others beside it that are not its movement
    if image.format != "MPO" and (frames := getattr(image, "n_frames", 1)) > 1:
        raise InputError(f"{frames} frames; must be one picture that does not move")
    if image.mode not in MODES:
        raise InputError(f"colors of mode {image.mode}; must be one of {', '.join(sorted(MODES))}")
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("LA", "PA", "RGBA") or "transparency" in upright.info:
        whole = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole)
    pixels = np.asarray(upright.convert("RGB" if channels == 3 else "L"))
    return pixels.reshape(*pixels.shape[:2], channels)


def fitted(pixels: Pixels, side: int, grid: tuple[int, int]) -> Pixels:
    """A picture (H, W, C) in tiles (n, C, side, side), row by row; of several tiles the last one shows all of it.

    It keeps its proportions and is enlarged at most until its shorter side has `side` pixels. What is left of the grid
    at the right and below is black, as in Llama 4.
    """
    rows, columns = grid
    height, width, channels = pixels.shape
    room = min(max(height, side), rows * side), min(max(width, side), columns * side)
    scale_down, scale_right = room[0] / height, room[1] / width
    if scale_right < scale_down:
        size = max(1, min(int(height * scale_right), room[0])), room[1]
    else:
        size = room[0], max(1, min(int(width * scale_down), room[1]))
    canvas = np.zeros((rows * side, columns * side, channels), dtype=np.uint8)
    canvas[: size[0], : size[1]] = _resized(pixels, size)
    tiles = canvas.reshape(rows, side, columns, side, channels).transpose(0, 2, 4, 1, 3)
    tiles = tiles.reshape(rows * columns, channels, side, side)
    if rows * columns == 1:
        return tiles
    overview = _resized(pixels, (side, side)).transpose(2, 0, 1)
    return np.concatenate([tiles, overview[None]])


def _resized(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    from PIL import Image

    channels = pixels.shape[2]
    image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    resized = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))
    return resized.reshape(*size, channels)


@dataclasses.dataclass(frozen=True)
class FittedPicture(Picture):
    """A picture of a file or a data set, decoded when it is needed."""

    content: Path | bytes
    size: tuple[int, int]
    """(height, width), upright."""
    side: int
    channels: int
    most_tiles: int

    @property
    def grid(self) -> tuple[int, int]:
        return tile_grid(*self.size, self.side, self.most_tiles)

    @property
    def overview(self) -> bool:
        rows, columns = self.grid
        return rows * columns > 1

    def tiles(self, rng: np.random.Generator | None) -> Pixels:
        if isinstance(self.content, Path):
            pixels = open_picture(self.content, self.channels)
        else:
            pixels = decoded(self.content, self.channels)
        if pixels.shape[:2] != self.size:  # changed since the run began: its tokens would not fit
            raise InputError(
                f"{self.content!s:.200}: {pixels.shape[:2]} pixels, and had {self.size}; must stay the same"
            )
        return fitted(pixels, self.side, self.grid)
