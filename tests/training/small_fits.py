"""What tests of the training module share: a few steps of a toy model on random tokens, without a run around them."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader

from moesaic.config import to_mapping
from moesaic.data import with_step_counts
from moesaic.models import DecoderConfig
from moesaic.training.config import BalanceConfig, RunConfig, TrainerConfig, TrainingConfig
from moesaic.training.module import LanguageModel

Batch = dict[str, torch.Tensor]


def batches(count: int, size: int = 2, length: int = 16) -> list[Batch]:
    draw = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, 512, (size, length + 1), generator=draw) for _ in range(count)]
    return [{"tokens": t[:, :-1], "labels": t[:, 1:]} for t in tokens]


def make(
    model: DecoderConfig, *, accumulate: int = 1, checkpoint_activations: bool = False, **balance: Any
) -> LanguageModel:
    torch.manual_seed(0)
    config = RunConfig(
        name="test",
        model=to_mapping(model),
        training=TrainingConfig(steps=3, batch_size=2, seq_len=16, accumulate=accumulate, log_every=1),
        balance=BalanceConfig(**balance),
        trainer=TrainerConfig(checkpoint_activations=checkpoint_activations),
    )
    return LanguageModel(to_mapping(config), to_mapping(model))


def fit(module: LanguageModel, data: list[Batch], validation: list[Batch] | None = None) -> LanguageModel:
    training = module.config.training
    steps = [data[i : i + training.accumulate] for i in range(0, len(data), training.accumulate)]
    data = [batch for step in steps for batch in with_step_counts(step)]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=len(data) // training.accumulate,
        accumulate_grad_batches=training.accumulate,
        val_check_interval=1 if validation else None,
        num_sanity_val_steps=0,
        logger=DummyLogger(),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(
        module, DataLoader(data, batch_size=None), DataLoader(validation, batch_size=None) if validation else None
    )  # type: ignore[arg-type]
    return module
