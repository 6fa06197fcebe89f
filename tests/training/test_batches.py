"""Ranks share the batches of a validation by rows."""

import numpy as np
import pytest
import torch

from moesaic.data.loaders import EvaluationLoader
from moesaic.data.tasks import TASKS, TaskEvaluationLoader
from moesaic.training.batches import SharedBatches


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("tokens", [100, 33, 9])
def test_every_row_is_on_one_rank(tokens: int, world_size: int) -> None:
    """The last batch has fewer rows than ranks, or the only one."""
    loader = EvaluationLoader(np.arange(tokens, dtype=np.uint16), seq_len=8, batch_size=4)
    ranks = [list(SharedBatches(loader, rank, world_size)) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {len(loader)} == {len(SharedBatches(loader, 0, world_size))}
    for whole, *parts in zip(loader, *ranks, strict=True):
        assert all(len(part["tokens"]) >= 1 for part in parts), "each rank has something to run"
        counting = [part for part in parts if part["valid"].any()]
        for name, rows in whole.items():
            assert torch.equal(torch.cat([part[name] for part in counting]), rows)
        assert all((part["labels"] == -100).all() for part in parts if not part["valid"].any())


def test_those_of_a_task_are_shared_too() -> None:
    task = TASKS["associative_recall"]()
    loader = TaskEvaluationLoader(task, seq_len=64, batch_size=3, max_batches=1)
    [whole] = loader
    parts = [part for rank in range(2) for part in SharedBatches(loader, rank, 2)]
    assert all(torch.equal(torch.cat([part[name] for part in parts]), rows) for name, rows in whole.items())
