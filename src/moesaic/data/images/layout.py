"""Samples to token ids: image tokens hold the places of pictures, ids beside them say how the tiles lie."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moesaic.data.images.sample import ImageText, Picture, Pixels, Text
from moesaic.data.tasks.task import Ints
from moesaic.data.tokenizers import Ids, Tokenizer
from moesaic.models.tiles import TileTokens

__all__ = ["Encoded", "Layout", "pixel_values"]

SPECIAL = ("image", "begin", "end", "whole", "next_column", "next_row")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a picture stands among token ids; the order is that of Llama 4's processor.

    A picture of one tile is `begin whole image... end`. One of several tiles is `begin`, the image tokens of each tile,
    `next_column` between the tiles of a row, `next_row` behind each row, and `end`. If it has an overview, `whole` and
    the image tokens of that stand before `end`. The six ids follow those of the tokenizer.

    Args:
        tile_tokens: image tokens of a tile, as `VisionConfig.num_tokens()` has it.
    """

    tokenizer: Tokenizer
    tile_tokens: int

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size + len(SPECIAL)

    @property
    def image(self) -> int:
        """The id at every place of an image: `MultimodalConfig.image_token`."""
        return self.tokenizer.vocab_size

    def id_of(self, name: str) -> int:
        """The id of one of `SPECIAL`."""
        return self.tokenizer.vocab_size + SPECIAL.index(name)

    def picture_ids(self, picture: Picture) -> list[int]:
        """The token ids that stand for a picture."""
        ids = TileTokens(
            image_start=self.id_of("begin"),
            patch=self.image,
            tile_x_separator=self.id_of("next_column"),
            tile_y_separator=self.id_of("next_row"),
            image=self.id_of("whole"),
            image_end=self.id_of("end"),
        )
        return ids.of_picture(picture.grid, self.tile_tokens, picture.overview)

    def lengths(self, samples: Sequence[ImageText]) -> list[int]:
        """The number of ids of each sample."""
        texts = iter(self._ids_of_texts(samples))
        return [
            sum(
                len(next(texts)) + part.asked if isinstance(part, Text) else len(self.picture_ids(part))
                for part in sample.parts
            )
            for sample in samples
        ]

    def encode(self, samples: Sequence[ImageText]) -> "list[Encoded]":
        """The ids of samples; no picture is drawn."""
        texts, found = iter(self._ids_of_texts(samples)), []
        for sample in samples:
            tokens, asked = list[Ints](), list[bool]()
            for part in sample.parts:
                if isinstance(part, Text):
                    ids = next(texts).astype(np.int64)
                    ids = np.append(ids, self.tokenizer.end_of_text) if part.asked else ids
                else:
                    ids = np.array(self.picture_ids(part), dtype=np.int64)
                tokens.append(ids)
                asked += [isinstance(part, Text) and part.asked] * len(ids)
            found.append(Encoded(np.concatenate(tokens), np.array(asked, dtype=np.bool_)))
        return found

    def _ids_of_texts(self, samples: Sequence[ImageText]) -> list[Ids]:
        return self.tokenizer.encode_batch([text.text.encode() for sample in samples for text in sample.texts])


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A sample as token ids."""

    tokens: Ints
    """(n,)"""
    asked: npt.NDArray[np.bool_]
    """(n,): whether the model is to predict the token."""


def pixel_values(tiles: Pixels) -> Tensor:
    """Tiles (n, C, H, W) of bytes as fp32 numbers from -1 to 1, as Llama 4's processor makes them."""
    return torch.from_numpy(tiles).float().div_(127.5).sub_(1)
