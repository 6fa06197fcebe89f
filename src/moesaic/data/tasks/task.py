"""What a task is: generated sequences that ask for answers; of recall, answers that stand earlier in the sequence."""

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

from moesaic.errors import InputError
from moesaic.losses.cross_entropy import IGNORE_INDEX

__all__ = [
    "Example",
    "Ints",
    "RecallTask",
    "Split",
    "Task",
    "at",
    "blank",
    "check_sizes",
    "distance_bucket",
    "split_of",
]

Ints = npt.NDArray[np.int64]
Split = Literal["train", "test"]

TEST_SHARE = 8
"""One content in so many belongs to the test split."""
TRIES = 1000
"""Draws for one sequence before a split counts as empty; it takes 8 on average for test."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One sequence; at the places that ask for an answer, the answer and what it is counted under."""

    tokens: Ints
    """(L,)"""
    labels: Ints
    """(L,): the right prediction after the token there; -100 wherever none is expected."""
    slices: Mapping[str, Ints]
    """Name -> (L,): the value under which the answer there is counted; -1 wherever there is none."""
    content: Ints
    """What the split goes by, in one canonical order."""


class Task(ABC):
    """A source of sequences; the fields of its dataclass are the keys of `data.task`."""

    @property
    @abstractmethod
    def vocab_size(self) -> int: ...

    @property
    @abstractmethod
    def chance(self) -> float:
        """Accuracy of a guess among all tokens that can be an answer."""

    @property
    def multiples(self) -> tuple[int, ...]:
        """Lengths of the test sequences over the training length."""
        return (1,)

    def growth(self, multiple: int) -> int:
        """Factor by which the sizes are multiplied in test sequences of `multiple` times the training length."""
        return 1

    @property
    def answer_bits(self) -> float | None:
        """Bits of all answers of the test set, where training tells them; None where each sequence tells its own."""
        return None

    @abstractmethod
    def test_size(self, seq_len: int) -> int:
        """How many test sequences there are."""

    @abstractmethod
    def example(self, split: Split, seed: int, index: int, seq_len: int, growth: int = 1) -> Example:
        """Sequence `index` (of endlessly many) of a split: a pure function of the task and these arguments."""

    @abstractmethod
    def require_length(self, seq_len: int, key: str) -> None:
        """Refuse what cannot be drawn at this length.

        Raises:
            InputError: naming `key`, where the length comes from.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecallTask(Task):
    """A task whose answers stand earlier in the same sequence.

    A sequence belongs to "test" if a hash of its content (what has to be remembered; each task says what that is) is a
    multiple of 8, else to "train". So no content of one split ever occurs in the other, whatever the seeds and lengths,
    while both have the same distribution otherwise.

    Args:
        test_sequences: size of the test set at each length.
        test_multiples: lengths of the test sequences over the training length.
        grow_with_length: test sequences m times as long have m times as much to remember too, instead of more between.
    """

    test_sequences: int = dataclasses.field(default=256, metadata={"most": 2**20})
    test_multiples: tuple[int, ...] = dataclasses.field(default=(1, 4, 16), metadata={"most": 2**12})
    grow_with_length: bool = False

    def __post_init__(self) -> None:
        if self.test_sequences < 1:
            raise ValueError(f"test_sequences={self.test_sequences}: must be a number >= 1")
        check_sizes("test_multiples", self.test_multiples)
        if 1 not in self.test_multiples:
            raise ValueError(f"test_multiples={list(self.test_multiples)}: 1 has to be among them")

    @property
    def multiples(self) -> tuple[int, ...]:
        return self.test_multiples

    def growth(self, multiple: int) -> int:
        return multiple if self.grow_with_length else 1

    def test_size(self, seq_len: int) -> int:
        return self.test_sequences

    @property
    def largest_size(self) -> int:
        """The most that any sequence holds, those of the longest test set included."""
        return max(self.sizes) * self.growth(max(self.test_multiples))

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, ...]:
        """How much there is to remember; sequence i has sizes[i % len(sizes)], so that all are equally frequent."""

    @abstractmethod
    def min_length(self, size: int) -> int:
        """The shortest sequence that holds so much."""

    @abstractmethod
    def draw(self, rng: np.random.Generator, size: int, seq_len: int) -> Example:
        """A sequence of either split."""

    def example(self, split: Split, seed: int, index: int, seq_len: int, growth: int = 1) -> Example:
        size = growth * self.sizes[index % len(self.sizes)]
        rng = np.random.default_rng((int(split == "test"), seed, index))
        for _ in range(TRIES):
            example = self.draw(rng, size, seq_len)
            if split_of(example.content) == split:
                return example
        raise InputError(f"data.task: too few different sequences of size {size}: none of {TRIES} belongs to {split}")

    def require_length(self, seq_len: int, key: str) -> None:
        """Refuse what cannot be drawn at this length, also a split without sequences."""
        for i, size in enumerate(self.sizes):
            if seq_len < self.min_length(size):
                raise InputError(
                    f"{key}={seq_len}: a sequence of data.task with size {size} (of {list(self.sizes)}) needs at least "
                    f"{self.min_length(size)} tokens"
                )
            self.example("train", 0, i, seq_len)
            self.example("test", 0, i, seq_len)


def split_of(content: Ints) -> Split:
    """The split that a content belongs to: the same on every machine."""
    digest = hashlib.blake2b(content.astype("<i8").tobytes(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "little") % TEST_SHARE == 0 else "train"


def distance_bucket(distance: Ints) -> Ints:
    """Distances >= 1 rounded up to a power of two: bucket 64 holds 33 to 64."""
    return (2 ** np.ceil(np.log2(distance))).astype(np.int64)


def blank(seq_len: int) -> Ints:
    """Labels of a sequence without a question."""
    return np.full(seq_len, IGNORE_INDEX)


def at(seq_len: int, places: Ints, values: Ints | int) -> Ints:
    """A slice: `values` at `places`, -1 elsewhere."""
    out = np.full(seq_len, -1)
    out[places] = values
    return out


def check_sizes(name: str, sizes: tuple[int, ...]) -> None:
    """Raise ValueError naming `name` unless `sizes` are one or more distinct positive numbers."""
    if not sizes or len(set(sizes)) < len(sizes) or min(sizes) < 1:
        raise ValueError(f"{name}={list(sizes)}: must be one or more different numbers >= 1")
