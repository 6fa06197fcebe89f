"""The loaders of a run, made where the process knows its rank."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

import lightning.pytorch as pl
import torch
from torch import Tensor

from moesaic.data import (
    AnyEvaluationLoader,
    AnyTrainingLoader,
    Data,
    evaluation_loader,
    training_loader,
)
from moesaic.data.loaders import ResumableLoader, rows_of
from moesaic.errors import InputError
from moesaic.training.config import RunConfig, TrainingConfig

__all__ = ["RunBatches", "SharedBatches", "Sizes", "evaluation_sizes", "require_same_batches"]


class Sizes(TypedDict):
    """Tokens of a window, and windows of a batch."""

    seq_len: int
    batch_size: int


def evaluation_sizes(training: TrainingConfig) -> Sizes:
    """seq_len and batch_size of validation: about as many tokens per batch as in training."""
    seq_len = training.validation_seq_len or training.seq_len
    return {"seq_len": seq_len, "batch_size": max(1, training.batch_size * training.seq_len // seq_len)}


class _Same(ResumableLoader):
    """The first few batches of a loader, the same ones in every epoch."""

    def __init__(self, loader: AnyTrainingLoader, num_batches: int) -> None:
        super().__init__(
            batch_size=loader.batch_size, num_batches=num_batches, rank=loader.rank, world_size=loader.world_size
        )
        self.loader = loader
        self.accumulate = loader.accumulate

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self._next_batch %= self.num_batches
        return super().__iter__()

    def batch(self, i: int) -> dict[str, Tensor]:
        return self.loader.batch(i)


def require_same_batches(config: RunConfig) -> None:
    """Refuse trainer.overfit_batches where it is no number of batches, or where an epoch could end within a step.

    Lightning makes a step of what is left of an epoch, and in a resumed run of what is left of the step.

    Raises:
        InputError: it names the option.
    """
    count, accumulate = config.trainer.lightning.get("overfit_batches"), config.training.accumulate
    if count and (type(count) is not int or accumulate > 1):
        raise InputError(
            f"trainer.overfit_batches={count!r}, training.accumulate={accumulate}: must be an integer number of "
            "batches, and training.accumulate=1"
        )


class SharedBatches:
    """A rank's rows of every batch of a loader: as many batches on each rank, as each may wait for the others.

    A rank without any row of a batch gets one that does not count: labels -100, valid False.
    """

    def __init__(self, loader: AnyEvaluationLoader, rank: int, world_size: int) -> None:
        self.loader = loader
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.loader:
            rows = len(batch["tokens"])
            size = -(-rows // self.world_size)
            if (first := self.rank * size) < rows:
                yield rows_of(batch, first, first + size)
                continue
            one = rows_of(batch, 0, 1)
            labels, valid = torch.full_like(one["labels"], -100), torch.zeros_like(one["labels"], dtype=torch.bool)
            yield {**one, "labels": labels, "valid": valid}


class RunBatches(pl.LightningDataModule):
    """Training batches, shared among the ranks, and those of the checks during the run."""

    def __init__(self, config: RunConfig, data: Data) -> None:
        super().__init__()
        self.config = config
        self.data = data

    @property
    def facts(self) -> dict[str, Any]:
        """What identifies the data, for environment.json."""
        return self.data.facts

    def require_same(self, environment: Path) -> None:
        """Raise InputError if what is read beside the text has changed since the run began: here there is nothing.

        Args:
            environment: the run's environment.json.
        """

    def training(self, rank: int = 0, world_size: int = 1) -> AnyTrainingLoader:
        """The loader of one rank: its share of every batch of the run, which are the same for any number of ranks.

        Args:
            rank, world_size: of ranks with other rows.

        Raises:
            InputError: the data do not fill a window.
        """
        config, training = self.config, self.config.training
        cached = config.distillation is not None and config.distillation.source == "cached"
        return training_loader(
            self.data,
            seq_len=training.seq_len,
            batch_size=training.batch_size // world_size,  # `require_degrees` has seen that it goes round
            num_batches=training.steps * training.accumulate,
            seed=config.seed,
            fixed_windows=training.fixed_windows or cached,  # as targets are kept for
            rank=rank,
            world_size=world_size,
        )

    def train_dataloader(self) -> Any:
        trainer = self.trainer
        assert trainer is not None
        shared = self.config.parallel.tensor  # ranks that share matrices have the same rows
        loader = self.training(trainer.global_rank // shared, trainer.world_size // shared)
        loader.accumulate = trainer.accumulate_grad_batches
        # our loaders go on in every epoch; these are the same batches in each
        if same := trainer.overfit_batches:  # type: ignore[attr-defined]
            return _Same(loader, same)
        return loader

    def evaluation(self) -> AnyEvaluationLoader:
        """Batches of a check, which the ranks share.

        Raises:
            InputError: the split is too short.
        """
        training = self.config.training
        return evaluation_loader(self.data, **evaluation_sizes(training), max_batches=training.validation_batches)

    def val_dataloader(self) -> AnyEvaluationLoader | SharedBatches:
        """Raises InputError as `evaluation`."""
        loader = self.evaluation()
        if self.trainer is None or self.trainer.world_size == 1:
            return loader
        shared = self.config.parallel.tensor  # ranks that share matrices have the same rows
        return SharedBatches(loader, self.trainer.global_rank // shared, self.trainer.world_size // shared)
