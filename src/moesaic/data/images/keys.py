"""Keys that all sources of pictures share: what a tile is."""

import dataclasses
from abc import ABC, abstractmethod

from moesaic.data.images.sample import Samples

__all__ = ["PictureKeys", "Place"]


@dataclasses.dataclass(frozen=True)
class Place:
    """What a source needs beside its own keys."""

    cache_dir: str
    path: str | None = None
    validation_fraction: float = 0.06


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureKeys(ABC):
    """A source of pictures; the fields of its dataclass are the keys of `data.task`.

    Args:
        side: pixels of the side of a tile; `image_size` of the model's encoder.
        tile_tokens: image tokens that stand for a tile; `VisionConfig.num_tokens()` of the model's encoder.
        channels: 1 for gray, 3 for color; `num_channels` of the model's encoder.
    """

    side: int = dataclasses.field(default=32, metadata={"most": 2**12})
    tile_tokens: int = dataclasses.field(default=4, metadata={"most": 2**14})
    channels: int = 1

    def __post_init__(self) -> None:
        if self.side < 8:
            raise ValueError(f"side={self.side}: must be a number >= 8, in pixels")
        if self.tile_tokens < 1:
            raise ValueError(f"tile_tokens={self.tile_tokens}: must be a number >= 1")
        if self.channels not in (1, 3):
            raise ValueError(f"channels={self.channels}: must be 1 or 3")

    @abstractmethod
    def load(self, place: Place) -> Samples:
        """The samples of the source.

        Raises:
            InputError: a file, a folder or a package that cannot be used; it names the key.
        """
