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
from moesaic.errors import InputError
from moesaic.files import append, write_atomically
from moesaic.reading import read_csv, reading

__all__ = ["CsvTable", "RunLogger", "create_run_dir", "environment"]


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
            raise InputError(f"output_dir={str(output_dir)!r}: cannot be written ({error.strerror})") from error
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
            with reading(path), path.open(newline="", encoding="utf-8") as file:
                self.columns = next(csv.reader(file), self.columns)

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
            rows = [row for row in self._read() if row.get("step", "").isdecimal() and int(row["step"]) <= step]
            self._rewrite(rows)

    def _read(self) -> list[dict[str, str]]:
        return read_csv(self.path) if self.path.exists() else []

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path, text.getvalue())


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
