"""Watching a run: rows per logged step, expert load over time, alarms, and progress where there is no terminal."""

import contextlib
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, RichProgressBar, Timer
from lightning.pytorch.utilities import rank_zero_warn

from moesaic.evaluation.routing import expert_load, load_health
from moesaic.interrupts import ENDING, WARNING, Interrupted, handling
from moesaic.training.module import LanguageModel
from moesaic.training.records import CsvTable

__all__ = ["LastCheckpoint", "PlainProgress", "ProgressBar", "RunMonitor", "TimeLimit"]


class RunMonitor(pl.Callback):
    """Logs every log_every-th step, keeps routing.csv, and warns once for each layer that collapses.

    A layer counts as collapsed when, for at least `patience` steps and three logged ones in a row, more than half of
    its experts are dead or the fullest expert is more than half of the way from balance to taking every token.
    """

    patience = 20

    def __init__(self, run_dir: Path) -> None:
        self.table = CsvTable(run_dir / "routing.csv", ["step", "layer", "expert", "load"])
        self.warnings: list[str] = []
        self._suspicious: dict[str, list[int]] = {}
        self._warned: set[str] = set()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        assert isinstance(module, LanguageModel)
        if not module.log_step():
            return
        rows = []
        for layer, counts in module.logged_load.items():
            load = expert_load(counts)
            rows += [
                {"step": trainer.global_step, "layer": layer, "expert": e, "load": f"{value:.6g}"}
                for e, value in enumerate(load.tolist())
            ]
            self._check_collapse(module, layer, counts, trainer.global_step)
        if rows and trainer.is_global_zero:
            self.table.append(rows)
        module.logged_load = {}

    def _check_collapse(self, module: LanguageModel, layer: str, counts: torch.Tensor, step: int) -> None:
        num_experts = counts.numel()
        moe = module.decoder.get_submodule(layer)
        top_k = getattr(getattr(moe, "router", None), "top_k", 1)
        worst = num_experts / top_k - 1  # max_violation when every token chooses the same experts
        if worst <= 0:
            return
        max_violation, dead_share = load_health(counts)
        collapsed = dead_share > 0.5 or max_violation > worst / 2
        bad_steps = self._suspicious[layer] = [*self._suspicious.get(layer, []), step] if collapsed else []
        if len(bad_steps) < 3 or step - bad_steps[0] < self.patience or layer in self._warned:
            return
        self._warned.add(layer)
        balance = module.config.balance
        if balance.load_balance_loss_weight or balance.expert_bias_update_rate:
            cause = (
                "balancing is on but too weak: raise balance.load_balance_loss_weight or "
                "balance.expert_bias_update_rate, or lower optimizer.learning_rate"
            )
        else:
            cause = "no balancing is on: try balance.load_balance_loss_weight=0.01"
        self._warn(
            f"step {step}: {layer} has collapsed: its fullest expert takes {max_violation + 1:.1f}x its ideal load "
            f"(worst possible {worst + 1:.1f}x), {dead_share:.0%} of its experts are dead. Likely cause: {cause}."
        )

    def _warn(self, message: str) -> None:
        self.warnings.append(message)
        rank_zero_warn(message, category=RuntimeWarning)


class LastCheckpoint(Checkpoint):
    """Keeps the newest state in `path`, as of every `every`-th step and of the last; where it is validated, after that.

    Lightning's own `every_n_train_steps` saves before, and a run that goes on from there never validates that step: its
    row would be missing, and the state that validation leaves (best loss, choices of experts) older than it.
    Stands after the checkpoint of the best loss among the callbacks.

    A signal that ends processes lets the step finish, is kept until its state is saved, and then raised as Interrupted;
    a second one is raised at once. Lightning's own handler would drop the step. The signal by which a scheduler warns
    ends training as `TimeLimit` does.
    """

    def __init__(self, path: Path, every: int, validate_every: int) -> None:
        self.path = path
        self.every = every
        self.validate_every = validate_every
        self.began = False
        """Whether training has begun: what failed before is the state of the checkpoint."""
        self.warned = False
        """Whether a scheduler warned that time is nearly over."""
        self._saved = 0
        self._signum = 0
        self._handlers = contextlib.ExitStack()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.began = True
        self._saved = trainer.global_step
        warning = () if WARNING is None else (WARNING,)
        self._handlers.enter_context(handling(self._note, *ENDING, *warning))

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        if (batch_index + 1) % trainer.accumulate_grad_batches:
            return  # not the end of a step
        self._agree(trainer)
        is_validated = trainer.global_step % self.validate_every == 0 and trainer.enable_validation
        if not is_validated or trainer.should_stop:
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._agree(trainer)
        self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._handlers.close()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._handlers.close()

    def _note(self, signum: int, frame: Any) -> None:
        if signum == WARNING:
            self.warned = True
        elif self._signum:
            raise Interrupted(signum)
        else:
            self._signum = signum

    def _agree(self, trainer: pl.Trainer) -> None:
        """What one rank was told holds for all, and what a callback decided there."""
        if trainer.world_size > 1:
            told = torch.tensor([self._signum, self.warned, trainer.should_stop], device=trainer.strategy.root_device)
            signum, warned, stop = trainer.strategy.reduce(told, reduce_op="max").tolist()
            self._signum, self.warned, trainer.should_stop = int(signum), bool(warned), bool(stop)
        trainer.should_stop = trainer.should_stop or self.warned

    def _save(self, trainer: pl.Trainer) -> None:
        """Once per step: the micro-batches that follow it have the same number until the next one."""
        step = trainer.global_step
        if trainer.should_stop or self._signum or (step % self.every == 0 and step != self._saved):
            trainer.save_checkpoint(self.path)
            self._saved = step
        if self._signum:
            raise Interrupted(self._signum)


class TimeLimit(Timer):
    """Stops a run after so much training in this process, at the end of an optimizer step.

    Lightning's own timer counts on in a resumed run, which would stop at once, and may stop within a step, whose
    gradients would be lost.

    Args:
        duration: DD:HH:MM:SS.
    """

    def __init__(self, duration: str) -> None:
        super().__init__(duration, verbose=False)
        self.expired = False

    def on_fit_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """The clock has not started yet."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        if (batch_index + 1) % trainer.accumulate_grad_batches:
            return
        super().on_train_batch_end(trainer)
        self.expired = (self.time_remaining() or 0.0) <= 0

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A resumed run has the whole time again."""


class ProgressBar(RichProgressBar):
    """Lightning's bar, with the two numbers that matter, and without the one epoch that a run consists of."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, int | str | float | Any]:
        metrics = trainer.progress_bar_metrics
        if "loss" not in metrics:
            return {}
        return {"loss": f"{metrics['loss']:.3f}", "tokens/s": f"{metrics['tokens/s']:,.0f}"}

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"


class PlainProgress(pl.Callback):
    """A line every few seconds, for logs and pipes where a progress bar would show nothing."""

    def __init__(self, every_seconds: float = 15.0) -> None:
        self.every_seconds = every_seconds
        self._last = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._last = time.monotonic()
        self._begin = self._last, trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        now, step, steps = time.monotonic(), trainer.global_step, int(trainer.max_steps)
        metrics = trainer.progress_bar_metrics if trainer.is_global_zero else {}
        if "loss" not in metrics or (now - self._last < self.every_seconds and step < steps):
            return
        self._last = now
        started, first = self._begin
        left = (now - started) / max(1, step - first) * (steps - step)
        print(
            f"step {step}/{steps}  loss {metrics['loss']:.3f}  {metrics['tokens/s']:,.0f} tokens/s  {left:.0f} s left",
            flush=True,
        )
