"""A range test of learning rates: one factor for all of them, because matrices and the rest have rates of their own."""

import math
from typing import Any

import lightning.pytorch as pl
from torch.optim.lr_scheduler import LambdaLR

from moesaic.training.module import LanguageModel

__all__ = ["LearningRateFinder"]


class LearningRateFinder(pl.Callback):
    """Turns a run into a range test: the factor on the learning rates grows at every step, until the loss explodes.

    The schedule of the run is put aside. The suggestion is the factor where the smoothed loss falls fastest per octave
    of the factor (Smith 2017). The run ends with the test and has no verdict. Lightning's own finder would give all
    groups of parameters one rate.

    Args:
        lowest, highest: factors on the learning rates of the config.
        steps: optimizer steps of the test; fewer in a run that has fewer.
        smoothing: share of the past in the running mean of the loss.
        explosion: the test ends when the smoothed loss is this multiple of its minimum.
    """

    def __init__(
        self,
        lowest: float = 0.01,
        highest: float = 100.0,
        steps: int = 100,
        smoothing: float = 0.9,
        explosion: float = 2.0,
    ) -> None:
        if not 0 < lowest < highest:
            raise ValueError(f"lowest={lowest}, highest={highest}: must be 0 < lowest < highest")
        if steps < 5 or not 0 <= smoothing < 1 or explosion <= 1:
            raise ValueError("it must be steps >= 5, 0 <= smoothing < 1 and explosion > 1")
        self.lowest, self.highest, self.steps = lowest, highest, steps
        self.smoothing, self.explosion = smoothing, explosion
        self.losses: list[float] = []
        """Smoothed training loss in nats per token, by step."""
        self._sum, self._micro_batches, self._mean = 0.0, 0, 0.0

    def factor(self, step: int) -> float:
        """The multiple of the config's learning rates at a step, counted from 0."""
        return self.lowest * (self.highest / self.lowest) ** (min(step, self.steps - 1) / (self.steps - 1))

    def suggestion(self) -> float | None:
        """The factor where the loss falls fastest; None if it never fell."""
        slopes = [after - before for before, after in zip(self.losses, self.losses[2:], strict=False)]
        return self.factor(slopes.index(min(slopes)) + 1) if slopes and min(slopes) < 0 else None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        scheduler = trainer.lr_scheduler_configs[0].scheduler
        assert isinstance(scheduler, LambdaLR)
        first = scheduler.last_epoch  # more than 0 in a run that goes on from a checkpoint
        self.steps = max(2, min(self.steps, int(trainer.max_steps) - first))  # a short run covers the range too
        scheduler.lr_lambdas = [lambda step: self.factor(step - first)] * len(scheduler.base_lrs)
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
            group["lr"] = rate * self.factor(0)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        assert isinstance(module, LanguageModel)
        self._sum += module.over_ranks(outputs["loss"])  # so that all ranks end at the same step
        self._micro_batches += 1
        if self._micro_batches < trainer.accumulate_grad_batches:
            return
        loss, self._sum, self._micro_batches = self._sum / self._micro_batches, 0.0, 0
        self._mean = self.smoothing * self._mean + (1 - self.smoothing) * loss
        self.losses.append(self._mean / (1 - self.smoothing ** (len(self.losses) + 1)))
        exploded = not math.isfinite(loss) or self.losses[-1] > self.explosion * min(self.losses)
        trainer.should_stop = trainer.should_stop or exploded or len(self.losses) >= self.steps
