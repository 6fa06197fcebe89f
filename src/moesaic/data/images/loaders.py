"""Batches of samples: for training packed and a pure function of (seed, batch number), for tests one by one."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from moesaic.data.images.layout import Encoded, Layout, pixel_values
from moesaic.data.images.packing import pack
from moesaic.data.images.sample import TRAIN, ImageText, Picture, Samples
from moesaic.data.loaders import Batch, ResumableLoader
from moesaic.data.tasks.task import Ints
from moesaic.errors import InputError
from moesaic.losses.cross_entropy import IGNORE_INDEX

__all__ = ["PictureEvaluationLoader", "PictureTrainingLoader", "lengths_of", "require_length"]

BLOCK = 4096
"""Samples that are encoded at once when their lengths are looked up."""


class PictureTrainingLoader(ResumableLoader):
    """num_batches batches of packed samples, with the pixels of their pictures beside the tokens.

    A batch is {"tokens", "labels", "valid"}, each (B, L), "images", (M, C, side, side) fp32 from -1 to 1, and
    "image_rows", (M,) int64, the row of each tile. Tiles of one row are in the order of their tokens. Labels are -100
    but for what is asked; behind the last sample of a row stand end-of-text ids that are not valid.

    An epoch has every sample once, in an order that depends on (seed, epoch), and so does what augments a picture. So
    batch i needs no memory of the batches before it.

    Args:
        seq_len: L.
        batch_size: B, per rank.
        packed: whether a row holds as many samples as fit; else it holds one.
        rank, world_size: the ranks share each global batch of world_size * B rows.

    Raises:
        InputError: a split without samples, or a sample that is longer than seq_len.
    """

    def __init__(
        self,
        samples: Samples,
        layout: Layout,
        *,
        seq_len: int,
        batch_size: int,
        num_batches: int,
        seed: int,
        packed: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(batch_size=batch_size, num_batches=num_batches, rank=rank, world_size=world_size)
        self.samples = samples
        self.layout = layout
        self.seq_len = seq_len
        self.seed = seed
        self.packed = packed
        self._lengths = lengths_of(samples, layout, TRAIN)
        require_length(samples, self._lengths, seq_len, "training.seq_len")
        self._ends: list[int] = []
        """How many rows there are up to the end of each epoch, as far as they have been counted."""
        self._epoch, self._rows = -1, list[Ints]()

    def batch(self, i: int) -> Batch:
        return self.rows(self.numbers(i))

    def rows(self, numbers: Iterable[int]) -> Batch:
        """The rows of these numbers, counted from the beginning of the run."""
        rows = []
        for number in numbers:
            epoch, chosen = self._row(number)
            drawn = [np.random.default_rng((self.seed, epoch, int(index))) for index in chosen]
            rows.append(([self.samples.sample(TRAIN, int(index)) for index in chosen], drawn))
        return _batch(rows, self.layout, self.samples, self.seq_len)

    def _row(self, number: int) -> tuple[int, Ints]:
        """The epoch of a row, and the numbers of its samples."""
        while not self._ends or number >= self._ends[-1]:
            rows = self._plan(len(self._ends))
            self._ends.append((self._ends[-1] if self._ends else 0) + len(rows))
        epoch = int(np.searchsorted(self._ends, number, side="right"))
        return epoch, self._plan(epoch)[number - (self._ends[epoch - 1] if epoch else 0)]

    def _plan(self, epoch: int) -> list[Ints]:
        """The samples of each row of an epoch."""
        if epoch != self._epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self._lengths))
            self._rows = pack(self._lengths, order, self.seq_len) if self.packed else list(order[:, None])
            self._epoch = epoch
        return self._rows


class PictureEvaluationLoader:
    """Samples of test splits, one a row and as they are, in batches like those of `PictureTrainingLoader`.

    A row holds one sample, so that no answer stands before the question of another. "samples" (B,) and "splits" (B,)
    are numbers: of the sample in its split, and of the split in `Samples.splits`. L is that of the longest sample of a
    batch. Sample i does not depend on batch_size or on the run's seed. With max_batches, that many batches of samples
    spread evenly over the splits.

    Args:
        splits: names of them; None: all but that for training.
        shuffled: whether every sample gets the pictures of another one with other text. What a model then says, it says
            without having seen them: the control that every number needs. A sample that alone has so many tiles keeps
            its own.

    Raises:
        InputError: a split that the samples do not have, none that has samples, or a sample longer than seq_len.
    """

    def __init__(
        self,
        samples: Samples,
        layout: Layout,
        *,
        seq_len: int,
        batch_size: int,
        splits: Sequence[str] | None = None,
        max_batches: int | None = None,
        shuffled: bool = False,
    ) -> None:
        names = samples.splits[1:] if splits is None else tuple(splits)
        if unknown := [name for name in names if name not in samples.splits]:
            raise InputError(f"split {unknown[0]!r}: must be one of {', '.join(samples.splits)}")
        places = [(samples.splits.index(name), index) for name in names for index in range(samples.size(name))]
        if not places:
            raise InputError(
                f"data.source={samples.facts['source']!r}: no samples in {', '.join(names)}; must have some"
            )
        if max_batches is not None and max_batches * batch_size < len(places):
            chosen = np.linspace(0, len(places) - 1, max_batches * batch_size).round().astype(np.int64)
            places = [places[i] for i in chosen.tolist()]
        self.samples = samples
        self.layout = layout
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.shuffled = shuffled
        self.places = places

    def __len__(self) -> int:
        return -(-len(self.places) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, len(self.places), self.batch_size):
            yield self._batch(first)

    def _batch(self, first: int) -> Batch:
        rows = [
            ([self._sample(place)], [None]) for place in range(first, min(first + self.batch_size, len(self.places)))
        ]
        longest = max(self.layout.lengths([row[0][0] for row in rows]))
        require_length(self.samples, np.array([longest]), self.seq_len, "training.validation_seq_len")
        batch = _batch(rows, self.layout, self.samples, longest)
        numbers = torch.tensor(self.places[first : first + self.batch_size], dtype=torch.int64)
        return {**batch, "splits": numbers[:, 0], "samples": numbers[:, 1]}

    def _given(self, place: int) -> ImageText:
        split, index = self.places[place % len(self.places)]
        return self.samples.sample(self.samples.splits[split], index)

    def _sample(self, place: int) -> ImageText:
        """The sample there; shuffled, with the pictures of the first one from half the way on that fits."""
        sample = self._given(place)
        if not self.shuffled:
            return sample
        grids = [(picture.grid, picture.overview) for picture in sample.pictures]
        half = len(self.places) // 2
        for other in map(self._given, range(place + half, place + half + len(self.places))):
            if other.texts == sample.texts or [(each.grid, each.overview) for each in other.pictures] != grids:
                continue
            pictures = iter(other.pictures)
            return ImageText(tuple(next(pictures) if isinstance(part, Picture) else part for part in sample.parts))
        return sample


def lengths_of(samples: Samples, layout: Layout, split: str) -> Ints:
    """The number of tokens of each sample of a split, (n,); no picture is drawn."""
    size, found = samples.size(split), list[int]()
    for first in range(0, size, BLOCK):
        block = [samples.sample(split, index) for index in range(first, min(first + BLOCK, size))]
        found += layout.lengths(block)
    return np.array(found, dtype=np.int64)


def require_length(samples: Samples, lengths: Ints, seq_len: int, key: str) -> None:
    """Raise InputError that names `key` unless there are samples, and none is longer than seq_len."""
    source = samples.facts["source"]
    if not len(lengths):
        raise InputError(f"fusion.pictures ({source}): it has no samples to train on; must have some")
    if lengths.max() > seq_len:
        raise InputError(
            f"{key}={seq_len}: must be at least {lengths.max()}, the tokens of the longest sample of "
            f"fusion.pictures ({source})"
        )


def _batch(
    rows: Sequence[tuple[Sequence[ImageText], Sequence[np.random.Generator | None]]],
    layout: Layout,
    samples: Samples,
    seq_len: int,
) -> Batch:
    """The samples of each row as a batch; each is drawn with its own generator."""
    shape = len(rows), seq_len
    tokens = torch.full(shape, layout.tokenizer.end_of_text)
    labels = torch.full(shape, IGNORE_INDEX)
    valid = torch.zeros(shape, dtype=torch.bool)
    encoded = iter(layout.encode([sample for row, _ in rows for sample in row]))
    tiles, image_rows = [np.zeros((0, samples.channels, samples.side, samples.side), np.uint8)], list[int]()
    for place, (row, generators) in enumerate(rows):
        ids, asked = _joined([next(encoded) for _ in row])
        tokens[place, : len(ids)] = torch.from_numpy(ids)
        valid[place, : len(ids)] = True
        following = torch.from_numpy(np.where(asked, ids, IGNORE_INDEX))[1:]
        labels[place, : len(following)] = following
        for sample, rng in zip(row, generators, strict=True):
            drawn = [picture.tiles(rng) for picture in sample.pictures]
            tiles += drawn
            image_rows += [place] * sum(map(len, drawn))
    return {
        "tokens": tokens,
        "labels": labels,
        "valid": valid,
        "images": pixel_values(np.concatenate(tiles)),
        "image_rows": torch.tensor(image_rows, dtype=torch.int64),
    }


def _joined(row: Sequence[Encoded]) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """The ids of a row, and which of them are asked for."""
    return np.concatenate([each.tokens for each in row]), np.concatenate([each.asked for each in row])
