"""Induction: [A][B] ... [A] -> [B], for triggers A in random text."""

import dataclasses

import numpy as np

from moesaic.data.tasks.task import Example, Ints, RecallTask, at, blank, check_sizes, distance_bucket

__all__ = ["Induction", "induction"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Induction(RecallTask):
    """The pattern of Olsson et al. 2022 (arXiv:2209.11895) with triggers as in Gu & Dao 2023 (arXiv:2312.00752, 4.1.2).

    n triggers stand in random tokens, each of them twice and nowhere else, at places drawn uniformly; what follows the
    first one follows the second one too, and is the label there. (In Gu & Dao n is 1 and the second one ends the
    sequence.) Ids: ordinary tokens, then triggers.

    Train and test share no sequence. Slices: "triggers", n; "distance" between the two, rounded up to a power of two.

    Args:
        triggers: values of n; a sequence with fewer than the most has a random choice of them.
        values: how many ordinary tokens there are, any of which can be the answer.
    """

    triggers: tuple[int, ...] = dataclasses.field(default=(4,), metadata={"most": 2**16})
    values: int = dataclasses.field(default=16, metadata={"most": 2**22})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.values < 2:
            raise ValueError(f"values={self.values}: must be a number >= 2")
        check_sizes("triggers", self.triggers)

    @property
    def vocab_size(self) -> int:
        return self.values + self.largest_size

    @property
    def chance(self) -> float:
        return 1 / self.values

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.triggers

    def min_length(self, size: int) -> int:
        return 4 * size

    def draw(self, rng: np.random.Generator, size: int, seq_len: int) -> Example:
        tokens = rng.integers(self.values, size=seq_len)
        triggers = self.values + rng.choice(self.largest_size, size, replace=False)
        # 2 n places, each with one more token behind it before the next
        places = np.sort(rng.choice(seq_len - 2 * size, 2 * size, replace=False)) + np.arange(2 * size)
        owner = rng.permutation(np.repeat(np.arange(size), 2))
        first, second = places[np.argsort(owner, kind="stable")].reshape(size, 2).T
        return induction(tokens, triggers, first, second)


def induction(tokens: Ints, triggers: Ints, first: Ints, second: Ints) -> Example:
    """The sequence tokens (L,) with trigger j of (n,) put at first[j] and second[j], and the same token behind both."""
    tokens = tokens.copy()
    tokens[first] = tokens[second] = triggers
    tokens[second + 1] = tokens[first + 1]
    labels = blank(len(tokens))
    labels[second] = tokens[first + 1]
    slices = {
        "triggers": at(len(tokens), second, len(triggers)),
        "distance": at(len(tokens), second, distance_bucket(second - first)),
    }
    return Example(tokens, labels, slices, content=tokens)
