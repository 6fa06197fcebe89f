"""Turn a tree of runs into tables and a plot: moesaic report DIRECTORY [metrics=[NAME,...]] [where='KEY>VALUE']"""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from moesaic.cli.arguments import require_list
from moesaic.cli.common import launch, plain
from moesaic.errors import InputError
from moesaic.studies.sweep import write_report

__all__ = ["main"]


def _task(config: DictConfig) -> None:
    given = plain(config)
    directory, metrics = given["directory"], given["metrics"]
    if not isinstance(directory, str):
        raise InputError("directory: missing; give moesaic report DIRECTORY")
    metrics = [metrics] if isinstance(metrics, str) else metrics or []
    require_list("metrics", metrics)
    where = None if given["where"] is None else str(given["where"])
    print(write_report(Path(directory), [str(name) for name in metrics], where))
    print(f"written: {directory}/report.md, report.csv, report.png")


def main(arguments: Sequence[str]) -> None:
    launch("report", arguments, _task)
