"""Multi-query associative recall: pairs of a key and a value, then each key again, to be answered with its value."""

import dataclasses

import numpy as np

from moesaic.data.tasks.task import Example, Ints, RecallTask, at, blank, check_sizes, distance_bucket

__all__ = ["AssociativeRecall", "associative_recall"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AssociativeRecall(RecallTask):
    """The task of Arora et al. 2023 (Zoology, arXiv:2312.04927).

    A sequence begins with P pairs of different keys and any values. In what follows each key stands once more, at a
    place drawn uniformly (in the paper by a power law, which makes short distances frequent; here a longer sequence
    really asks further back), and the label there is its value. The value itself is not in the sequence again. All
    other places hold fillers. Ids: keys, then values, then fillers.

    Train and test share no assignment: the set of a sequence's pairs, in whatever order, belongs to one of them.
    Slices: "pairs", P; "distance" from key to query, rounded up to a power of two.

    Args:
        pairs: values of P.
        keys, values, fillers: how many ids of each kind there are.
    """

    pairs: tuple[int, ...] = dataclasses.field(default=(4, 8), metadata={"most": 2**16})
    keys: int = dataclasses.field(default=64, metadata={"most": 2**22})
    values: int = dataclasses.field(default=64, metadata={"most": 2**22})
    fillers: int = dataclasses.field(default=8, metadata={"most": 2**22})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("keys", 1), ("values", 2), ("fillers", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be a number >= {least}")
        check_sizes("pairs", self.pairs)
        if self.largest_size > self.keys:
            grown = " with grow_with_length" if self.grow_with_length else ""
            raise ValueError(
                f"pairs={list(self.pairs)}: a sequence{grown} has up to {self.largest_size} different keys, but the "
                f"vocabulary has keys={self.keys}"
            )

    @property
    def vocab_size(self) -> int:
        return self.keys + self.values + self.fillers

    @property
    def chance(self) -> float:
        return 1 / self.values

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.pairs

    def min_length(self, size: int) -> int:
        return 3 * size

    def draw(self, rng: np.random.Generator, size: int, seq_len: int) -> Example:
        keys = rng.choice(self.keys, size, replace=False)
        values = self.keys + rng.integers(self.values, size=size)
        fillers = self.keys + self.values + rng.integers(self.fillers, size=seq_len - 2 * size)
        places = 2 * size + rng.choice(seq_len - 2 * size, size, replace=False)
        return associative_recall(keys, values, places, fillers)


def associative_recall(keys: Ints, values: Ints, places: Ints, fillers: Ints) -> Example:
    """The sequence in which pair j of keys (P,) and values (P,) is asked for at places[j] >= 2 P.

    Args:
        fillers: (L - 2 P,): what follows the pairs; at `places` it is replaced.
    """
    pairs = np.stack([keys, values], axis=1)
    tokens = np.concatenate([pairs.flatten(), fillers])
    tokens[places] = keys
    labels = blank(len(tokens))
    labels[places] = values
    distance = places - 2 * np.arange(len(keys))
    slices = {
        "pairs": at(len(tokens), places, len(keys)),
        "distance": at(len(tokens), places, distance_bucket(distance)),
    }
    return Example(tokens, labels, slices, content=pairs[np.argsort(keys)].flatten())
