"""Pairs of one picture and one text, for contrastive training: balanced by concept, in batches of pairs."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from moesaic.data.images.layout import Layout, pixel_values
from moesaic.data.images.sample import TRAIN, Samples
from moesaic.data.loaders import Batch, ResumableLoader
from moesaic.errors import InputError
from moesaic.losses.cross_entropy import IGNORE_INDEX

__all__ = ["PairEvaluationLoader", "PairTrainingLoader", "concept_probabilities", "curated"]

Place = tuple[str, int]
"""A split, and the number of a sample in it."""


def concept_probabilities(texts: Sequence[str], cap: int) -> list[tuple[float, ...]]:
    """How likely each concept of each text is to choose it: min(1, cap / texts that have the concept).

    This is the balancing of MetaCLIP (Xu et al. 2023, arXiv 2309.16671, algorithm 1), whose cap is t: a concept keeps
    about `cap` texts, and all of its texts if it has fewer. Here a concept is a word; a repeated one counts once.
    """
    concepts = [dict.fromkeys(text.split()) for text in texts]
    counts = Counter(concept for each in concepts for concept in each)
    return [tuple(min(1.0, cap / counts[concept]) for concept in each) for each in concepts]


def curated(probabilities: Sequence[tuple[float, ...]], rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """The numbers of the texts that at least one of their concepts chooses, each concept by its own draw."""
    refused = np.array([np.prod([1.0 - each for each in of_text]) for of_text in probabilities])
    return np.flatnonzero(rng.random(len(refused)) >= refused)


class _Pairs:
    """The batch of some pairs: {"tokens", "labels", "valid"} (B, L), "images" (B, C, side, side), "groups" (B,).

    A row of tokens is a text and the end-of-text id, the only place that has a label: there stands what the model knows
    of the text. Rows of one text are one group. L is that of the longest text, at most seq_len.
    """

    def __init__(self, samples: Samples, layout: Layout, seq_len: int) -> None:
        self.samples = samples
        self.layout = layout
        self.seq_len = seq_len

    def require_short_texts(self) -> None:
        """Raise InputError if the longest text of any split does not fit."""
        samples = self.samples
        of_all = (samples.sample(split, i).texts for split in samples.splits for i in range(samples.size(split)))
        texts = list(dict.fromkeys(text.text for each in of_all for text in each))
        lengths = [len(ids) for ids in self.layout.tokenizer.encode_batch([text.encode() for text in texts])]
        if (most := max(lengths, default=0)) >= self.seq_len:
            longest = texts[lengths.index(most)]
            raise InputError(
                f"training.seq_len={self.seq_len}: the text {longest!r} has {most} tokens; must be at least {most + 1}"
            )

    def batch(self, places: Sequence[Place], generators: Sequence[np.random.Generator | None]) -> Batch:
        samples = [self.samples.sample(*place) for place in places]
        for place, sample in zip(places, samples, strict=True):
            if len(sample.pictures) != 1 or sample.pictures[0].num_tiles != 1 or len(sample.texts) != 1:
                raise InputError(
                    f"fusion.pictures.source={self.samples.facts['source']!r}: sample {place[1]} is no pair of one "
                    "tile and one text; stage contrastive must have such, as glyphs are"
                )
        texts = [sample.texts[0].text for sample in samples]
        end = self.layout.tokenizer.end_of_text
        encoded = self.layout.tokenizer.encode_batch([text.encode() for text in texts])
        tokens = torch.full((len(texts), 1 + max(map(len, encoded))), end)
        labels = torch.full_like(tokens, IGNORE_INDEX)
        for row, ids in enumerate(encoded):
            tokens[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
            labels[row, len(ids)] = end
        drawn = [sample.pictures[0].tiles(rng) for sample, rng in zip(samples, generators, strict=True)]
        return {
            "tokens": tokens,
            "labels": labels,
            "valid": torch.arange(tokens.size(1)) <= (labels != IGNORE_INDEX).int().argmax(dim=1, keepdim=True),
            "images": pixel_values(np.concatenate(drawn)),
            "groups": torch.tensor([_group(text) for text in texts]),
        }


def _group(text: str) -> int:
    """The same number for the same text, on every rank."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


class PairTrainingLoader(ResumableLoader):
    """num_batches batches of training pairs, as `_Pairs` makes them.

    An epoch has every pair that is chosen in it once: which ones, their order and what augments the pictures depend on
    (seed, epoch). So batch i needs no memory of the batches before it.

    Args:
        seq_len: L, more than the tokens of any text.
        batch_size: B, per rank.
        cap: of `concept_probabilities`; None: all pairs, in each epoch.

    Raises:
        InputError: samples that are no pairs, too long a text, or fewer pairs in an epoch than a batch has.
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
        cap: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(batch_size=batch_size, num_batches=num_batches, rank=rank, world_size=world_size)
        self.samples = samples
        self.seed = seed
        self._pairs = _Pairs(samples, layout, seq_len)
        self._pairs.require_short_texts()
        self._probabilities: list[tuple[float, ...]] | None = None
        if cap is not None:
            parts = (samples.sample(TRAIN, index).texts for index in range(samples.size(TRAIN)))
            self._probabilities = concept_probabilities([" ".join(each.text for each in texts) for texts in parts], cap)
        self._epoch, self._order, self._ends = -1, np.zeros(0, dtype=np.int64), list[int]()
        if batch_size * world_size > (found := len(self._chosen(0))):
            raise InputError(
                f"training.batch_size={batch_size * world_size}: an epoch has {found} pairs; must be at most as many"
            )

    def batch(self, i: int) -> Batch:
        rows = [self._row(number) for number in self.numbers(i)]
        drawn = [np.random.default_rng((self.seed, epoch, index)) for epoch, index in rows]
        return self._pairs.batch([(TRAIN, index) for _, index in rows], drawn)

    def _row(self, number: int) -> tuple[int, int]:
        """The epoch of a pair, and its number."""
        while not self._ends or number >= self._ends[-1]:
            self._ends.append((self._ends[-1] if self._ends else 0) + len(self._chosen(len(self._ends))))
        epoch = int(np.searchsorted(self._ends, number, side="right"))
        return epoch, int(self._chosen(epoch)[number - (self._ends[epoch - 1] if epoch else 0)])

    def _chosen(self, epoch: int) -> npt.NDArray[np.int64]:
        """The pairs of an epoch, in its order."""
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, epoch))
            everyone = np.arange(self.samples.size(TRAIN))
            chosen = everyone if self._probabilities is None else curated(self._probabilities, rng)
            self._order, self._epoch = rng.permutation(chosen), epoch
        return self._order


class PairEvaluationLoader:
    """Pairs of test splits as they are, spread evenly over these, in batches like those of `PairTrainingLoader`.

    Args:
        splits: names of them; None: all but that for training.
        max_batches: None: all pairs.

    Raises:
        InputError: no pair at all, or too long a text.
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
    ) -> None:
        names = samples.splits[1:] if splits is None else tuple(splits)
        places = [(name, index) for name in names for index in range(samples.size(name))]
        if not places:
            raise InputError(f"fusion.pictures.source={samples.facts['source']!r}: no pair in {', '.join(names)}")
        if max_batches is not None and max_batches * batch_size < len(places):
            chosen = np.linspace(0, len(places) - 1, max_batches * batch_size).round().astype(np.int64)
            places = [places[i] for i in chosen.tolist()]
        self.places = places
        self.batch_size = batch_size
        self._pairs = _Pairs(samples, layout, seq_len)

    def __len__(self) -> int:
        return -(-len(self.places) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, len(self.places), self.batch_size):
            # strided, so that each batch is of all splits
            places = self.places[first // self.batch_size :: len(self)]
            yield self._pairs.batch(places, [None] * len(places))
