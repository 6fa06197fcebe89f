"""Train a model: moesaic train [experiment=NAME] [key=value ...]; -m for a sweep. See conf/train.yaml."""

import contextlib
import dataclasses
import json
import math
import os
import re
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from moesaic.arms import short_keys, short_value
from moesaic.cli.common import launch, plain, printable
from moesaic.config import flatten
from moesaic.errors import InputError
from moesaic.files import write_json, write_yaml
from moesaic.overrides import for_shell, override
from moesaic.studies.sweep import DEFAULT_METRICS, ENDED, collect_runs, write_report
from moesaic.training.fit import WARNED
from moesaic.training.launched import require_one_process
from moesaic.training.run import run_found
from moesaic.training.starting import Found, find_run, free_part, is_finished

__all__ = ["OfSweep", "main", "objective", "train", "train_in_sweep"]

sweeps: dict[Path, int] = {}
"""Directory of each sweep of this process, and how many runs found that their place there was taken."""

SWEPT = "MOESAIC_SWEPT"
"""Environment variable with the keys that a command sweeps, for the processes in which a launcher puts its runs."""


class OfSweep(Callback):
    """What the process of a sweep hears of it, whose runs may be in other processes."""

    def on_multirun_start(self, config: DictConfig, **others: Any) -> None:
        sweeps[Path(config.hydra.sweep.dir).absolute()] = 0


def train(config: dict[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """One run of a composed config; returns its final metrics.

    When resuming, the stored config of the run counts; `overrides` (key=value) that contradict it are refused.
    """
    if "study" in config:
        raise InputError(f"this is a study: moesaic study experiment=study_{config['name']}")
    if "ladder" in config:
        raise InputError(f"this is a ladder: moesaic ladder experiment={config['name']}")
    found = find_run(config)
    return run_found(found if found.run_dir is None else _with_free_keys(found, config, overrides))


def _with_free_keys(found: Found, config: dict[str, Any], overrides: Sequence[str]) -> Found:
    """The run that is there, under overrides that do not change what it trains; others than its own are refused."""
    stored, changed, free_keys = {**found.config, "ckpt_path": found.ckpt_path}, found.config, list[str]()
    for typed in overrides:
        key, _, value = typed.lstrip("+~").partition("=")
        if key in ("resume", "run_dir", "output_dir", "name", "experiment", "debug", "trust"):
            continue
        if (free := free_part(key)) is not None:
            changed = _with(changed, free.split("."), _at(config, free))
            free_keys.append(free)
            continue
        for name, asked in flatten({key: _at(config, key)}).items():  # of an option such as model=small every key
            before = _at(stored, name)
            if str(before) != str(asked) and (name, asked) != ("trainer.precision", "auto"):  # chosen when it began
                found_there = repr(before) if name == key else f"{name}={before!r}"
                raise InputError(
                    f"{key}={value}: the run to resume has {found_there}; resume continues it unchanged. For another "
                    f"value start a new run{_from(found, key)}"
                )
    return dataclasses.replace(found, config=changed, typed=tuple(free_keys))


def _from(found: Found, key: str) -> str:
    """What a new run may begin with where this key is another one."""
    last = found.config["run_dir"] + "/checkpoints/last.ckpt"
    goes_on = key.split(".")[0] in ("training", "optimizer", "schedule", "balance", "callbacks", "seed", "trainer")
    return f", with {for_shell(override('ckpt_path', last))}" if goes_on and found.kind != "begun" else ""


def _with(config: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    below = value if len(path) == 1 else _with(config.get(path[0]) or {}, path[1:], value)
    return {**config, path[0]: below}


def _at(config: Any, key: str) -> Any:
    """The value at a dotted key, None if there is none. Nothing in a stored config is resolved."""
    for name in key.split("."):
        config = config.get(name) if isinstance(config, dict) else None
    return config


def train_in_sweep(config: dict[str, Any], run_dir: Path) -> float:
    """One run of a sweep: a failure is recorded and the sweep goes on. All have one precision, to be comparable.

    Returns:
        what a sweeper minimizes.
    """
    if config["trainer"]["precision"] == "auto":
        config = {**config, "trainer": {**config["trainer"], "precision": "32-true"}}
    try:
        require_one_process(config["trainer"], "a sweep")
        metrics = train({**config, "run_dir": str(run_dir)})
    except Exception as error:
        if not isinstance(error, InputError):
            traceback.print_exc()
        print(f"error: {printable(error)}", file=sys.stderr)
        if is_finished(run_dir):
            sweeps[run_dir.parent] = sweeps.get(run_dir.parent, 0) + 1
            return math.inf
        if not (run_dir / "config.yaml").exists():
            write_yaml(run_dir / "config.yaml", config)
        metrics = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        write_json(run_dir / "metrics.json", metrics)
    if metrics.get("stopped_by") == WARNED:
        sys.exit(0)  # with the table of what there is
    return objective(metrics)


def objective(metrics: Mapping[str, Any]) -> float:
    """What a sweeper such as Optuna minimizes: bits per byte, or the loss; infinity of a run without numbers."""
    found = [metrics[name] for name in DEFAULT_METRICS if name in metrics]
    return float(found[0]) if found and metrics["status"] in ENDED and math.isfinite(found[0]) else math.inf


def directory_of_job(number: int, overrides: Sequence[str]) -> str:
    """Name the directory of a run in a sweep: its number, and what was swept.

    Args:
        number: of the run, from 0.
        overrides: of this run.
    """
    chosen = _swept(overrides)
    names = short_keys(chosen)
    arm = ",".join(f"{names[key]}={short_value(_simple(value))}" for key, value in chosen.items())
    arm = re.sub(r"[^\w.,=+-]+", "_", arm)[:LONGEST].rstrip("_")
    return f"{number}-{arm}" if arm else str(number)


OmegaConf.register_new_resolver("arm", directory_of_job, replace=True)

LONGEST = 80
"""Characters of what was swept in the name of a directory."""


def _swept(overrides: Sequence[str]) -> dict[str, Any]:
    """Keys with several values on the command line, and their values here; all keys if a file says what is swept."""
    several = json.loads(os.environ.get(SWEPT, "[]"))
    here = {each.key_or_group: each.value() for each in _parsed(overrides)}
    return {key: value for key, value in here.items() if key in several or not several}


def _parsed(arguments: Sequence[str]) -> list[Override]:
    """The overrides among these arguments."""
    found = []
    for argument in arguments:
        with contextlib.suppress(HydraException):
            found.append(OverridesParser.create().parse_override(argument))
    return found


def _simple(value: Any) -> Any:
    """A value as Hydra's parser has it, with plain texts in it."""
    if isinstance(value, dict):
        return {str(_simple(key)): _simple(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_simple(each) for each in value]
    return value.text if isinstance(value, QuotedString) else value


def _with_swept(config: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The config, whose logger for TensorBoard hears what is swept."""
    board = config["logger"].get("tensorboard")
    if not isinstance(board, dict) or "swept" not in board:
        return config
    return {**config, "logger": {**config["logger"], "tensorboard": {**board, "swept": list(_swept(overrides))}}}


def _task(config: DictConfig) -> float:
    hydra_config = HydraConfig.get()
    overrides = list(hydra_config.overrides.task)
    if hydra_config.mode == RunMode.MULTIRUN:
        return train_in_sweep(_with_swept(plain(config), overrides), Path(hydra_config.runtime.output_dir))
    metrics = train(plain(config), overrides)
    if metrics["status"] == "diverged":
        sys.exit(1)
    return objective(metrics)


def main(arguments: Sequence[str]) -> None:
    os.environ[SWEPT] = json.dumps([each.key_or_group for each in _parsed(arguments) if each.is_sweep_override()])
    try:
        launch("train", arguments, _task)
    except BaseException:  # a sweep that ends early has a table too
        for directory in _write_reports():
            print(f"the sweep in {directory} ended early: what is not in the table has not begun")
        raise
    finally:
        del os.environ[SWEPT]
    _write_reports()
    if failed := sum(_number_of_failures(directory) for directory in sweeps):
        print(f"error: {failed} run(s) of this sweep failed, see the table", file=sys.stderr)
        sys.exit(1)


def _write_reports() -> list[Path]:
    """Write the tables of the sweeps in which a run has begun; returns their directories."""
    written = []
    for directory in sweeps:
        with contextlib.suppress(InputError):  # no run in it
            print(write_report(directory))
            print(f"written: {directory}/report.md, report.csv, report.png")
            print(f"curves: {shlex.join(['tensorboard', '--logdir', str(directory)])}")
            written.append(directory)
    return written


def _number_of_failures(directory: Path) -> int:
    """How many runs of a sweep have no numbers, or found their place taken."""
    return sum(run.status not in ENDED for run in collect_runs(directory)) + sweeps[directory]
