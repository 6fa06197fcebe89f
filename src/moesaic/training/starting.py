"""What a run starts from: nothing, its own last checkpoint, or another run's."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from moesaic.checkpoints import load_checkpoint
from moesaic.config import from_mapping
from moesaic.errors import InputError
from moesaic.formats import translate_run, version_of
from moesaic.imports import names_in, require_trusted, trusting
from moesaic.models import DecoderConfig
from moesaic.reading import read_json, read_yaml, reading, require_finite
from moesaic.training.config import RunConfig
from moesaic.training.stored_state import require_training_state

__all__ = ["Start", "read_start", "resolve_resume"]

COMPONENTS = (
    "lightning.pytorch.callbacks.EarlyStopping",
    "lightning.pytorch.callbacks.EMAWeightAveraging",
    "lightning.pytorch.loggers.CSVLogger",
    "lightning.pytorch.loggers.TensorBoardLogger",
    "moesaic.training.rate_finder.LearningRateFinder",
)
"""Callbacks and loggers that a stored run may have without trust: those of conf/ that tell nobody outside."""


@dataclasses.dataclass(frozen=True)
class Start:
    """Where the weights of a run come from.

    Args:
        kind: fresh: random weights. resumed: the last checkpoint of the run itself, in its directory. continued:
            weights, optimiser and step of another run. weights: those alone, of a checkpoint that has no more (one
            that was converted, a teacher). extended: weights alone too, at a longer context.
        path: the checkpoint; None if fresh.
        checkpoint: what it holds.
        run_dir: directory of a resumed run.
    """

    kind: Literal["fresh", "resumed", "continued", "weights", "extended"]
    path: Path | None = None
    checkpoint: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    run_dir: Path | None = None

    @property
    def fit_path(self) -> str | None:
        """The checkpoint that Lightning restores optimiser and loop from, if it does."""
        return str(self.path) if self.kind in ("resumed", "continued") else None


def read_start(config: RunConfig, resume_dir: Path | None) -> Start:
    """Read the checkpoint that `config` starts from, if there is one.

    Raises:
        InputError: it is missing or damaged.
    """
    if resume_dir is not None:
        path = resume_dir / "checkpoints" / "last.ckpt"
        checkpoint = load_checkpoint(path)
        require_training_state(checkpoint, f"checkpoint {path}")
        return Start("resumed", path, checkpoint, resume_dir)
    if config.ckpt_path is None:
        return Start("fresh")
    path, checkpoint = Path(config.ckpt_path), load_checkpoint(config.ckpt_path)
    if config.extend_context is not None:
        return Start("extended", path, checkpoint)
    if "optimizer_states" not in checkpoint:
        return Start("weights", path, checkpoint)
    require_training_state(checkpoint, f"checkpoint {path}")
    return Start("continued", path, checkpoint)


def resolve_resume(config: Mapping[str, Any]) -> tuple[dict[str, Any], Path]:
    """The stored config and directory of the run to resume: run_dir, or the newest unfinished one of this name.

    Raises:
        InputError: no such directory, not a run directory, or nothing to resume in it.
    """
    if config.get("run_dir"):
        run_dir = Path(config["run_dir"])
        _require_unfinished(run_dir)
    else:
        root = Path(str(config.get("output_dir", "outputs"))) / str(config.get("name"))
        candidates = [path.parent.parent for path in root.glob("**/checkpoints/last.ckpt")]
        unfinished = [path for path in candidates if _status(path) != "finished"]
        if not unfinished:
            raise InputError(
                f"resume=true: no unfinished run with a checkpoint under {root}; give run_dir=<directory of a run>"
            )
        run_dir = max(unfinished, key=lambda path: (path / "checkpoints" / "last.ckpt").stat().st_mtime)
    stored = read_run_config(run_dir)
    with trusting(names_in(config)):
        require_trusted(names_in(stored), run_dir / "config.yaml", free=COMPONENTS)
    return {**stored, "run_dir": str(run_dir), "resume": True, "ckpt_path": None}, run_dir


def read_run_config(run_dir: Path) -> dict[str, Any]:
    """The stored config of a run, in the words of this version.

    Raises:
        InputError: config.yaml is damaged, is not of a run, or of a newer version.
    """
    path = run_dir / "config.yaml"
    with reading(path):
        stored = read_yaml(path)
        require_finite(stored, "")
        config = translate_run(stored)
        run_config = from_mapping(RunConfig, config)
        version_of(run_config.model, "model")
        from_mapping(
            DecoderConfig, {**run_config.model, "vocab_size": run_config.model.get("vocab_size") or 1}, "model"
        )
        return config


def _require_unfinished(run_dir: Path) -> None:
    if not (run_dir / "config.yaml").is_file():
        raise InputError(f"run_dir={str(run_dir)!r}: not a run directory (it has no config.yaml)")
    checkpoint = run_dir / "checkpoints" / "last.ckpt"
    if not checkpoint.is_file():
        raise InputError(f"run_dir={str(run_dir)!r}: nothing to resume, it has no checkpoints/last.ckpt")
    if _status(run_dir) == "finished":
        raise InputError(
            f"run_dir={str(run_dir)!r}: this run is finished; to train on, start a new one with "
            f"ckpt_path={checkpoint} and more training.steps"
        )


def _status(run_dir: Path) -> str | None:
    try:
        return read_json(run_dir / "metrics.json").get("status")
    except InputError:
        return None
