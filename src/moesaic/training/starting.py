"""What a run starts from: nothing, its own last checkpoint, or another run's."""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from moesaic.checkpoints import load_checkpoint, require_checkpoint
from moesaic.config import flatten, from_mapping, require_same, to_mapping
from moesaic.errors import InputError
from moesaic.files import LOCK, find_all, is_locked, old_of, partial_of, standing
from moesaic.formats import translate_run, version_of
from moesaic.imports import names_in, require_trusted, trusting
from moesaic.models import DecoderConfig
from moesaic.parallel.manifest import MANIFEST
from moesaic.reading import read_json, read_yaml, reading, require_finite
from moesaic.training.config import RunConfig
from moesaic.training.launched import is_one_process, processes, rank, rank_run_dir
from moesaic.training.records import TABLES, read_table
from moesaic.training.stored_state import require_training_state
from moesaic.training.strategies import is_sharded

__all__ = [
    "Found",
    "Start",
    "busy",
    "clear_unstarted",
    "find_run",
    "free_part",
    "has_score",
    "is_finished",
    "read_start",
    "require_free",
]

STAGES_FOLDER = "stages"
"""Folder of a run with the runs that are its earlier stages; a new start leaves it as it is."""

WRITTEN_EARLY = (
    *TABLES,
    "metrics.json",
    "environment.json",
    "tensorboard",
    "checkpoints",
    "sources",
)
"""What a run may have written before its first checkpoint."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What `resume=true` means where it was typed.

    Args:
        kind: new: there is no run yet. begun: it has no checkpoint, so it starts again, in its directory. unfinished:
            it goes on. finished: nothing is left to do.
        config: what to train; of a run that is there the one it was begun with.
        run_dir: the directory of a run that is there.
    """

    kind: Literal["new", "begun", "unfinished", "finished"]
    config: dict[str, Any]
    run_dir: Path | None = None
    ckpt_path: str | None = None
    """The checkpoint of another run that it was begun with."""
    typed: tuple[str, ...] = ()
    """Dotted keys of `config` that are not those of the run that is there."""

    @contextlib.contextmanager
    def naming_config(self) -> Iterator[None]:
        """Name the config.yaml of a run that is there in what is refused within, but for what was typed."""
        try:
            yield
        except InputError as error:
            if self.run_dir is None or str(error).startswith(self.typed):
                raise
            raise InputError(f"{self.run_dir / 'config.yaml'}: {error}") from error

    @property
    def resumed_dir(self) -> Path | None:
        """The directory whose checkpoint the run goes on from."""
        return self.run_dir if self.kind == "unfinished" else None


COMPONENTS = (
    "lightning.pytorch.callbacks.EarlyStopping",
    "lightning.pytorch.callbacks.EMAWeightAveraging",
    "lightning.pytorch.loggers.CSVLogger",
    "lightning.pytorch.loggers.TensorBoardLogger",
    "moesaic.training.rate_finder.LearningRateFinder",
    "moesaic.training.tensorboard.TensorBoardLogger",
)
"""Callbacks and loggers that a stored run may have without trust: those of conf/ that tell nobody outside."""


FREE = (
    "data.cache_dir",
    "logger",
    "parallel",
    "sample",
    "trainer.devices",
    "trainer.enable_progress_bar",
    "trainer.keep_freed_memory",
    "trainer.max_time",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.threads",
    "training.checkpoint_every",
)
"""Keys that a resumed run may have otherwise than it began: what it trains does not depend on them."""


def free_part(key: str) -> str | None:
    """The member of `FREE` that a dotted key is, or is below."""
    return next((name for name in FREE if key == name or key.startswith(f"{name}.")), None)


@dataclasses.dataclass(frozen=True)
class Start:
    """Where the weights of a run come from.

    Args:
        kind: fresh: random weights. resumed: the last checkpoint of the run itself, in its directory. continued:
            weights, optimizer and step of another run. weights: those alone, of a checkpoint that has no more (one
            that was converted, a teacher). extended: weights alone too, at a longer context. upcycled: those of a dense
            model, made into experts.
        path: the checkpoint; None if fresh.
        checkpoint: what it holds.
        run_dir: directory of a resumed run.
    """

    kind: Literal["fresh", "resumed", "continued", "weights", "extended", "upcycled"]
    path: Path | None = None
    checkpoint: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    run_dir: Path | None = None

    @property
    def fit_path(self) -> str | None:
        """The checkpoint that Lightning restores optimizer and loop from, if it does."""
        return str(self.path) if self.kind in ("resumed", "continued") else None


def read_start(config: RunConfig, resume_dir: Path | None) -> Start:
    """Read the checkpoint that `config` starts from, if there is one.

    Raises:
        InputError: it is missing or damaged.
    """
    if resume_dir is not None:
        path = resume_dir / "checkpoints" / "last.ckpt"
        checkpoint = _load_for(config, path)
        require_training_state(checkpoint, f"checkpoint {path}")
        _require_same_config(config, checkpoint, resume_dir / "config.yaml")
        for table in (resume_dir / name for name in TABLES):
            if os.path.lexists(table):
                read_table(table)
        return Start("resumed", path, checkpoint, resume_dir)
    if config.upcycle is not None:
        assert config.upcycle.checkpoint is not None  # checked at construction
        path = Path(config.upcycle.checkpoint)
        return Start("upcycled", path, load_checkpoint(path))
    if config.ckpt_path is None:
        return Start("fresh")
    path = Path(config.ckpt_path)
    if config.extend_context is not None:
        return Start("extended", path, load_checkpoint(path))
    checkpoint = _load_for(config, path)
    if "optimizer_states" not in checkpoint:
        return Start("weights", path, load_checkpoint(path) if path.is_dir() else checkpoint)
    require_training_state(checkpoint, f"checkpoint {path}")
    for name, state in checkpoint["callbacks"].items():
        if name.startswith("ModelCheckpoint"):  # its best file is in another run's folder, where this one has no say
            state["best_model_path"] = ""
    return Start("continued", path, checkpoint)


def _load_for(config: RunConfig, path: Path) -> dict[str, Any]:
    """What a checkpoint holds; ranks that share a model will read their parts, once the first has checked all."""
    reads_parts = is_sharded(config.trainer.strategy, config.parallel, processes(to_mapping(config.trainer)))
    return load_checkpoint(path, whole=not reads_parts, checked=not (reads_parts and rank()))


def _require_same_config(config: RunConfig, checkpoint: Mapping[str, Any], path: Path) -> None:
    """Refuse a config.yaml that was edited after the checkpoint was written: some of it would hold and some not."""
    with reading(f"checkpoint {path.parent / 'checkpoints' / 'last.ckpt'}"):
        stored = to_mapping(from_mapping(RunConfig, checkpoint["hyper_parameters"]["config"]))
    now = to_mapping(config)
    here = ("resume", "run_dir", "ckpt_path", "output_dir", "data.path")
    free = [key for key in {**flatten(stored), **flatten(now)} if free_part(key) is not None]
    require_same(f"{path}: changed since the checkpoint was written", stored, now, (*here, *free))


def find_run(config: Mapping[str, Any]) -> Found:
    """The run that `config` asks for: with resume=true the one in run_dir, or the newest unfinished one of this name.

    A run_dir without a run means a new one there, so that a scheduler can repeat one command.

    Raises:
        InputError: a directory of something else, a run that another process trains, or nothing to resume.
    """
    if not config.get("resume"):
        return Found("new", dict(config))
    if not config.get("run_dir"):
        root = Path(str(config.get("output_dir", "outputs"))) / str(config.get("name"))
        return _existing(_newest_unfinished(root), config)
    if not isinstance(config["run_dir"], str):
        raise InputError(f"run_dir={config['run_dir']!r}: must be a path; before a number write ./")
    run_dir = Path(config["run_dir"])
    if not run_dir.exists() or (run_dir.is_dir() and not _content(run_dir)):
        return Found("new", {**config, "resume": False})
    if not (run_dir / "config.yaml").is_file():
        raise InputError(f"run_dir={str(run_dir)!r}: not a run directory (it has no config.yaml)")
    if not _is_other_rank(run_dir, config) and is_locked(run_dir):  # to look is to hold it: another rank must not
        raise InputError(busy(run_dir))
    return _existing(run_dir, config)


def _is_other_rank(run_dir: Path, typed: Mapping[str, Any]) -> bool:
    """Whether this is one of several processes of a run, and not the one that holds the lock."""
    asked = (read_run_config(run_dir).get("trainer") or {}, typed.get("trainer") or {})
    return rank() > 0 and not all(map(is_one_process, asked))


def busy(run_dir: Path) -> str:
    """The message about a directory in which another process trains."""
    return f"run_dir={str(run_dir)!r}: another process is training in it; wait for its end, or choose another run_dir"


def require_free(run_dir: Path) -> None:
    """Raise InputError unless a new run may begin in a directory."""
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"run_dir={str(run_dir)!r}: a file; must be a directory, or a name that is free")
    if run_dir.is_dir() and _content(run_dir):
        raise InputError(f"run_dir={str(run_dir)!r}: exists and is not empty; resume=true continues a run in it")


def clear_unstarted(run_dir: Path) -> None:
    """Remove what a run without a checkpoint left behind; files of others stay."""
    for name in WRITTEN_EARLY:
        path = run_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _existing(run_dir: Path, typed: Mapping[str, Any]) -> Found:
    stored = read_run_config(run_dir)
    with trusting(names_in(typed)):
        require_trusted(names_in(stored), run_dir / "config.yaml", free=COMPONENTS)
    config = {**stored, "run_dir": str(run_dir)}
    finished, last = is_finished(run_dir), run_dir / "checkpoints" / "last.ckpt"
    if not finished and not _is_there(last):
        if has_score(run_dir):
            raise InputError(f"{last}: missing, and {run_dir / 'metrics.json'} has a score; put the checkpoint back")
        return Found("begun", {**config, "resume": False}, run_dir, config.get("ckpt_path"))
    resumed = {**config, "resume": True, "ckpt_path": None}
    return Found("finished" if finished else "unfinished", resumed, run_dir, config.get("ckpt_path"))


def _is_there(checkpoint: Path) -> bool:
    """Whether a run has its checkpoint; what stands in its place is no reason to begin again, which clears the folder.

    Raises:
        InputError: something else is there, such as a folder or a link to nowhere.
    """
    with reading(checkpoint.parent):
        if os.path.lexists(checkpoint.parent) and not checkpoint.parent.is_dir():
            raise InputError("must be a directory")
    with reading(f"checkpoint {checkpoint}"):
        if os.path.lexists(standing(checkpoint)):
            require_checkpoint(checkpoint)
            return True
    return False


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


def _newest_unfinished(root: Path) -> Path:
    if (told := rank_run_dir()) is not None:
        return told
    last = Path("checkpoints", "last.ckpt")
    places = [each for name in (last.name, old_of(last).name) for each in find_all(root, name)]
    places += [each.parent for each in find_all(root, MANIFEST) if each.parent.name in (last.name, old_of(last).name)]
    times: dict[Path, float] = {}
    for path in (place for place in places if place.parent.name == "checkpoints"):
        run_dir = path.parent.parent
        whole = run_dir.parents[1] if run_dir.parent.name == STAGES_FOLDER else run_dir  # a stage is a part of its run
        times[whole] = max(times.get(whole, 0.0), standing(run_dir / last).lstat().st_mtime)
    unfinished = [path for path in sorted(times) if not is_finished(path)]
    free = [path for path in unfinished if not is_locked(path)]
    if free:
        return max(free, key=times.__getitem__)
    training = f"; another process trains in {unfinished[0]}" if unfinished else ""
    raise InputError(
        f"resume=true: no unfinished run with a checkpoint under {root}{training}; give run_dir=<directory of a run>"
    )


def _content(directory: Path) -> bool:
    """Whether a directory holds more than what a run leaves that was killed before its config.yaml was whole."""
    early = (LOCK, partial_of(directory / "config.yaml").name)
    return any(path.name not in early for path in directory.iterdir())


def is_finished(run_dir: Path) -> bool:
    """Whether nothing is left to do for the run of a directory, pictures included."""
    try:
        metrics = read_json(run_dir / "metrics.json")
    except InputError:
        return False
    return metrics.get("status") == "finished" and "pending" not in metrics


def has_score(run_dir: Path) -> bool:
    """Whether a run has its numbers already, though pictures and text may be pending."""
    try:
        return "pending" in read_json(run_dir / "metrics.json")
    except InputError:
        return False
