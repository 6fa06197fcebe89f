"""What a model says of held-out pictures: bits per character, exact answers, ranks and edits, with chance beside each.

All numbers are of fixed samples, the same for every run.
"""

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.data import PictureData
from moesaic.data.images import TRAIN, ImageText, Layout, Picture, Samples, Text, pixel_values
from moesaic.data.tasks.task import Ints
from moesaic.data.tokenizers import ByteTokenizer
from moesaic.errors import InputError
from moesaic.evaluation.reading_back import character_error_rate
from moesaic.losses import token_cross_entropy
from moesaic.losses.cross_entropy import IGNORE_INDEX
from moesaic.models import MultimodalDecoder, generate

__all__ = ["Answer", "Ranks", "answers", "name_scores", "naming_numbers", "ranks", "some_of", "splits_with_samples"]

SAMPLE_SEED = 0
"""Seed of the samples that are drawn: runs of all seeds are judged on the same ones."""

MOST_TRAINING_ANSWERS = 20_000
"""Training samples from whose answers the frequencies of bytes are counted."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model says where a text is asked for."""

    sample: ImageText
    """What the model was given: all that stands before the answer."""
    right: Text
    said: str

    @property
    def is_right(self) -> bool:
        """Whether it is a name of the very same picture."""
        return self.said == self.right.text or self.said in self.right.also


def naming_numbers(
    model: MultimodalDecoder,
    data: PictureData,
    *,
    splits: Sequence[str] | None = None,
    samples: int = 500,
    ranked: int = 100,
    batch_size: int = 128,
) -> dict[str, float]:
    """Numbers by split, called "pictures/SPLIT/NAME".

    - bits_per_character, bits_per_byte: of what is asked, its end of text included, which counts as no character. With
      _shuffled, the model has the picture of another sample. With _unigram and _bigram, chance: bytes by their
      frequencies in training answers, alone or after the byte before, whatever the tokenizer.
    - exact: answers by greedy decoding that are a name of the very same picture. Decoding ends behind the length of the
      longest right answer. exact_chance: the one answer that is right most often.
    - character_error_rate: see `character_error_rate`; 1 is reached by saying nothing.
    - rank, recall_at_1: see `ranks`, by `name_scores`; where each sample asks for one text. With _chance, of names in
      random order.

    Args:
        splits: names of test splits; None: all that have samples.
        samples: of each split, at most.
        ranked: how many of them are ranked.
        batch_size: rows at a time. It decides no number, but for rounding and routers that depend on the batch.

    Raises:
        InputError: a split that there is not, or no samples.
    """
    names = splits_with_samples(data.samples) if splits is None else list(splits)
    chosen = some_of(data.samples, names, samples)
    few = dataclasses.replace(data, samples=chosen)
    frequencies = _Frequencies(data)
    numbers: dict[str, float] = {}
    was_training = model.training
    model.eval()
    try:
        for split in names:
            found = {**_bits(model, few, split, frequencies, batch_size), **_said(model, few, split, batch_size)}
            found |= _ranked(model, some_of(chosen, [split], ranked), few.layout, split, batch_size)
            numbers |= {f"pictures/{split}/{name}": value for name, value in found.items()}
    finally:
        model.train(was_training)
    return numbers


def splits_with_samples(samples: Samples) -> list[str]:
    """The test splits that are not empty."""
    return [name for name in samples.splits[1:] if samples.size(name)]


def some_of(samples: Samples, splits: Sequence[str], number: int) -> Samples:
    """At most `number` samples of each split, always the same ones; the first of a fixed random order.

    Raises:
        InputError: a split that there is not or that has no samples, or a number below 1.
    """
    if number < 1:
        raise InputError(f"samples={number}: must be a number >= 1")
    for split in splits:
        if split not in samples.splits:
            raise InputError(f"split {split!r}: must be one of {', '.join(samples.splits)}")
        if not samples.size(split):
            raise InputError(f"split {split!r}: it has no samples; must have some")
    return _Some(samples, splits, number)


class _Some(Samples):
    def __init__(self, whole: Samples, splits: Sequence[str], number: int) -> None:
        self.splits = (TRAIN, *splits)  # type: ignore[misc]  # fewer than those of its class
        self.side, self.channels, self.facts = whole.side, whole.channels, whole.facts
        self._whole = whole
        self._chosen = {name: _some(whole.size(name), number) for name in splits}

    def size(self, split: str) -> int:
        return len(self._chosen[split])

    def sample(self, split: str, index: int) -> ImageText:
        return self._whole.sample(split, int(self._chosen[split][index]))


def _some(size: int, number: int) -> Ints:
    """At most `number` of 0 to size - 1."""
    return np.random.default_rng((SAMPLE_SEED, size)).permutation(size)[:number].astype(np.int64)


# ---- bits


class _Frequencies:
    """How often bytes follow each other in training answers, one more than counted; an answer begins after an end."""

    def __init__(self, data: PictureData) -> None:
        drawn = _some(data.samples.size(TRAIN), MOST_TRAINING_ANSWERS).tolist()
        texts = [text for i in drawn for text in data.samples.sample(TRAIN, i).texts if text.asked]
        before, ids = _pairs_of_bytes(texts)
        ones = torch.ones(ids.shape, dtype=torch.float64)
        words = ByteTokenizer.vocab_size
        self.alone = torch.ones(words, dtype=torch.float64).index_add_(0, ids, ones)
        self.after = torch.ones(words, words, dtype=torch.float64).index_put_((before, ids), ones, accumulate=True)

    def bits(self, texts: Sequence[Text]) -> dict[str, float]:
        """Bits of all texts together."""
        before, ids = _pairs_of_bytes(texts)
        alone = self.alone[ids] / self.alone.sum()
        after = self.after[before, ids] / self.after.sum(dim=1)[before]
        return {"unigram": -float(alone.log2().sum()), "bigram": -float(after.log2().sum())}


def _pairs_of_bytes(texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
    """The byte before each byte of all texts, and each of these; an end stands behind every text."""
    end = np.array([ByteTokenizer.end_of_text], dtype=np.int64)
    encoded = ByteTokenizer().encode_batch([text.text.encode() for text in texts])
    joined = torch.from_numpy(np.concatenate([end, *(part for ids in encoded for part in (ids, end))]))
    return joined[:-1].long(), joined[1:].long()


def _bits(
    model: MultimodalDecoder, data: PictureData, split: str, frequencies: _Frequencies, batch_size: int
) -> dict[str, float]:
    """Bits per character and per byte, with the right pictures, with others, and by chance."""
    texts = _asked(data.samples, split)
    characters, size = (
        sum(map(len, (text.text for text in texts))),
        sum(len(text.text.encode()) for text in texts),
    )
    bits = {
        "": _model_bits(model, data, split, batch_size, shuffled=False),
        "_shuffled": _model_bits(model, data, split, batch_size, shuffled=True),
        **{f"_{name}": value for name, value in frequencies.bits(texts).items()},
    }
    return {
        "samples": data.samples.size(split),
        **{f"bits_per_character{name}": value / max(1, characters) for name, value in bits.items()},
        **{f"bits_per_byte{name}": value / max(1, size) for name, value in bits.items()},
    }


def _asked(samples: Samples, split: str) -> list[Text]:
    return [text for i in range(samples.size(split)) for text in samples.sample(split, i).texts if text.asked]


@torch.no_grad()
def _model_bits(model: MultimodalDecoder, data: PictureData, split: str, batch_size: int, shuffled: bool) -> float:
    """Bits of all that is asked in a split."""
    loader = data.evaluation_loader(seq_len=2**31, batch_size=batch_size, splits=[split], shuffled=shuffled)
    nats = 0.0
    for batch in loader:
        images = batch["images"].to(model.device, model.dtype)
        hidden, _ = model.hidden_states(batch["tokens"].to(model.device), images=images, image_rows=batch["image_rows"])
        labels = batch["labels"].flatten().to(model.device)
        nats += float(token_cross_entropy(hidden.flatten(0, 1), model.decoder.head.weight, labels).double().sum())
    return nats / math.log(2)


# ---- answers


@torch.no_grad()
def answers(
    model: MultimodalDecoder, data: PictureData, split: str, *, samples: int, batch_size: int = 128
) -> list[Answer]:
    """What the model says in each of some samples of a split, by greedy decoding, in the order of the samples.

    Before a text that is asked for stands all of its sample up to there, with the right answers to earlier questions.
    Prompts of one length are continued together, so that none is padded. Ids that are no text are left out.

    Raises:
        InputError: see `some_of`.
    """
    chosen = some_of(data.samples, [split], samples)
    given = [chosen.sample(split, i) for i in range(chosen.size(split))]
    places = [
        (ImageText(sample.parts[:k]), part)
        for sample in given
        for k, part in enumerate(sample.parts)
        if isinstance(part, Text) and part.asked
    ]
    prompts = [encoded.tokens for encoded in data.layout.encode([before for before, _ in places])]
    longest = max(map(len, data.layout.tokenizer.encode_batch([text.text.encode() for _, text in places])))
    alike = defaultdict[tuple[int, int], list[int]](list)
    for i, (before, _) in enumerate(places):
        alike[len(prompts[i]), sum(picture.num_tiles for picture in before.pictures)].append(i)
    said: dict[int, str] = {}
    for numbers in alike.values():
        for first in range(0, len(numbers), batch_size):
            here = numbers[first : first + batch_size]
            tokens = torch.from_numpy(np.stack([prompts[i] for i in here])).to(model.device)
            images = _images(model, [picture for i in here for picture in places[i][0].pictures])
            new = _continued(model, data.layout, tokens, images, longest + 1)
            said |= {i: _text(data.layout, ids) for i, ids in zip(here, new.tolist(), strict=True)}
    return [Answer(before, right, said[i]) for i, (before, right) in enumerate(places)]


def _images(model: MultimodalDecoder, pictures: Sequence[Picture]) -> Tensor | None:
    """The tiles of all pictures, as they are, for the encoder."""
    if not pictures:
        return None
    return pixel_values(np.concatenate([each.tiles(None) for each in pictures])).to(model.device, model.dtype)


def _continued(model: MultimodalDecoder, layout: Layout, tokens: Tensor, images: Tensor | None, most: int) -> Tensor:
    """At most so many ids behind tokens (B, L), greedily."""
    end = layout.tokenizer.end_of_text
    return generate(model, tokens, most, images=images, temperature=0, stop_token=end)[:, tokens.size(1) :]


def _text(layout: Layout, ids: Sequence[int]) -> str:
    """The ids up to the end of text, without those of pictures."""
    end = layout.tokenizer.end_of_text
    until = ids.index(end) if end in ids else len(ids)
    kept = [each for each in ids[:until] if each < layout.tokenizer.vocab_size]
    return layout.tokenizer.decode(kept).decode(errors="replace")


def _said(model: MultimodalDecoder, data: PictureData, split: str, batch_size: int) -> dict[str, float]:
    """Exact answers and edits."""
    found = answers(model, data, split, samples=data.samples.size(split), batch_size=batch_size)
    right_for = Counter(name for each in found for name in {each.right.text, *each.right.also})
    return {
        "exact": sum(each.is_right for each in found) / len(found),
        "exact_chance": max(right_for.values()) / len(found),
        "character_error_rate": character_error_rate(
            [each.said for each in found], [each.right.text for each in found]
        ),
    }


# ---- ranks


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Where the right names stand when all are sorted by a score."""

    median: float
    """Median of the rank, 1 being best: wrong names before the best right one count, and half of those beside it."""
    recall_at_1: float
    """Share of pictures whose best right name is before all wrong ones."""
    median_chance: float
    """Median of the ranks to expect of a random order."""
    recall_at_1_chance: float


def ranks(scores: Tensor, right: Tensor) -> Ranks:
    """Ranks by scores (pictures, names), larger being better; `right` says which names are right, one at least a row.

    The scores may be log-probabilities, or similarities of embeddings.

    Raises:
        ValueError: other shapes, or a picture without a right name.
    """
    if scores.shape != right.shape or scores.dim() != 2 or not bool(right.any(dim=1).all()):
        raise ValueError(
            f"scores {tuple(scores.shape)}, right {tuple(right.shape)}: must be (pictures, names), and each picture "
            "must have a right name"
        )
    best = scores.masked_fill(~right, -math.inf).amax(dim=1, keepdim=True)
    before, beside = ((scores > best) & ~right).sum(dim=1), ((scores == best) & ~right).sum(dim=1)
    rank = 1 + before + beside / 2
    names, of = right.sum(dim=1), right.size(1)
    expected = 1 + (of - names) / (names + 1)
    return Ranks(
        median=float(rank.quantile(0.5)),
        recall_at_1=float((rank == 1).double().mean()),
        median_chance=float(expected.quantile(0.5)),
        recall_at_1_chance=float((names / of).mean()),
    )


def _ranked(
    model: MultimodalDecoder, samples: Samples, layout: Layout, split: str, batch_size: int
) -> dict[str, float]:
    """Ranks of the names of these samples among each other; nothing where a sample is not one question at its end."""
    given = [samples.sample(split, i) for i in range(samples.size(split))]
    last = [sample.parts[-1] for sample in given]
    texts = [part for part in last if isinstance(part, Text) and part.asked]
    if len(texts) < len(given) or any(sum(text.asked for text in sample.texts) > 1 for sample in given):
        return {}
    names = list(dict.fromkeys(text.text for text in texts))
    right = torch.tensor([[name == text.text or name in text.also for name in names] for text in texts])
    before = [ImageText(sample.parts[:-1]) for sample in given]
    found = ranks(name_scores(model, layout, before, names, batch_size=batch_size), right)
    return {
        "rank": found.median,
        "rank_chance": found.median_chance,
        "recall_at_1": found.recall_at_1,
        "recall_at_1_chance": found.recall_at_1_chance,
        "candidates": len(names),
    }


@torch.no_grad()
def name_scores(
    model: MultimodalDecoder,
    layout: Layout,
    samples: Sequence[ImageText],
    names: Sequence[str],
    *,
    batch_size: int = 128,
) -> Tensor:
    """The log-probability of each name after each sample, its end included: (samples, names), float64 nats.

    Pictures are encoded once.
    """
    encoded = layout.tokenizer.encode_batch([name.encode() for name in names])
    order = sorted(range(len(names)), key=lambda i: len(encoded[i]))
    blocks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]  # of like lengths
    labels = [_padded([encoded[i] for i in block], layout.tokenizer.end_of_text).to(model.device) for block in blocks]
    scores = torch.zeros(len(samples), len(names), dtype=torch.float64)
    for row, (sample, prompt) in enumerate(zip(samples, layout.encode(samples), strict=True)):
        tokens = torch.from_numpy(prompt.tokens)[None].to(model.device)
        prefix = model.embed(tokens, images=_images(model, sample.pictures))
        for block, asked in zip(blocks, labels, strict=True):
            given = model.decoder.embed(asked[:, :-1].clamp(min=0))
            x = torch.cat((prefix.expand(len(block), -1, -1), given), dim=1)
            hidden, _ = model.decoder.hidden_states(None, embeddings=x)
            hidden = hidden[:, prefix.size(1) - 1 :].flatten(0, 1)
            nats = token_cross_entropy(hidden, model.decoder.head.weight, asked.flatten()).view_as(asked)
            scores[row, block] = -nats.double().sum(dim=1).cpu()
    return scores


def _padded(texts: Sequence[Any], end: int) -> Tensor:
    """Ids with an end behind each, (n, longest + 1); -100 behind that."""
    longest = max(map(len, texts))
    rows = [F.pad(torch.tensor([*ids.tolist(), end]), (0, longest - len(ids)), value=IGNORE_INDEX) for ids in texts]
    return torch.stack(rows)
