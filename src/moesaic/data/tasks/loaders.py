"""Batches of a task: for training without end, for testing one fixed set per length."""

from collections.abc import Iterator

import numpy as np
import torch

from moesaic.data.loaders import Batch, ResumableLoader
from moesaic.data.tasks.task import Split, Task

__all__ = ["TEST_SEED", "TaskEvaluationLoader", "TaskTrainingLoader"]

TEST_SEED = 0
"""Seed of all test sets: runs of different seeds answer the same questions."""


class TaskTrainingLoader(ResumableLoader):
    """num_batches batches of {"tokens", "labels", "valid"} and "slices/<name>" for each slice, all (B, L).

    Batch i is a pure function of (seed, i) and no sequence number occurs twice, so a resumed run sees what it would
    have seen. All tokens are valid; labels are -100 and slices -1 wherever no answer is expected.

    Args:
        batch_size: B, per rank.
        rank, world_size: the ranks share each global batch of world_size * B sequences.

    Raises:
        InputError: sequences of the task do not fit seq_len, or one split has none.
    """

    def __init__(
        self,
        task: Task,
        *,
        seq_len: int,
        batch_size: int,
        num_batches: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        task.require_length(seq_len, "training.seq_len")
        super().__init__(batch_size=batch_size, num_batches=num_batches, rank=rank, world_size=world_size)
        self.task = task
        self.seq_len = seq_len
        self.seed = seed

    def batch(self, i: int) -> Batch:
        return _batch(self.task, "train", self.seed, self.numbers(i), self.seq_len)


class TaskEvaluationLoader:
    """The task's test sequences of length seq_len, each once, in batches like those of `TaskTrainingLoader`.

    Sequence i does not depend on batch_size or on the run's seed. With max_batches, the first so many batches.

    Args:
        growth: the sizes are multiplied by it, see `Task.growth`.

    Raises:
        InputError: sequences of the task do not fit seq_len, or one split has none.
    """

    def __init__(
        self, task: Task, *, seq_len: int, batch_size: int, max_batches: int | None = None, growth: int = 1
    ) -> None:
        task.require_length(seq_len // growth, "training.validation_seq_len")
        self.task = task
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.growth = growth
        self.num_sequences = task.test_size(seq_len)
        if max_batches is not None:
            self.num_sequences = min(self.num_sequences, max_batches * batch_size)

    def __len__(self) -> int:
        return -(-self.num_sequences // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, self.num_sequences, self.batch_size):
            last = min(first + self.batch_size, self.num_sequences)
            yield _batch(self.task, "test", TEST_SEED, range(first, last), self.seq_len, self.growth)


def _batch(task: Task, split: Split, seed: int, indices: range, seq_len: int, growth: int = 1) -> Batch:
    examples = [task.example(split, seed, index, seq_len, growth) for index in indices]
    tokens = torch.from_numpy(np.stack([example.tokens for example in examples]))
    batch = {
        "tokens": tokens,
        "labels": torch.from_numpy(np.stack([example.labels for example in examples])),
        "valid": torch.ones_like(tokens, dtype=torch.bool),
    }
    for name in examples[0].slices:
        batch[f"slices/{name}"] = torch.from_numpy(np.stack([example.slices[name] for example in examples]))
    return batch
