"""Tables and files that survive a crash."""

import csv
from pathlib import Path

import pytest

from moesaic.errors import CannotWrite, InputError
from moesaic.training.records import CsvTable, RunLogger
from moesaic.training.step_log import StepLog


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


@pytest.mark.parametrize("left", ["1", "6,3", "\0\0\0", "6,3.5e", "x,y"])
def test_a_part_of_a_row_at_the_end_is_dropped_and_damage_before_it_refused(tmp_path: Path, left: str) -> None:
    CsvTable(tmp_path / "t.csv", ["step"]).append([{"step": i, "x": i / 4} for i in range(2, 6)])
    whole = (tmp_path / "t.csv").read_text()
    (tmp_path / "t.csv").write_text(whole + left)
    table = CsvTable(tmp_path / "t.csv", ["step"])
    table.keep_until(5)
    assert [row["step"] for row in read(table.path)] == ["2", "3", "4", "5"]
    if left != "6,3":  # a whole row, but for its end
        (tmp_path / "t.csv").write_text(whole.replace("3,0.75", left))
        with pytest.raises(InputError, match=r"t\.csv: line 3: damaged; must be a row of numbers"):
            table.keep_until(5)
        assert left in (tmp_path / "t.csv").read_text(), "it is left as it is"


def test_full_disk_is_said_in_words(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.table.path.unlink()
    logger.table.path.symlink_to("/dev/full")
    with pytest.raises(CannotWrite, match=r"metrics.csv: cannot be written \(No space left on device\)"):
        logger.log_metrics({"loss": 1.0}, step=2)


def test_the_clock_is_read_between_logged_steps() -> None:
    book = StepLog()
    book.read_clock()
    assert book.seconds == 0
    book.start(0)
    book.read_clock()
    first = book.seconds
    book.read_clock()
    assert 0 < first < book.seconds
