"""Run a study and report it: moesaic study experiment=study_NAME [workers=2] [key=value ...]

See conf/study.yaml. Runs that have a row in the results directory are not repeated: the same command continues what was
stopped.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from moesaic.checkout import checkout
from moesaic.cli.common import launch, options_of, plain, typed
from moesaic.config import from_mapping
from moesaic.errors import InputError
from moesaic.overrides import command_line
from moesaic.studies.cluster import on_cluster
from moesaic.studies.config import StudyConfig
from moesaic.studies.report import write_study_report, written
from moesaic.studies.runner import read_rows, run_study

__all__ = ["main", "study"]

FAILED = 1


def study(config: dict[str, Any], command: str, console: Console | None = None) -> int:
    """Run what is missing of a composed config with a `study` block, then report; returns an exit status.

    Raises:
        InputError: bad configuration, or results of another one in the directory.
        KeyboardInterrupt: a signal; what has finished is kept.
    """
    console = console or Console(emoji=False, width=None if sys.stdout.isatty() else 160)
    for key in ("results_dir", "output_dir", "name"):
        if not isinstance(config[key], str) and (key, config[key]) != ("results_dir", None):
            raise InputError(f"{key}={config[key]!r}: must be a path or a name; a number needs quotes inside quotes")
    if not isinstance(config["study"], dict):
        raise InputError(f"study={config['study']!r}: must be a section, as experiment=study_NAME fills it in")
    if config["study"].get("arms") is None:
        known = [name for name in options_of("experiment") if name.startswith("study_")]
        raise InputError(f"experiment: give a study; must be one of {', '.join(known)}")
    study_config = from_mapping(StudyConfig, config.pop("study"), "study")
    workers, results_dir, launcher = config.pop("workers"), config.pop("results_dir"), config.pop("launcher", None)
    most = max(64, os.cpu_count() or 1)
    if type(workers) is not int or not 1 <= workers <= most:
        raise InputError(f"workers={workers!r}: must be an integer from 1 to {most}")
    if config["trainer"]["precision"] == "auto":  # each machine would choose its own
        config["trainer"] = {**config["trainer"], "precision": "32-true"}
    results = Path(results_dir) if results_dir else default_results(config["name"], Path.cwd())
    runs = Path(config["output_dir"]) / f"study_{config['name']}"
    make_worker = None if launcher is None else on_cluster(launcher, runs / "jobs")
    try:
        failed = run_study(
            study_config,
            config,
            results=results,
            runs=runs,
            workers=workers,
            console=console,
            make_worker=make_worker,
        )
    except KeyboardInterrupt:
        console.print("interrupted; finished runs are kept, the others continue from their last checkpoints with")
        console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)
        raise
    rows = read_rows(results, study_config, config)
    if rows:
        write_study_report(study_config, config, rows, results, command, console)
        console.print(written(results), markup=False, highlight=False, soft_wrap=True)
    for run, reason in failed.items():
        console.print(f"error: {run} failed: {reason}", markup=False, highlight=False, soft_wrap=True)
    return FAILED if failed else 0


def default_results(name: str, working_folder: Path) -> Path:
    """Where the rows of a study go: beside the committed ones in a clone, else into the working folder's studies/."""
    return Path("docs/studies" if working_folder == checkout() else "studies") / name


def main(arguments: Sequence[str]) -> None:
    def task(config: DictConfig) -> None:
        sys.exit(study(plain(config), command_line("study", *typed(arguments))))

    launch("study", arguments, task)
