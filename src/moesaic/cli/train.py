"""Train a model: moesaic train [experiment=NAME] [key=value ...]; -m for a sweep. See conf/train.yaml."""

import contextlib
import dataclasses
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
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from moesaic.arms import short_keys, short_value
from moesaic.cli.common import launch, plain
from moesaic.config import flatten
from moesaic.errors import InputError
from moesaic.files import write_json, write_yaml
from moesaic.overrides import for_shell, override
from moesaic.studies.sweep import write_report
from moesaic.training.fit import WARNED
from moesaic.training.run import run_found
from moesaic.training.starting import Found, find_run, free_part, is_finished

__all__ = ["main", "train", "train_in_sweep"]

sweeps: dict[Path, int] = {}
"""Directory of each sweep of this process and how many of its runs failed."""

command_line: list[str] = []
"""Arguments of the command that this process runs."""


def train(config: dict[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """One run of a composed config; returns its final metrics.

    When resuming, the stored config of the run counts; `overrides` (key=value) that contradict it are refused.
    """
    if "study" in config:
        raise InputError(f"this is a study: moesaic study experiment=study_{config['name']}")
    found = find_run(config)
    return run_found(found if found.run_dir is None else _with_free_keys(found, config, overrides))


def _with_free_keys(found: Found, config: dict[str, Any], overrides: Sequence[str]) -> Found:
    """The run that is there, under overrides that do not change what it trains; others than its own are refused."""
    stored, changed = {**found.config, "ckpt_path": found.ckpt_path}, found.config
    for typed in overrides:
        key, _, value = typed.lstrip("+~").partition("=")
        if key in ("resume", "run_dir", "output_dir", "name", "experiment", "debug", "trust"):
            continue
        if (free := free_part(key)) is not None:
            changed = _with(changed, free.split("."), _at(config, free))
            continue
        for name, asked in flatten({key: _at(config, key)}).items():  # of an option such as model=small every key
            before = _at(stored, name)
            if str(before) != str(asked) and (name, asked) != ("trainer.precision", "auto"):  # chosen when it began
                found_there = repr(before) if name == key else f"{name}={before!r}"
                raise InputError(
                    f"{key}={value}: the run to resume has {found_there}; resume continues it unchanged. For another "
                    f"value start a new run{_from(found, key)}"
                )
    return dataclasses.replace(found, config=changed)


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


def train_in_sweep(config: dict[str, Any], run_dir: Path) -> None:
    """One run of a sweep: a failure is recorded and the sweep goes on. All have one precision, to be comparable."""
    if config["trainer"]["precision"] == "auto":
        config = {**config, "trainer": {**config["trainer"], "precision": "32-true"}}
    sweeps.setdefault(run_dir.parent, 0)
    try:
        metrics = train({**config, "run_dir": str(run_dir)})
        if metrics.get("stopped_by") == WARNED:
            sys.exit(0)  # with the table of what there is
        failed = metrics["status"] not in ("finished", "stopped")
    except Exception as error:
        if not isinstance(error, InputError):
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        failed = True
        if not is_finished(run_dir):
            if not (run_dir / "config.yaml").exists():
                write_yaml(run_dir / "config.yaml", config)
            write_json(run_dir / "metrics.json", {"status": "failed", "error": f"{type(error).__name__}: {error}"})
    sweeps[run_dir.parent] += failed


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
    several = {each.key_or_group for each in _parsed(command_line) if each.is_sweep_override()}
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


def _task(config: DictConfig) -> None:
    hydra_config = HydraConfig.get()
    overrides = list(hydra_config.overrides.task)
    if hydra_config.mode == RunMode.MULTIRUN:
        train_in_sweep(_with_swept(plain(config), overrides), Path(hydra_config.runtime.output_dir))
    else:
        metrics = train(plain(config), overrides)
        if metrics["status"] == "diverged":
            sys.exit(1)


def main(arguments: Sequence[str]) -> None:
    command_line[:] = arguments
    try:
        launch("train", arguments, _task)
    except BaseException:  # a sweep that ends early has a table too
        with contextlib.suppress(InputError):
            for directory in _write_reports():
                print(f"the sweep in {directory} ended early: what is not in the table has not begun")
        raise
    _write_reports()
    if any(sweeps.values()):
        print(f"error: {sum(sweeps.values())} run(s) of this sweep failed, see the table", file=sys.stderr)
        sys.exit(1)


def _write_reports() -> list[Path]:
    for directory in sweeps:
        print(write_report(directory))
        print(f"written: {directory}/report.md, report.csv, report.png")
        print(f"curves: {shlex.join(['tensorboard', '--logdir', str(directory)])}")
    return list(sweeps)
