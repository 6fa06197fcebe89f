"""Run a study and report it: moesaic study experiment=study_NAME [workers=2] [key=value ...]

See conf/study.yaml. Runs that have a row in the results directory are not repeated: the same command continues what was
stopped.
"""

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
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

__all__ = ["Place", "console_of_command", "main", "require_names", "study", "tell_failed"]

FAILED = 1


def study(config: dict[str, Any], command: str, console: Console | None = None) -> int:
    """Run what is missing of a composed config with a `study` block, then report; returns an exit status.

    Raises:
        InputError: bad configuration, or results of another one in the directory.
        KeyboardInterrupt: a signal; what has finished is kept.
    """
    console = console or console_of_command()
    require_names(config)
    if not isinstance(config["study"], dict):
        raise InputError(f"study={config['study']!r}: must be a section, as experiment=study_NAME fills it in")
    if config["study"].get("arms") is None:
        known = [name for name in options_of("experiment") if name.startswith("study_")]
        raise InputError(f"experiment: give a study; must be one of {', '.join(known)}")
    study_config = from_mapping(StudyConfig, config.pop("study"), "study")
    place = Place.of(config, "study")
    failed = place.run(study_config, config, command, console)
    rows = read_rows(place.results, study_config, config)
    if rows:
        write_study_report(study_config, config, rows, place.results, command, console)
        console.print(written(place.results), markup=False, highlight=False, soft_wrap=True)
    return tell_failed(failed, console)


def console_of_command() -> Console:
    """A console whose tables are wide enough where nobody looks on."""
    return Console(emoji=False, width=None if sys.stdout.isatty() else 160)


def require_names(config: Mapping[str, Any]) -> None:
    """Refuse names of directories that are none."""
    for key in ("results_dir", "output_dir", "name"):
        if not isinstance(config[key], str) and (key, config[key]) != ("results_dir", None):
            raise InputError(f"{key}={config[key]!r}: must be a path or a name; a number needs quotes inside quotes")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a study runs and what it leaves where."""

    results: Path
    runs: Path
    workers: int
    launcher: Any

    @classmethod
    def of(cls, config: dict[str, Any], kind: str) -> "Place":
        """Take the keys that are no keys of a run out of a composed config, and fix its precision.

        Raises:
            InputError: an impossible number of workers.
        """
        workers, results_dir, launcher = config.pop("workers"), config.pop("results_dir"), config.pop("launcher", None)
        most = max(64, os.cpu_count() or 1)
        if type(workers) is not int or not 1 <= workers <= most:
            raise InputError(f"workers={workers!r}: must be an integer from 1 to {most}")
        if config["trainer"]["precision"] == "auto":  # each machine would choose its own
            config["trainer"] = {**config["trainer"], "precision": "32-true"}
        results = Path(results_dir) if results_dir else default_results(config["name"], Path.cwd())
        return cls(results, Path(config["output_dir"]) / f"{kind}_{config['name']}", workers, launcher)

    def run(
        self,
        study: StudyConfig,
        config: Mapping[str, Any],
        command: str,
        console: Console,
        estimate: float | None = None,
    ) -> dict[str, str]:
        """Run what is missing; returns what failed and why."""
        make_worker = None if self.launcher is None else on_cluster(self.launcher, self.runs / "jobs")
        try:
            return run_study(
                study,
                config,
                results=self.results,
                runs=self.runs,
                workers=self.workers,
                console=console,
                estimate=estimate,
                make_worker=make_worker,
            )
        except KeyboardInterrupt:
            console.print("interrupted; finished runs are kept, the others continue from their last checkpoints with")
            console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)
            raise


def tell_failed(failed: Mapping[str, str], console: Console) -> int:
    """Say which runs failed; returns the exit status."""
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
