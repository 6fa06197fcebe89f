"""Large pictures as tiles, and the tokens around them, as in Llama 4.

Semantics: transformers' `Llama4ImageProcessor` and `Llama4Processor` (5.23). A picture is fitted into a grid of square
tiles without distortion, at its upper left; with more than one tile, the whole picture follows as one more.
"""

import dataclasses

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from moesaic.layers.checks import require_sizes, require_tensor

__all__ = ["TileTokens", "fit_into_tiles", "split_into_tiles", "tile_grid"]


@dataclasses.dataclass(frozen=True)
class TileTokens:
    """The ids around and between tiles. In Llama 4's words: <|image_start|>, <|patch|>, and so on."""

    image_start: int
    patch: int
    """`MultimodalConfig.image_token`: it stands at each embedding."""
    tile_x_separator: int
    tile_y_separator: int
    image: int
    """Comes before the tile that is the whole picture."""
    image_end: int

    def of_picture(self, grid: tuple[int, int], tokens_per_tile: int, overview: bool = True) -> list[int]:
        """The ids of one picture whose tiles are (rows, columns), each of so many tokens.

        Args:
            overview: whether the whole picture follows several tiles as one more.
        """
        rows, columns = grid
        require_sizes(rows=rows, columns=columns, tokens_per_tile=tokens_per_tile)
        tile = [self.patch] * tokens_per_tile
        ids = [self.image_start]
        if rows * columns > 1:
            row = tile + (columns - 1) * [self.tile_x_separator, *tile]
            ids += rows * [*row, self.tile_y_separator]
            if not overview:
                return [*ids, self.image_end]
        return [*ids, self.image, *tile, self.image_end]


def tile_grid(height: int, width: int, tile_size: int, max_tiles: int = 16) -> tuple[int, int]:
    """The (rows, columns) of tiles for a picture of this size, at most `max_tiles` of them.

    It is the grid that the picture has to be enlarged least for, else the one that it has to be shrunk least for; of
    several, the one of least area.
    """
    require_sizes(height=height, width=width, tile_size=tile_size, max_tiles=max_tiles)
    grids = [(rows, n // rows) for n in range(max_tiles, 0, -1) for rows in range(1, n + 1) if n % rows == 0]
    sizes = torch.tensor(grids) * tile_size
    scales = torch.minimum(sizes[:, 0] / height, sizes[:, 1] / width)  # fp32, as theirs: ties are ties
    enlarging = scales[scales >= 1]
    chosen = enlarging.min() if len(enlarging) else scales.max()
    fitting = [grid for grid, scale in zip(grids, scales.tolist(), strict=True) if scale == chosen.item()]
    return min(fitting, key=lambda grid: grid[0] * grid[1])  # one: rows of one and columns of another fit too


def split_into_tiles(
    image: Tensor, tile_size: int, max_tiles: int = 16, mean: float = 0.5, std: float = 0.5
) -> tuple[Tensor, tuple[int, int]]:
    """image (C, H, W) of uint8 -> normalized tiles (M, C, tile_size, tile_size) in fp32, and their (rows, columns).

    Tiles follow each other row by row; if there are several, the whole picture, distorted to a square, is the last.
    Values are rounded to bf16, as Meta's code has them.

    Raises:
        TypeError: no tensor of uint8.
        ValueError: another shape, or a side without pixels.
    """
    require_tensor("split_into_tiles", "image", image, (None, None, None), torch.uint8)
    grid = tile_grid(image.size(1), image.size(2), tile_size, max_tiles)
    scaled = fit_into_tiles(image, tile_size, grid).to(torch.bfloat16) * (1 / 255)
    return ((scaled - mean) / std).float(), grid


def fit_into_tiles(image: Tensor, tile_size: int, grid: tuple[int, int]) -> Tensor:
    """image (C, H, W) of uint8 -> tiles (M, C, tile_size, tile_size) of a grid (rows, columns), as `split_into_tiles`.

    The picture is enlarged at most until its shorter side fills a tile. What is left at the right and below is black.

    Raises:
        TypeError: no tensor of uint8.
        ValueError: another shape.
    """
    require_tensor("fit_into_tiles", "image", image, (None, None, None), torch.uint8)
    height, width = image.shape[1:]
    rows, columns = grid
    require_sizes(height=height, width=width, tile_size=tile_size, rows=rows, columns=columns)
    canvas = rows * tile_size, columns * tile_size
    room = min(max(height, tile_size), canvas[0]), min(max(width, tile_size), canvas[1])
    fitted = _resized(image, _largest_within(height, width, room))
    padded = F.pad(fitted, (0, canvas[1] - fitted.size(2), 0, canvas[0] - fitted.size(1)))
    tiles = rearrange(padded, "c (h p) (w q) -> (h w) c p q", h=rows, w=columns)
    if len(tiles) == 1:
        return tiles
    return torch.cat((tiles, _resized(image, (tile_size, tile_size))[None]))


def _largest_within(height: int, width: int, room: tuple[int, int]) -> tuple[int, int]:
    """The largest size of the same aspect ratio, rounded down, that fits into `room`."""
    across, down = room[1] / width, room[0] / height
    if across < down:
        return max(1, min(int(height * across), room[0])), room[1]
    return room[0], max(1, min(int(width * down), room[1]))


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear with antialiasing, in uint8."""
    if image.shape[1:] == size:
        return image
    return F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=True)[0]
