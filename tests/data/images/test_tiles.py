"""Pictures among token ids, by hand and as Llama 4's processor has them; pictures cut into tiles."""

import types
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_pictures import BEGIN, COLUMN, END, END_OF_TEXT, IMAGE, LAYOUT, ROW, WHOLE, Plain

from moesaic.data.images import ImageText, Text, pixel_values
from moesaic.data.images.picture_files import fitted
from moesaic.models import tile_grid

TILE = [IMAGE, IMAGE]


def test_ids_of_pictures_by_hand() -> None:
    assert LAYOUT.picture_ids(Plain(0)) == [BEGIN, WHOLE, *TILE, END]
    one_row = LAYOUT.picture_ids(Plain(0, (1, 2)))
    assert one_row == [BEGIN, *TILE, COLUMN, *TILE, ROW, END]
    square = LAYOUT.picture_ids(Plain(0, (2, 2), overview=True))
    row = [*TILE, COLUMN, *TILE, ROW]
    assert square == [BEGIN, *row, *row, WHOLE, *TILE, END]
    assert LAYOUT.vocab_size == 263
    assert LAYOUT.image == IMAGE


def test_a_sample_by_hand() -> None:
    sample = ImageText((Text("A"), Plain(0), Text("B"), Text("CD", asked=True), Plain(1), Text("E", asked=True)))
    encoded = LAYOUT.encode([sample])[0]
    picture = [BEGIN, WHOLE, *TILE, END]
    assert encoded.tokens.tolist() == [65, *picture, 66, 67, 68, END_OF_TEXT, *picture, 69, END_OF_TEXT]
    assert encoded.tokens[encoded.asked].tolist() == [67, 68, END_OF_TEXT, 69, END_OF_TEXT]
    assert LAYOUT.lengths([sample]) == [len(encoded.tokens)]


def test_a_picture_written_in_a_text_is_text() -> None:
    encoded = LAYOUT.encode([ImageText((Text("<|image|>é", asked=True),))])[0]
    assert encoded.tokens.max() <= END_OF_TEXT


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(1, 1), (1, 3), (2, 1), (3, 2)])
def test_ids_are_in_the_order_of_the_processor_of_llama_4(grid: tuple[int, int]) -> None:
    processing = pytest.importorskip("transformers.models.llama4.processing_llama4")
    of_processor: Any = processing.Llama4Processor._prompt_split_image(types.SimpleNamespace(), grid, 2)
    names = ["patch", "image_start", "image_end", "image", "tile_x_separator", "tile_y_separator"]
    ours = LAYOUT.picture_ids(Plain(0, grid, overview=grid != (1, 1)))
    assert "".join(f"<|{names[i - IMAGE]}|>" for i in ours) == of_processor


def test_pixel_values_are_from_minus_one_to_one() -> None:
    values = pixel_values(np.array([[[[0, 255, 51]]]], dtype=np.uint8))
    np.testing.assert_allclose(values.numpy(), [[[[-1, 1, -0.6]]]], atol=1e-7)


def test_grids_by_hand() -> None:
    assert tile_grid(20, 20, tile_size=32, max_tiles=4) == (1, 1)  # enlarged to one tile
    assert tile_grid(32, 96, tile_size=32, max_tiles=4) == (1, 3)  # exactly
    assert tile_grid(60, 60, tile_size=32, max_tiles=4) == (2, 2)
    assert tile_grid(1000, 100, tile_size=32, max_tiles=4) == (4, 1)  # shrunk least
    assert tile_grid(1000, 1000, tile_size=32, max_tiles=3) == (1, 1)  # more tiles would not show more


@pytest.mark.slow
@given(height=st.integers(1, 700), width=st.integers(1, 700), most=st.integers(1, 16))
def test_grids_are_those_of_the_processor_of_llama_4(height: int, width: int, most: int) -> None:
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.models.llama4.image_processing_llama4")
    size = types.SimpleNamespace(height=48, width=48)
    theirs.find_supported_resolutions.cache_clear()  # its keys are objects without a hash of their content
    options = torch.tensor(sorted(theirs.find_supported_resolutions.__wrapped__(most, size)))
    canvas = theirs.get_best_fit((height, width), options)
    rows, columns = tile_grid(height, width, 48, most)
    chosen = [48 * rows, 48 * columns]
    scale = min(chosen[0] / height, chosen[1] / width)
    assert scale == pytest.approx(min(int(canvas[0]) / height, int(canvas[1]) / width))
    assert rows * columns * 48 * 48 == int(canvas[0] * canvas[1])


def test_a_picture_is_cut_row_by_row_and_shown_whole_at_the_end() -> None:
    picture = np.repeat(np.repeat(np.array([[10, 20, 30], [40, 50, 60]], dtype=np.uint8), 16, axis=0), 16, axis=1)
    tiles = fitted(picture[:, :, None], 16, (2, 3))
    assert tiles.shape == (7, 1, 16, 16)
    for tile, value in zip(tiles[:6], (10, 20, 30, 40, 50, 60), strict=True):
        np.testing.assert_array_equal(tile, value)
    assert tiles[6].min() >= 10 > 0
    assert tiles[6, 0, 0, 0] == 10
    assert tiles[6, 0, -1, -1] == 60


def test_proportions_stay_and_the_rest_is_black() -> None:
    tiles = fitted(np.full((10, 20, 3), 200, dtype=np.uint8), 16, (1, 1))
    assert tiles.shape == (1, 3, 16, 16)
    np.testing.assert_array_equal(tiles[0, :, :8], 200)
    np.testing.assert_array_equal(tiles[0, :, 8:], 0)
