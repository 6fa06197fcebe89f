"""Text and pictures in one stream of batches, in a ratio that a schedule moves."""

import math
from collections.abc import Callable, Iterator

import torch

from moesaic.data.images import PictureEvaluationLoader, PictureTrainingLoader
from moesaic.data.loaders import Batch, EvaluationLoader, ResumableLoader, TrainingLoader

__all__ = ["MixedEvaluationLoader", "MixedTrainingLoader", "picture_rows"]


def picture_rows(batch: Batch) -> torch.Tensor:
    """Rows of a batch that have a picture, (B,) bool."""
    found = torch.zeros(batch["tokens"].size(0), dtype=torch.bool, device=batch["tokens"].device)
    if "image_rows" in batch:
        found[batch["image_rows"]] = True
    return found


class MixedTrainingLoader(ResumableLoader):
    """Batches whose first rows are windows of text and whose last rows are packed samples with pictures.

    Rows are whole, so a batch is the nearest to the share that leaves nothing behind: after i batches there were
    floor(sum of shares * B + 1/2) rows with pictures. Both streams go on where they stopped, as pure functions of
    (seed, number of the row). A batch without pictures is one of `text`, with nothing beside.
    Ranks share these batches, and their pictures evenly: a rank can have none where others have one.

    Args:
        text, pictures: of one length and batch size; only their rows are used.
        share: batch number -> the share of rows with pictures, from 0 to 1.
    """

    def __init__(
        self, text: TrainingLoader, pictures: PictureTrainingLoader, share: Callable[[int], float], *, num_batches: int
    ) -> None:
        super().__init__(
            batch_size=text.batch_size, num_batches=num_batches, rank=text.rank, world_size=text.world_size
        )
        self.text = text
        self.pictures = pictures
        self._rows = self.batch_size * self.world_size
        """Rows of a batch on all ranks."""
        self._before = [0]
        """Rows with pictures before each batch, and after the last."""
        total = 0.0
        for i in range(num_batches):
            total += share(i) * self._rows
            self._before.append(max(self._before[-1], min(math.floor(total + 0.5), self._before[-1] + self._rows)))

    def num_picture_rows(self, i: int) -> int:
        """Rows with pictures in batch i, on all ranks."""
        return self._before[i + 1] - self._before[i]

    def batch(self, i: int) -> Batch:
        first, last = self._before[i], self._before[i + 1]
        of_text = range(i * self._rows - first, (i + 1) * self._rows - last)[self.rank :: self.world_size]
        # from the other end, so that every rank has batch_size rows in all
        of_pictures = range(first, last)[self.world_size - 1 - self.rank :: self.world_size]
        if not of_text:
            return self.pictures.rows(of_pictures)
        text = self.text.rows(of_text)
        if not of_pictures:
            return text
        pictures = self.pictures.rows(of_pictures)
        both = {name: torch.cat((text[name], pictures[name])) for name in ("tokens", "labels")}
        valid = torch.cat((torch.ones_like(text["tokens"], dtype=torch.bool), pictures["valid"]))
        rows = pictures["image_rows"] + len(of_text)
        return {**both, "valid": valid, "images": pictures["images"], "image_rows": rows}


class MixedEvaluationLoader:
    """The batches of a text split, then those of splits of pictures."""

    def __init__(self, text: EvaluationLoader, pictures: PictureEvaluationLoader) -> None:
        self.text = text
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.text) + len(self.pictures)

    def __iter__(self) -> Iterator[Batch]:
        yield from self.text
        yield from self.pictures
