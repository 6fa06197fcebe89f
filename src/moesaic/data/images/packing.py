"""Rows of several samples: which samples an epoch puts into which row."""

import numpy as np
import numpy.typing as npt

from moesaic.data.tasks.task import Ints

__all__ = ["pack"]


def pack(lengths: Ints, order: Ints, seq_len: int) -> list[npt.NDArray[np.int64]]:
    """Samples in the given order, each row as full as that order lets it be.

    Args:
        lengths: (n,) tokens of each sample, none more than seq_len.
        order: (m,) numbers of samples.

    Returns:
        the numbers of the samples in each row.
    """
    ends = np.cumsum(lengths[order])
    rows, first = [], 0
    while first < len(order):
        before = int(ends[first - 1]) if first else 0
        last = int(np.searchsorted(ends, before + seq_len, side="right"))
        rows.append(order[first:last])
        first = last
    return rows
