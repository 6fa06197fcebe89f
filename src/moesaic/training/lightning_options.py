"""What Lightning's Trainer takes beyond the keys of this project."""

import inspect
import logging
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from moesaic.errors import InputError

__all__ = ["DOUBLES", "TENSORBOARD", "ignore_advice", "option_names", "quiet_lightning", "require_options"]

DOUBLES = {
    "max_steps": "training.steps",
    "max_epochs": "training.steps",
    "accumulate": "training.accumulate",
    "accumulate_grad_batches": "training.accumulate",
    "gradient_clip": "training.gradient_clip",
    "gradient_clip_val": "training.gradient_clip",
    "gradient_clip_algorithm": "training.gradient_clip, which is a norm",
    "val_check_interval": "training.validate_every",
    "limit_train_batches": "training.steps",
    "check_val_every_n_epoch": "training.validate_every",
    "log_every_n_steps": "training.log_every",
    "enable_checkpointing": "training.checkpoint_every",
    "default_root_dir": "output_dir, or run_dir",
    "callbacks": "the group callbacks=NAME",
    "logger": "the group logger=NAME",
    "reload_dataloaders_every_n_epochs": "nothing: a run is one epoch",
    "use_distributed_sampler": "nothing: the loaders share the batches among processes themselves",
}
"""Names of Lightning's Trainer, and names that people type for them, that double a key of ours."""

TENSORBOARD = {
    "_target_": "moesaic.training.tensorboard.TensorBoardLogger",
    "name": "tensorboard",
    "version": "",
    "swept": [],
}
"""The default logger, as conf/logger/tensorboard.yaml has it."""


def option_names() -> Collection[str]:
    """Names that `trainer.*` understands beside its own fields: those of Lightning's Trainer, refused doubles too."""
    return [name for name in inspect.signature(pl.Trainer.__init__).parameters if name != "self"] + list(DOUBLES)


def quiet_lightning() -> None:
    """Let Lightning say warnings only; the run's own summary names devices and what is trained."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # its one message says which process has ended, before it ends this one
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)


def ignore_advice() -> None:
    """Ignore warnings about what is done on purpose (no loader workers, continued runs), and Lightning's own debts."""
    for message in (
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*You're resuming from a checkpoint that ended before the epoch ended.*",
        ".*The dirpath has changed from.*",
        ".*LeafSpec.* is deprecated.*",
        ".*FSDP.* returned a view tensor.*",  # nothing works on it in place
        ".*find_unused_parameters=True was specified.*",  # a custom module may leave one out in another step
        ".*WeightAveraging callback with a model that overrides.*",  # an average of a sharded model is refused
    ):
        warnings.filterwarnings("ignore", message)


def require_options(options: Mapping[str, Any]) -> pl.Trainer:
    """Let Lightning check its own options, before a run writes anything; returns the Trainer that it makes of them.

    Args:
        options: keyword arguments of Lightning's Trainer.

    Raises:
        InputError: Lightning refuses them.
    """
    quiet_lightning()
    try:
        return pl.Trainer(**{"enable_progress_bar": False, "enable_model_summary": False, "logger": False, **options})
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ModuleNotFoundError) as error:
        plain = {name: value for name, value in options.items() if isinstance(value, (str, int, float, list))}
        given = ", ".join(f"trainer.{name}={value}" for name, value in plain.items() if name != "plugins")
        raise InputError(f"{given}: Lightning refuses this: {' '.join(str(error).split())}") from error
