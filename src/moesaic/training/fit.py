"""Training itself: module and Trainer of a prepared run, and how it ended."""

import dataclasses
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from rich.console import Console

from moesaic.errors import DISK_ERRORS, CannotWrite, InputError
from moesaic.training.callbacks import LastCheckpoint, PlainProgress, ProgressBar, RunMonitor, TimeLimit
from moesaic.training.checkpoint_io import RunCheckpointIO
from moesaic.training.components import make_loggers
from moesaic.training.config import RunConfig
from moesaic.training.fp8 import multiplying_in_fp8
from moesaic.training.launched import is_lost, rank
from moesaic.training.lightning_options import TENSORBOARD, ignore_advice, quiet_lightning
from moesaic.training.meeting import no_meeting
from moesaic.training.module import Diverged, LanguageModel
from moesaic.training.prepare import Prepared, trainer_options
from moesaic.training.rate_finder import LearningRateFinder
from moesaic.training.records import RunLogger

__all__ = ["WARNED", "Fitted", "fit", "shown_loggers"]

WARNED = "the scheduler's warning (SIGUSR1)"
"""Why a run stopped that a scheduler warned."""

BOARD = TENSORBOARD["_target_"]

RESTORING = ("load_state_dict", "on_load_checkpoint")
"""Names of the functions that put a state back, of Lightning's checkpoint connector besides."""

PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A run whose training is over."""

    prepared: Prepared
    module: LanguageModel
    trainer: pl.Trainer
    warnings: list[str]
    status: dict[str, Any]
    """{"status": "finished" | "stopped" | "diverged"}, and why: "error", or "stopped_by" before training.steps.

    Only a stopped run, which ran out of time, can be resumed.
    """

    @property
    def has_verdict(self) -> bool:
        """Whether the weights are worth an evaluation: not after divergence, nor after a range test."""
        return self.status["status"] != "diverged" and self.finder is None

    @property
    def finder(self) -> LearningRateFinder | None:
        """The range test that this run was, if it was one."""
        return next((each for each in self.prepared.callbacks if isinstance(each, LearningRateFinder)), None)


def fit(prepared: Prepared, module: LanguageModel, console: Console) -> Fitted:
    """Train. What ends a run otherwise than by its own will (a signal, a bug) is raised.

    Raises:
        Interrupted: a signal; the state is saved if it came during training.
    """
    run_dir, start = prepared.run_dir, prepared.start
    own, monitor = RunLogger(run_dir), RunMonitor(run_dir)
    if start.kind == "resumed" and not rank():
        for table in (own.table, monitor.table):
            table.keep_until(start.checkpoint["global_step"])
    step = start.checkpoint["global_step"] if start.kind == "resumed" else 0
    trainer = _trainer(prepared, [own, *make_loggers(shown_loggers(prepared.config), run_dir, step)], monitor)
    try:
        with warnings.catch_warnings(), multiplying_in_fp8(prepared.config.trainer, module):
            ignore_advice()
            trainer.fit(module, datamodule=prepared.batches, ckpt_path=start.fit_path, weights_only=True)
        status = _ended(trainer, prepared)
    except Diverged as error:
        warnings.warn(str(error), RuntimeWarning, stacklevel=2)
        monitor.warnings.append(str(error))
        status = {"status": "diverged", "error": str(error)}
    except SystemExit as error:  # Lightning's answer to KeyboardInterrupt, after which it ignores Ctrl-C
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, OSError) as error:
        if (full := _disk_error(error)) is not None and not isinstance(error, CannotWrite):
            raise CannotWrite(full.filename or run_dir, full) from error
        if (alone := no_meeting(error)) is not None:
            raise alone from error
        last = next(each for each in trainer.callbacks if isinstance(each, LastCheckpoint))  # type: ignore[attr-defined]
        if isinstance(error, (InputError, OSError)) or last.began or not _is_restoring(error) or is_lost(error):
            raise
        raise InputError(f"checkpoint {start.path}: its training state cannot be restored ({error!r})") from error
    return Fitted(prepared, module, trainer, monitor.warnings, status)


def _is_restoring(error: Exception) -> bool:
    """Whether an error came while the state of a checkpoint was put back, and so may be the checkpoint's."""
    frames = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(code.co_name in RESTORING or Path(code.co_filename).stem == "checkpoint_connector" for code in frames)


def shown_loggers(config: RunConfig) -> dict[str, Any]:
    """The loggers of a run; TensorBoard is for runs that somebody looks at."""
    presents = config.finish == "all"
    return {name: each for name, each in config.logger.items() if presents or each["_target_"] != BOARD}


def _disk_error(error: BaseException | None) -> OSError | None:
    """The full or read-only disk behind an error: loggers of others hide it in one of their own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return error
        error = error.__cause__ or error.__context__
    return None


def _ended(trainer: pl.Trainer, prepared: Prepared) -> dict[str, Any]:
    if trainer.global_step >= prepared.config.training.steps:
        return {"status": "finished"}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, LastCheckpoint) and callback.warned:
            return {"status": "stopped", "stopped_by": WARNED}
        if isinstance(callback, TimeLimit) and callback.expired:
            return {
                "status": "stopped",
                "stopped_by": f"time limit (trainer.max_time={prepared.config.trainer.max_time})",
            }
        if isinstance(callback, EarlyStopping) and callback.stopping_reason is not EarlyStoppingReason.NOT_STOPPED:
            return {"status": "finished", "stopped_by": f"early stopping: {callback.stopping_reason_message}"}
        if isinstance(callback, LearningRateFinder):
            return {"status": "finished", "stopped_by": "learning rate finder"}
    return {"status": "finished", "stopped_by": "a callback, or an option of Lightning's Trainer"}


def _trainer(prepared: Prepared, loggers: list[Logger], monitor: RunMonitor) -> pl.Trainer:
    training, trainer, run_dir = prepared.config.training, prepared.config.trainer, prepared.run_dir
    quiet_lightning()
    options: dict[str, Any] = {
        "accelerator": trainer.accelerator,
        "max_steps": training.steps,
        "max_epochs": -1,
        "accumulate_grad_batches": training.accumulate,
        "val_check_interval": training.validate_every * training.accumulate,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,  # LanguageModel decides which steps are logged
        "use_distributed_sampler": False,  # the loaders shard by themselves
        "enable_model_summary": False,
        "enable_progress_bar": sys.stdout.isatty(),
        "default_root_dir": run_dir,
        **trainer_options(prepared.config),  # whose precision has been resolved
    }
    options["plugins"] = [*options["plugins"], RunCheckpointIO(prepared.start.checkpoint)]
    if isinstance(options.get("profiler"), str) and options["profiler"] in PROFILERS:
        options["profiler"] = PROFILERS[options["profiler"]](dirpath=run_dir, filename="profile")
    checkpoints = run_dir / "checkpoints"
    callbacks: list[pl.Callback] = [
        monitor,  # before the checkpoints, so that what they hold has been logged
        ProgressBar() if options["enable_progress_bar"] else PlainProgress(),
        *([] if trainer.max_time is None else [TimeLimit(trainer.max_time)]),
        *prepared.callbacks,
        ModelCheckpoint(checkpoints, "best", monitor="validation/loss", mode="min", enable_version_counter=False),
        LastCheckpoint(checkpoints / "last.ckpt", training.checkpoint_every, training.validate_every),
    ]
    return pl.Trainer(**options, logger=loggers, callbacks=callbacks)
