"""Selective copying: a few data tokens scattered among blanks, to be written down in order at the end."""

import dataclasses

import numpy as np

from moesaic.data.tasks.task import Example, Ints, RecallTask, at, blank, check_sizes, distance_bucket

__all__ = ["SelectiveCopying", "selective_copying"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveCopying(RecallTask):
    """Gu & Dao 2023 (Mamba, arXiv:2312.00752), sections 3.1 and 4.1.1.

    A sequence ends in n markers; before them n data tokens stand at random places among blanks. The label at marker j
    is data token j: what stands where has to be chosen by content, since the distances vary. The markers are all alike
    and the answers are not in the sequence. Ids: data tokens, then the blank, then the marker.

    Train and test share no list of n data tokens. Slices: "copies", n; "place", j from 0; "distance" from the data
    token to its marker, rounded up to a power of two.

    Args:
        copies: values of n.
        values: how many different data tokens there are.
    """

    copies: tuple[int, ...] = dataclasses.field(default=(4, 8), metadata={"most": 2**16})
    values: int = dataclasses.field(default=16, metadata={"most": 2**22})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.values < 2:
            raise ValueError(f"values={self.values}: must be a number >= 2")
        check_sizes("copies", self.copies)

    @property
    def vocab_size(self) -> int:
        return self.values + 2

    @property
    def chance(self) -> float:
        return 1 / self.values

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.copies

    def min_length(self, size: int) -> int:
        return 2 * size

    def draw(self, rng: np.random.Generator, size: int, seq_len: int) -> Example:
        data = rng.integers(self.values, size=size)
        places = np.sort(rng.choice(seq_len - size, size, replace=False))
        return selective_copying(data, places, seq_len, blank_id=self.values, marker=self.values + 1)


def selective_copying(data: Ints, places: Ints, seq_len: int, *, blank_id: int, marker: int) -> Example:
    """The sequence of seq_len tokens with data (n,) at the rising places (n,) < seq_len - n."""
    n = len(data)
    tokens = np.full(seq_len, blank_id)
    tokens[places] = data
    tokens[-n:] = marker
    markers = np.arange(seq_len - n, seq_len)
    labels = blank(seq_len)
    labels[markers] = data
    slices = {
        "copies": at(seq_len, markers, n),
        "place": at(seq_len, markers, np.arange(n)),
        "distance": at(seq_len, markers, distance_bucket(markers - places)),
    }
    return Example(tokens, labels, slices, content=data)
