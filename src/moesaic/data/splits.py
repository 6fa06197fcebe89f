"""Loaders of a split, of text and of recall tasks alike."""

from typing import Literal, TypeAlias

from moesaic.data.loaders import EvaluationLoader, TrainingLoader
from moesaic.data.streams import Data
from moesaic.data.tasks import TaskEvaluationLoader, TaskTrainingLoader

__all__ = ["AnyEvaluationLoader", "AnyTrainingLoader", "evaluation_loader", "training_loader"]

AnyTrainingLoader: TypeAlias = TrainingLoader | TaskTrainingLoader
AnyEvaluationLoader: TypeAlias = EvaluationLoader | TaskEvaluationLoader


def training_loader(
    data: Data,
    *,
    seq_len: int,
    batch_size: int,
    num_batches: int,
    seed: int,
    fixed_windows: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> AnyTrainingLoader:
    """Batches to train on; a recall task has no windows to fix.

    Raises:
        InputError: the split is shorter than a window, or sequences of the task do not fit seq_len.
    """
    shared = {"seq_len": seq_len, "batch_size": batch_size, "num_batches": num_batches, "seed": seed}
    if data.task is not None:
        return TaskTrainingLoader(data.task, **shared, rank=rank, world_size=world_size)
    return TrainingLoader(data.train.tokens, **shared, rank=rank, world_size=world_size, fixed_windows=fixed_windows)


def evaluation_loader(
    data: Data,
    *,
    seq_len: int,
    batch_size: int,
    max_batches: int | None = None,
    split: Literal["train", "validation"] = "validation",
) -> AnyEvaluationLoader:
    """Every token of a split once, or max_batches batches spread over it; of a recall task its test sequences.

    Raises:
        InputError: the split has fewer than two tokens, or sequences of the task do not fit seq_len.
    """
    if data.task is not None:
        return TaskEvaluationLoader(data.task, seq_len=seq_len, batch_size=batch_size, max_batches=max_batches)
    tokens = (data.train if split == "train" else data.validation).tokens
    return EvaluationLoader(tokens, seq_len=seq_len, batch_size=batch_size, max_batches=max_batches)
