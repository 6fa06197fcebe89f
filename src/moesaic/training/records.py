"""What a run leaves on disk: its directory, tables that survive a crash, environment, final numbers."""

import csv
import datetime
import io
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from moesaic import __version__
from moesaic.checkout import git
from moesaic.errors import InputError, reason
from moesaic.files import append, write_atomically
from moesaic.reading import read_csv, reading

__all__ = ["TABLES", "CsvTable", "RunLogger", "create_run_dir", "environment", "read_table"]

TABLES = ("metrics.csv", "routing.csv")
"""Tables that grow while a run trains."""


def create_run_dir(output_dir: Path, name: str) -> Path:
    """A new directory output_dir/name/<time>; runs of the same second get a suffix, whoever creates first."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    for suffix in ["", *(f"-{i}" for i in range(2, 1000))]:
        path = output_dir / name / f"{stamp}{suffix}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(f"output_dir={str(output_dir)!r}: cannot be written ({reason(error)})") from error
        return path
    raise InputError(f"output_dir={str(output_dir)!r}: a thousand runs of {name} started in this second")


def environment() -> dict[str, Any]:
    """Versions, machine and git state of the checkout (null for an installed package), for the record."""
    changes = git("status", "--porcelain")
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "moesaic": __version__,
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "git_commit": git("rev-parse", "HEAD"),
        "git_uncommitted_changes": None if changes is None else changes.splitlines(),
    }


class CsvTable:
    """A CSV file that grows by rows and, rarely, by columns; rows are on disk as soon as they are added."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self.columns = list(columns)
        if path.exists():
            with reading(path):
                self.columns = _header(path) or self.columns

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        new = [key for row in rows for key in row if key not in self.columns]
        if new or not self.path.exists():
            self.columns += dict.fromkeys(new)
            self._rewrite(self._read())
        text = io.StringIO()
        csv.DictWriter(text, self.columns, lineterminator="\n").writerows(rows)
        append(self.path, text.getvalue())

    def keep_until(self, step: int) -> None:
        """Drop the rows after `step`: a killed run may have logged more than its last checkpoint knows of."""
        if self.path.exists():
            self._rewrite([row for row in read_table(self.path) if int(row["step"]) <= step])

    def _read(self) -> list[dict[str, str]]:
        return read_csv(self.path) if self.path.exists() else []

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path, text.getvalue())


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a table of a run, without a part of a row that a killed process left at the end.

    Raises:
        InputError: damage before the end, with its line: what is no row would be dropped without a word.
    """
    with reading(path):
        rows, columns = read_csv(path), _header(path)
        if columns and "step" not in columns:
            raise InputError(f"found columns {', '.join(columns)[:80]!r}; must have step")
        step, broken = 0, 0
        for line, row in enumerate(rows, start=2):
            text = row["step"]
            if not (text.isascii() and text.isdecimal() and int(text) >= step and _are_values(row)):
                broken = broken or line
            elif broken:
                raise InputError(f"line {broken}: damaged; must be a row of numbers, with steps that do not fall")
            else:
                step = int(text)
    return rows[: broken - 2] if broken else rows


def _header(path: Path) -> list[str]:
    """The names of the columns; none of an empty file."""
    with path.open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])


def _are_values(row: Mapping[str, str]) -> bool:
    """Whether each value is empty or a number; a layer has a name."""
    try:
        return all(not value or name == "layer" or float(value) is not None for name, value in row.items())
    except (TypeError, ValueError):
        return False


class RunLogger(Logger):
    """metrics.csv of a run. Lightning's own CSVLogger deletes the file when a run is resumed."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self.table = CsvTable(run_dir / "metrics.csv", ["step", "tokens", "seconds", "active_flops", "train/loss"])

    @property
    def name(self) -> str:
        return "run"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """They are in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.table.append([{"step": step, **{key: f"{value:.10g}" for key, value in metrics.items()}}])
