"""Pictures of other people: opened with all that can be wrong named, fitted into tiles as Llama 4 does it."""

import dataclasses
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moesaic.data.images.sample import Picture, Pixels
from moesaic.errors import InputError
from moesaic.models.tiles import fit_into_tiles, tile_grid
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
    """A picture (H, W, C) in tiles (n, C, side, side), as `fit_into_tiles` has them."""
    return fit_into_tiles(torch.from_numpy(pixels.transpose(2, 0, 1).copy()), side, grid).numpy()


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
