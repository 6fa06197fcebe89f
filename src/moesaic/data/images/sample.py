"""What a sample is: pictures and text in reading order; and the seam of all sources of them."""

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

__all__ = ["TRAIN", "ImageText", "Picture", "Pixels", "Samples", "Text"]

Pixels = npt.NDArray[np.uint8]

TRAIN = "train"
"""The split that every source has first; the others are for tests."""


@dataclasses.dataclass(frozen=True)
class Text:
    """A piece of text, given or asked for."""

    text: str
    asked: bool = False
    """Whether the model is to say it: then it counts in the loss, and an end-of-text id follows."""
    also: frozenset[str] = frozenset()
    """Other answers that are as right, because they have the very same picture."""


class Picture(ABC):
    """A picture that is drawn when it is needed; how many tiles it has is known before."""

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tiles."""

    @property
    def overview(self) -> bool:
        """Whether a last tile shows all of it, as Llama 4 adds one to a picture of several tiles."""
        return False

    @abstractmethod
    def tiles(self, rng: np.random.Generator | None) -> Pixels:
        """The tiles row by row, then the overview if there is one: (n, C, side, side).

        Args:
            rng: what augments the picture, the same for the same state of it; None: the picture as it is.
        """

    @property
    def num_tiles(self) -> int:
        rows, columns = self.grid
        return rows * columns + self.overview


@dataclasses.dataclass(frozen=True)
class ImageText:
    """Pictures and text in reading order."""

    parts: tuple[Picture | Text, ...]

    @property
    def pictures(self) -> list[Picture]:
        return [part for part in self.parts if isinstance(part, Picture)]

    @property
    def texts(self) -> list[Text]:
        return [part for part in self.parts if isinstance(part, Text)]


class Samples(ABC):
    """A finite source of samples in several splits; what is in a split depends on no run."""

    splits: ClassVar[tuple[str, ...]]
    """The name of each split, `TRAIN` first."""
    side: int
    """Pixels of the side of a tile."""
    channels: int
    """1 or 3."""
    facts: dict[str, Any]
    """What identifies the source: `source`, `content_hash` and what it says of itself. It goes into rows."""

    @abstractmethod
    def size(self, split: str) -> int:
        """How many samples a split has."""

    @abstractmethod
    def sample(self, split: str, index: int) -> ImageText:
        """Sample `index` of a split: a pure function of the source and these arguments."""
