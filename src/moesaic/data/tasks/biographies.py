"""Biographies: people with random attributes, to be known by heart; how many bits a model stores."""

import dataclasses
import functools
import math

import numpy as np

from moesaic.data.tasks.task import Example, Ints, Split, Task, at, blank
from moesaic.errors import InputError

__all__ = ["Biographies", "biographies"]

POPULATION = 0
"""Seed of the people: runs of all seeds learn the same ones, in another order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Biographies(Task):
    """Knowledge as in Allen-Zhu & Li 2024 (Physics of Language Models 3.3, arXiv:2404.05405), without the English.

    A biography is a name, which is a few tokens that no other person has together, and then the values of the person's
    attributes, always in the same order. Every value is drawn uniformly, so all of them together have
    people * attributes * log2(values) bits that nothing but memory can save. (The defaults make 48 bits a person; the
    paper's bioS has 47.6.) The labels are the values; names are given and count nothing, unlike in the paper.

    An epoch has every person once, in an order that depends on the seed, so epochs are exposures. The test set asks
    for every person once. Ids: parts of names, then values, then the filler behind the last biography of a sequence.
    Slice: "attribute", from 0.

    Args:
        people: how many there are.
        name_length: tokens of a name.
        name_parts: how many ids names are made of.
        attributes: values of a person.
        values: how many ids a value is drawn from.
    """

    people: int = dataclasses.field(default=2000, metadata={"most": 2**24})
    name_length: int = dataclasses.field(default=2, metadata={"most": 64})
    name_parts: int = dataclasses.field(default=64, metadata={"most": 2**16})
    attributes: int = dataclasses.field(default=8, metadata={"most": 2**12})
    values: int = dataclasses.field(default=64, metadata={"most": 2**22})

    def __post_init__(self) -> None:
        for name, least in (("people", 1), ("name_length", 1), ("name_parts", 1), ("attributes", 1), ("values", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be a number >= {least}")
        if self.people > self.name_parts**self.name_length:
            raise ValueError(
                f"people={self.people}: must be at most {self.name_parts**self.name_length}, so many names can be made "
                f"of name_length={self.name_length} of name_parts={self.name_parts}"
            )

    @property
    def vocab_size(self) -> int:
        return self.name_parts + self.values + 1

    @property
    def chance(self) -> float:
        return 1 / self.values

    @property
    def answer_bits(self) -> float:
        return self.people * self.attributes * math.log2(self.values)

    @property
    def length(self) -> int:
        """Tokens of a biography."""
        return self.name_length + self.attributes

    def test_size(self, seq_len: int) -> int:
        return -(-self.people // (seq_len // self.length))

    def require_length(self, seq_len: int, key: str) -> None:
        if seq_len < self.length:
            raise InputError(f"{key}={seq_len}: must be at least {self.length}, the tokens of a biography of data.task")

    def example(self, split: Split, seed: int, index: int, seq_len: int, growth: int = 1) -> Example:
        epoch, place = divmod(index, self.test_size(seq_len))
        order = np.arange(self.people) if split == "test" else _order(self.people, seed, epoch)
        together = seq_len // self.length
        chosen = order[place * together : (place + 1) * together]
        names, values = _population(self)
        return biographies(names[chosen], values[chosen], seq_len, filler=self.name_parts + self.values)


def biographies(names: Ints, values: Ints, seq_len: int, *, filler: int) -> Example:
    """The sequence of people with names (P, n) and values (P, A); what is left of seq_len are fillers."""
    people, attributes = values.shape
    written = np.concatenate([names, values], axis=1)
    tokens = np.full(seq_len, filler)
    tokens[: written.size] = written.flatten()
    answers = written.shape[1] * np.arange(people)[:, None] + names.shape[1] + np.arange(attributes)
    labels = blank(seq_len)
    labels[answers - 1] = values
    slices = {"attribute": at(seq_len, answers - 1, np.broadcast_to(np.arange(attributes), values.shape))}
    return Example(tokens, labels, slices, content=written.flatten())


@functools.lru_cache(maxsize=4)
def _population(task: Biographies) -> tuple[Ints, Ints]:
    """Names (people, name_length) and values (people, attributes), as ids."""
    rng = np.random.default_rng(POPULATION)
    numbers = rng.choice(task.name_parts**task.name_length, task.people, replace=False)
    names = numbers[:, None] // task.name_parts ** np.arange(task.name_length) % task.name_parts
    return names, task.name_parts + rng.integers(task.values, size=(task.people, task.attributes))


@functools.lru_cache(maxsize=4)
def _order(people: int, seed: int, epoch: int) -> Ints:
    return np.random.default_rng((seed, epoch)).permutation(people)
