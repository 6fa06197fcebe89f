"""Tables and files that survive a crash."""

import csv
from pathlib import Path

import pytest

from moesaic.errors import CannotWrite
from moesaic.training.records import CsvTable, RunLogger


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_on_disk_at_once_and_new_columns_join(tmp_path: Path) -> None:
    table = CsvTable(tmp_path / "t.csv", ["step", "a"])
    table.append([{"step": 1, "a": 2}])
    assert read(table.path) == [{"step": "1", "a": "2"}]
    table.append([{"step": 2, "b": 3}])
    assert read(table.path) == [{"step": "1", "a": "2", "b": ""}, {"step": "2", "a": "", "b": "3"}]


def test_reopened_table_continues_and_drops_what_came_after_a_checkpoint(tmp_path: Path) -> None:
    CsvTable(tmp_path / "t.csv", ["step"]).append([{"step": i, "x": i * i} for i in range(6)])
    with (tmp_path / "t.csv").open("a") as file:
        file.write("7")  # a row cut off by a crash, between its digits
    again = CsvTable(tmp_path / "t.csv", ["step"])
    again.keep_until(3)
    again.append([{"step": 4, "x": 16}])
    assert [row["step"] for row in read(again.path)] == ["0", "1", "2", "3", "4"]


def test_full_disk_is_said_in_words(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.table.path.unlink()
    logger.table.path.symlink_to("/dev/full")
    with pytest.raises(CannotWrite, match=r"metrics.csv: cannot be written \(No space left on device\)"):
        logger.log_metrics({"loss": 1.0}, step=2)
