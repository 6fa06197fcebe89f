"""Batches of windows: for training a pure function of (seed, batch number), for evaluation every token once."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moesaic.data.shards import Tokens
from moesaic.errors import InputError

__all__ = ["EvaluationLoader", "ResumableLoader", "TrainingLoader", "rows_of", "windows_at", "with_step_counts"]

Batch = dict[str, Tensor]


def windows_at(tokens: Tokens, starts: npt.NDArray[np.int64], seq_len: int) -> Batch:
    """The windows of a stream (n,) that begin at `starts` (B,), each followed by at least one more token.

    Returns:
        {"tokens", "labels"}, each (B, L) int64, labels the tokens one further, and "starts", (B,) int64.
    """
    ids = torch.from_numpy(np.stack([tokens[start : start + seq_len + 1] for start in starts]).astype(np.int64))
    return {
        "tokens": ids[:, :-1].clone(memory_format=torch.contiguous_format),  # even of one row, no memory is shared
        "labels": ids[:, 1:].clone(memory_format=torch.contiguous_format),
        "starts": torch.from_numpy(np.array(starts, dtype=np.int64)),
    }


def rows_of(batch: Batch, first: int, last: int) -> Batch:
    """Rows `first` to `last` of a batch, with the pictures that belong to them."""
    if "image_rows" not in batch:
        return {name: each[first:last] for name, each in batch.items()}
    rows = batch["image_rows"]
    there = (rows >= first) & (rows < last)
    images = {"images": batch["images"][there], "image_rows": rows[there] - first}
    return {name: images[name] if name in images else each[first:last] for name, each in batch.items()}


def with_step_counts(micro_batches: Sequence[Batch]) -> list[Batch]:
    """The micro-batches of one optimizer step on one rank, each with what all of them hold together.

    Means over the step need these numbers before its first backward.

    Returns:
        the batches with "step_labels", labels other than -100, and "step_tokens", valid tokens; both () int64.
    """
    labels = torch.stack([(batch["labels"] != -100).sum() for batch in micro_batches]).sum()
    tokens = torch.stack(
        [
            batch["valid"].sum() if "valid" in batch else labels.new_full((), batch["tokens"].numel())
            for batch in micro_batches
        ]
    ).sum()
    return [{**batch, "step_labels": labels, "step_tokens": tokens} for batch in micro_batches]


class ResumableLoader(ABC):
    """num_batches batches, of which batch i needs no memory of those before it: its only state is what comes next.

    Where `accumulate` of them make an optimizer step, they come `with_step_counts`.

    Args:
        batch_size: B, per rank.
        rank, world_size: the ranks share each global batch of world_size * B examples.
    """

    def __init__(self, *, batch_size: int, num_batches: int, rank: int, world_size: int) -> None:
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.rank = rank
        self.world_size = world_size
        self.accumulate = 1
        self._next_batch = 0
        self._offset = 0
        """What to add to the numbers of examples, in a run whose batches had another size before."""

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        if self._next_batch >= self.num_batches:  # whoever asks again would ask for ever
            raise RuntimeError(f"all {self.num_batches} batches have been used, and training is not over")
        step, micro_batches = -1, list[Batch]()
        while self._next_batch < self.num_batches:
            i = self._next_batch
            self._next_batch += 1
            if self.accumulate == 1:
                yield self.batch(i)
                continue
            if i // self.accumulate != step:
                step = i // self.accumulate
                first = step * self.accumulate
                numbers = range(first, min(first + self.accumulate, self.num_batches))
                micro_batches = with_step_counts([self.batch(each) for each in numbers])
            yield micro_batches[i % self.accumulate]

    @abstractmethod
    def batch(self, i: int) -> Batch:
        """Batch i of this rank."""

    def numbers(self, i: int) -> range:
        """Numbers of the examples in this rank's batch i, counted over all ranks from the beginning of the run."""
        first = self._offset + (i * self.world_size + self.rank) * self.batch_size
        return range(first, first + self.batch_size)

    def state_dict(self) -> dict[str, int]:
        return {"next_batch": self._next_batch, **({"offset": self._offset} if self._offset else {})}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._next_batch, self._offset = state["next_batch"], state.get("offset", 0)


class TrainingLoader(ResumableLoader):
    """num_batches batches as `windows_at` makes them: tokens, labels, and where in the stream each window starts.

    An epoch visits every window of the stream once, in an order and with an offset of the windows that depend on
    (seed, epoch). So batch i needs no memory of the batches before it, and a resumed run sees what it would have seen.

    Args:
        tokens: the stream, (n,).
        seq_len: L.
        batch_size: B, per rank.
        rank, world_size: the ranks share each global batch of world_size * B windows.
        fixed_windows: offset 0 in every epoch, so that a window (number start // seq_len) is the same one for every
            epoch, seed and run, as cached targets need it.

    Raises:
        InputError: a stream shorter than one window.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        seq_len: int,
        batch_size: int,
        num_batches: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        fixed_windows: bool = False,
    ) -> None:
        needed = seq_len + 1 if fixed_windows else 2 * seq_len + 1
        if len(tokens) < needed:
            reason = "" if fixed_windows else " (windows start at a random offset)"
            raise InputError(
                f"training.seq_len={seq_len}: the training split has {len(tokens)} tokens; at least "
                f"{needed} are needed{reason}"
            )
        super().__init__(batch_size=batch_size, num_batches=num_batches, rank=rank, world_size=world_size)
        self.tokens = tokens
        self.seq_len = seq_len
        self.seed = seed
        self.fixed_windows = fixed_windows
        self.windows_per_epoch = (len(tokens) - 1) // seq_len
        if not fixed_windows:
            self.windows_per_epoch -= 1  # whatever the offset
        self._epoch = -1
        self._starts = np.zeros(0, dtype=np.int64)

    def batch(self, i: int) -> Batch:
        return self.rows(self.numbers(i))

    def rows(self, numbers: Iterable[int]) -> Batch:
        """The windows of these numbers, counted from the beginning of the run."""
        starts = np.array([self._start(number) for number in numbers], dtype=np.int64)
        return windows_at(self.tokens, starts, self.seq_len)

    def _start(self, number: int) -> int:
        epoch, place = divmod(number, self.windows_per_epoch)
        if epoch != self._epoch:
            draw = np.random.default_rng((self.seed, epoch))
            offset = 0 if self.fixed_windows else int(draw.integers(self.seq_len))
            self._starts = offset + self.seq_len * draw.permutation(self.windows_per_epoch)
            self._epoch = epoch
        return int(self._starts[place])


class EvaluationLoader:
    """Batches of {"tokens", "labels", "valid", "starts"}: every token but the first of the stream is predicted once.

    "starts" (B,) is where in the stream each window begins, the others are (B, L). Windows do not overlap. The last one
    is padded: labels -100, valid False; a stream that is shorter than a window is one as it is. With max_batches, that
    many batches of windows spread evenly over the stream.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        seq_len: int,
        batch_size: int,
        max_batches: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(tokens) < 2:
            raise InputError(f"the split to evaluate on has {len(tokens)} tokens; at least 2 are needed")
        self.tokens = tokens
        self.seq_len = min(seq_len, len(tokens) - 1)
        self.batch_size = batch_size
        starts = np.arange(0, len(tokens) - 1, seq_len)
        if max_batches is not None and max_batches * batch_size < len(starts):
            starts = starts[np.linspace(0, len(starts) - 1, max_batches * batch_size).round().astype(np.int64)]
        self.starts = starts[rank::world_size]

    def __len__(self) -> int:
        return -(-len(self.starts) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, len(self.starts), self.batch_size):
            yield self._batch(self.starts[first : first + self.batch_size])

    def _batch(self, starts: npt.NDArray[np.int64]) -> Batch:
        shape = (len(starts), self.seq_len)
        tokens = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, -100)
        for row, start in enumerate(starts):
            window = torch.from_numpy(self.tokens[start : start + self.seq_len + 1].astype(np.int64))
            tokens[row, : len(window) - 1] = window[:-1]
            labels[row, : len(window) - 1] = window[1:]
        return {"tokens": tokens, "labels": labels, "valid": labels != -100, "starts": torch.from_numpy(starts)}
