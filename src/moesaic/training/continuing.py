"""What a run may continue from: a checkpoint that means what the config says."""

import logging
from pathlib import Path
from typing import Any

from moesaic.checkpoints import require_same_keys
from moesaic.config import from_mapping, to_mapping
from moesaic.data import Data, DataConfig, Tokenizer, tokenizer_from_dict
from moesaic.data.tasks import TASKS
from moesaic.distillation.config import teacher_mapping
from moesaic.errors import InputError
from moesaic.models import DecoderConfig
from moesaic.reading import read_json, reading
from moesaic.training.config import RunConfig

__all__ = [
    "require_all_batches",
    "require_same_data",
    "require_same_distillation",
    "require_same_optimizer",
    "require_steps_left",
    "tokenizer_to_keep",
]


logger = logging.getLogger("moesaic.training")


def tokenizer_to_keep(path: str, checkpoint: dict[str, Any], data: DataConfig) -> Tokenizer | None:
    """The tokenizer that the embedding of a checkpoint was trained with: a run that goes on reads its text with it.

    A BPE trained anew on other text may have the same size, and its ids would mean other words.

    Raises:
        InputError: `data` ask for another tokenizer, or are of a recall task with other ids.
    """
    stored, before = checkpoint["hyper_parameters"]["tokenizer"], checkpoint["hyper_parameters"]["config"]["data"]
    if not before:
        return None if stored is None or data.make_task() is not None else tokenizer_from_dict(stored)
    task_before = (before["source"], before.get("task") or {}) if before["source"] in TASKS else None
    if (task := data.make_task()) is not None or task_before is not None:
        whole = None if task_before is None else to_mapping(from_mapping(TASKS[task_before[0]], task_before[1], "task"))
        if task is None or whole is None or (before["source"], whole) != (data.source, to_mapping(task)):
            raise InputError(
                f"data.source={data.source!r}: checkpoint {path} was trained on {before['source']!r}"
                f"{'' if whole is None else f' with {whole}'}; its ids must mean the same"
            )
        return None
    if stored is None:
        if data.source != "memmap":
            raise InputError(
                f"data.source={data.source!r}: checkpoint {path} has no tokenizer; must be memmap, token ids"
            )
        return None
    tokenizer = tokenizer_from_dict(stored)
    if data.source == "memmap":
        return tokenizer
    if data.tokenizer != stored["kind"]:
        raise InputError(
            f"data.tokenizer={data.tokenizer!r}: checkpoint {path} has {stored['kind']!r}; must be the same"
        )
    if stored["kind"] == "bpe" and data.vocab_size not in (tokenizer.vocab_size, before["vocab_size"]):
        raise InputError(
            f"data.vocab_size={data.vocab_size}: checkpoint {path} has a BPE of {tokenizer.vocab_size}; must be equal: "
            f"add data.vocab_size={tokenizer.vocab_size}"
        )
    return tokenizer


def require_same_data(environment: Path, data: Data) -> None:
    """Raise InputError if the text of a run has changed since it began.

    Args:
        environment: the run's environment.json, which keeps a hash of the text.
    """
    if not environment.is_file():
        logger.warning("%s: missing, so nobody can tell whether the data are the same", environment)
        return
    with reading(environment):
        before = read_json(environment)["data"].get("content_hash")
    now = data.facts.get("content_hash")
    if before != now:
        raise InputError(
            f"data: the text has changed since this run began (its hash was {before}, it is {now}); put it back, or "
            f"start a new run with ckpt_path={environment.parent / 'checkpoints' / 'last.ckpt'}"
        )


def require_same_optimizer(path: str, checkpoint: dict[str, Any], config: RunConfig) -> None:
    """Raise InputError if a checkpoint holds the state of another optimizer than the one of `config`."""
    if "optimizer_states" not in checkpoint:
        return
    before = checkpoint["hyper_parameters"]["config"]["optimizer"]["name"]
    if before != config.optimizer.name:
        raise InputError(
            f"optimizer.name={config.optimizer.name!r}: checkpoint {path} has the state of {before!r}; must be the "
            "same, or start from its weights alone, written with moesaic.checkpoints.save_model"
        )


def require_steps_left(path: str, checkpoint: dict[str, Any], config: RunConfig) -> None:
    """Raise InputError if a run that goes on from a checkpoint has nothing to do."""
    if config.training.steps <= checkpoint["global_step"]:
        raise InputError(
            f"training.steps={config.training.steps}: checkpoint {path} is at step {checkpoint['global_step']}; must "
            "be more, because steps count from the beginning"
        )


def require_all_batches(path: str, checkpoint: dict[str, Any], config: RunConfig) -> None:
    """Raise InputError if a run that goes on from a checkpoint, or the run before, takes the first few batches only."""
    before = checkpoint["hyper_parameters"]["config"].get("trainer") or {}
    if count := before.get("overfit_batches"):
        raise InputError(
            f"checkpoint {path}: of a run with trainer.overfit_batches={count}, whose steps say nothing of the place "
            "in the data; must be of another run"
        )
    for name in ("overfit_batches", "fast_dev_run"):
        if value := config.trainer.lightning.get(name):
            raise InputError(
                f"trainer.{name}={value}: checkpoint {path} is further than the first batches; must be left out, or "
                "start a run without ckpt_path"
            )


def require_same_distillation(path: str, checkpoint: dict[str, Any], config: RunConfig, model: DecoderConfig) -> None:
    """Raise InputError if a checkpoint's optimizer has a teacher or a weight policy where `config` has none, or others.

    A checkpoint of weights only starts any run.
    """
    if "optimizer_states" not in checkpoint:
        return
    stored = checkpoint["hyper_parameters"]["config"].get("distillation")
    wanted = config.distillation
    found = "none" if stored is None else stored["source"]
    asked = "none" if wanted is None else wanted.source
    on_disk = ("frozen", "cached")  # these two may follow each other: the state of a run is the same
    if found != asked and not (found in on_disk and asked in on_disk):
        raise InputError(
            f"checkpoint {path}: of a run with distillation source {found}, the config has {asked}; to start from its "
            "weights alone, write them with moesaic.checkpoints.save_model"
        )
    if stored is not None and wanted is not None and asked == "joint":
        theirs = teacher_mapping(checkpoint["hyper_parameters"]["model"], stored["teacher_model"])
        require_same_keys("teacher_model", path, theirs, teacher_mapping(to_mapping(model), wanted.teacher_model))
