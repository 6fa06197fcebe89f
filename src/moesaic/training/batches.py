"""The loaders of a run, made where the process knows its rank."""

from collections.abc import Iterator
from typing import Any, TypedDict

import lightning.pytorch as pl
from torch import Tensor

from moesaic.data import (
    AnyEvaluationLoader,
    AnyTrainingLoader,
    Data,
    evaluation_loader,
    training_loader,
    with_step_counts,
)
from moesaic.errors import InputError
from moesaic.training.config import RunConfig, TrainingConfig

__all__ = ["RunBatches", "Sizes", "evaluation_sizes"]


class Sizes(TypedDict):
    """Tokens of a window, and windows of a batch."""

    seq_len: int
    batch_size: int


def evaluation_sizes(training: TrainingConfig) -> Sizes:
    """seq_len and batch_size of validation: about as many tokens per batch as in training."""
    seq_len = training.validation_seq_len or training.seq_len
    return {"seq_len": seq_len, "batch_size": max(1, training.batch_size * training.seq_len // seq_len)}


class _Same:
    """The same few batches in every epoch; not a list, which Lightning would take for several loaders."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class RunBatches(pl.LightningDataModule):
    """Training batches, shared among the ranks, and those of the checks during the run."""

    def __init__(self, config: RunConfig, data: Data) -> None:
        super().__init__()
        self.config = config
        self.data = data

    def training(self, rank: int = 0, world_size: int = 1) -> AnyTrainingLoader:
        """The loader of one rank.

        Raises:
            InputError: the data do not fill a window.
        """
        config, training = self.config, self.config.training
        cached = config.distillation is not None and config.distillation.source == "cached"
        return training_loader(
            self.data,
            seq_len=training.seq_len,
            batch_size=training.batch_size,
            num_batches=training.steps * training.accumulate,
            seed=config.seed,
            fixed_windows=training.fixed_windows or cached,  # as targets are kept for
            rank=rank,
            world_size=world_size,
        )

    def train_dataloader(self) -> Any:
        trainer = self.trainer
        assert trainer is not None
        accumulate = trainer.accumulate_grad_batches
        loader = self.training(trainer.global_rank, trainer.world_size)
        loader.accumulate = accumulate
        # our loaders go on in every epoch; these are the same batches in each
        if share := trainer.overfit_batches:  # type: ignore[attr-defined]
            count = share if isinstance(share, int) else max(1, int(share * len(loader)))
            batches = [loader.batch(i) for i in range(count)]
            steps = [batches[i : i + accumulate] for i in range(0, count, accumulate)]
            return _Same([batch for step in steps for batch in with_step_counts(step)])
        limit = trainer.limit_train_batches
        per_epoch = limit if isinstance(limit, int) else int(limit * len(loader))
        if per_epoch % accumulate:  # Lightning ends an optimizer step where it takes an epoch to end
            raise InputError(
                f"trainer.limit_train_batches={limit}: {per_epoch} batches; must be a multiple of "
                f"training.accumulate={accumulate}"
            )
        return loader

    def val_dataloader(self) -> AnyEvaluationLoader:
        """Raises InputError if the split is too short."""
        training = self.config.training
        return evaluation_loader(self.data, **evaluation_sizes(training), max_batches=training.validation_batches)
