"""A stream of ids in several files, read as one array."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from moesaic.data.tokenizers import Ids

__all__ = ["ShardedIds", "Tokens"]


class ShardedIds:
    """Consecutive arrays (n_i,) of one dtype as one of (n,), without copies of them.

    It has what a reader of windows needs: a length, slices, and `numpy.asarray`, which reads all of it. A slice within
    one of the arrays is a view of it, any other a copy.
    """

    def __init__(self, shards: Sequence[Ids]) -> None:
        self.shards = tuple(shards)
        self.dtype = self.shards[0].dtype
        self._ends = np.cumsum([len(shard) for shard in self.shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, key: slice) -> Ids:
        start, stop, step = key.indices(len(self))
        if step != 1:
            raise IndexError(f"a slice of step {step}: must be 1")
        first = int(np.searchsorted(self._ends, start, side="right"))
        found = []
        while start < stop:
            before = int(self._ends[first]) - len(self.shards[first])
            found.append(self.shards[first][start - before : stop - before])
            start, first = before + len(self.shards[first]), first + 1
        return found[0] if len(found) == 1 else np.concatenate([np.zeros(0, self.dtype), *found])

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if copy is False:
            raise ValueError("ids in several files: cannot be one array without a copy")
        return np.concatenate(self.shards).astype(dtype or self.dtype, copy=False)


Tokens: TypeAlias = Ids | ShardedIds
"""A stream (n,)."""
