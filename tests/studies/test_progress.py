"""How far a study is and how long it takes, from made-up runs."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from moesaic.studies import progress
from moesaic.studies.jobs import Row
from moesaic.studies.progress import Pace, StudyProgress, Work, duration, last_step, time_left
from moesaic.training.config import TrainingConfig

Say = Callable[..., list[str]]


@pytest.mark.parametrize(
    ("running", "planned", "workers", "left"),
    [
        ([], [], 2, 0),
        ([], [10, 10, 10], 1, 30),
        ([], [10, 10, 10], 2, 20),
        ([7, 3], [], 2, 7),
        ([7, 3], [10], 2, 13),  # the one that is free first takes it
        ([7, 3], [10, 1], 2, 13),
        ([7], [10], 2, 10),  # one worker is free now
        ([50, 1], [10, 10, 10], 2, 50),
        ([4], [4] * 9, 4, 12),
    ],
)
def test_time_left_counts_what_runs_what_is_planned_and_the_workers(
    running: list[float], planned: list[float], workers: int, left: float
) -> None:
    assert time_left(running, planned, workers) == left


def test_the_work_of_a_run_counts_its_checks_and_its_score() -> None:
    training = TrainingConfig(
        steps=100, batch_size=4, seq_len=8, validate_every=30, validation_batches=3, validation_seq_len=16
    )
    work = Work.of(training, split_tokens=9600)
    check = 3 * 2 * 16 / 32 / 3
    assert work.until(29) == 29
    assert work.until(60) == pytest.approx(60 + 2 * check)
    assert work.whole == pytest.approx(100 + 3 * check + 9600 / 32 / 3)
    assert Work.of(training, split_tokens=50).whole == pytest.approx(100 + 4 * 50 / 32 / 3), "no more than there is"
    sampled = TrainingConfig(**{**vars(training), "score_windows": 5})
    assert Work.of(sampled, 9600).score == pytest.approx(5 * 16 / 32 / 3)


def test_pace_is_known_by_kind_and_what_is_beside_the_work_is_learned() -> None:
    pace = Pace()
    assert not pace.is_known
    pace.saw("slow", 0, 0.0)
    assert not pace.is_known, "no step yet"
    pace.saw("slow", 10, 20.0)
    pace.saw("fast", 10, 10.0)
    assert (pace.seconds("slow", 100), pace.seconds("fast", 100), pace.seconds("new", 100)) == (200, 100, 150)
    pace.ended("fast", 100, 106.0)
    assert pace.seconds("slow", 50) == 106, "half of its work, and the 6 seconds"


def test_the_last_step_is_read_from_a_table_that_grows(tmp_path: Path) -> None:
    table = tmp_path / "metrics.csv"
    assert last_step(table) == (0, 0.0)
    table.write_text("step,tokens,seconds,loss")
    assert last_step(table) == (0, 0.0)
    table.write_text("step,tokens,seconds,loss\n10,20,1.5,7\n20,40,3.25,6\n30,6")
    assert last_step(table) == (20, 3.25), "the last line is not whole"
    rows = "".join(f"{step},{2 * step},{step / 10},6\n" for step in range(10, 40_000, 10))
    table.write_text(f"step,tokens,seconds,loss\n{rows}39990,,,5.5\n")
    assert last_step(table) == (39990, 3999.0), "a row without seconds is passed over"


def test_durations_are_as_exact_as_a_person_wants() -> None:
    assert [duration(seconds) for seconds in (8.4, 89, 100, 3000, 5400, 9000)] == [
        "8 s", "89 s", "2 min", "50 min", "1 h 30 min", "2 h 30 min",
    ]  # fmt: skip


class Clock:
    """Stands in for the module `time`."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def test_a_study_says_at_once_what_it_does_and_then_how_far_it_is(
    clock: Clock, tmp_path: Path, row_of: Callable[..., Row]
) -> None:
    console = Console(file=io.StringIO(), width=200)

    def said() -> list[str]:
        assert isinstance(console.file, io.StringIO)
        lines = console.file.getvalue().splitlines()
        console.file.seek(0)
        console.file.truncate()
        return lines

    shown = StudyProgress(console, workers=2, estimate=600.0)
    shown.begin("mine", 0, 4, may_grow=True)
    assert said() == ["study mine: 0 of about 4 runs are done, the others run 2 at a time; it should take about 10 min"]
    work = Work(steps=100, check_every=1000, check=0.0, score=0.0)
    shown.started("a", "moe", "moe, seed 0", work, tmp_path / "a.csv")
    shown.started("b", "moe", "moe, seed 1", work, tmp_path / "b.csv")
    shown.plan(0, 4, [("moe", work)], may_grow=True)  # and one that the plan does not have yet
    shown.tick()
    assert said() == []
    clock.now += 6
    shown.tick()
    [line] = said()
    runs = "moe, seed 0: step 0 of 100; moe, seed 1: step 0 of 100"
    assert line == f"6 s: 0 of about 4 runs are done, about 10 min left; {runs}", "594 seconds"

    clock.now += 20
    (tmp_path / "a.csv").write_text("step,seconds\n10,20\n")  # two seconds a step
    (tmp_path / "b.csv").write_text("step,seconds\n5,10\n")
    shown.tick()
    assert said() == [], "no more than a line in 30 seconds"
    assert shown.left() == pytest.approx(390), "180 and 190 seconds, then 200 more each"
    clock.now += 12
    shown.tick()
    [line] = said()
    runs = "moe, seed 0: step 10 of 100; moe, seed 1: step 5 of 100"
    assert line == f"38 s: 0 of about 4 runs are done, about 6 min left; {runs}"
    assert shown.left() == pytest.approx(378), "it counts down between two rows of a table"

    (tmp_path / "a.csv").write_text("step,seconds\n100,200\n")
    clock.now = 100 + 210.0
    shown.ended("a", ready_at=105.0)  # it took 205 seconds, 5 beside its work
    shown.plan(1, 4, [("moe", work)])
    assert shown.left() == pytest.approx((190 + 5 - 184) + 205), "of the other 184 seconds are over since its last row"


def test_a_terminal_has_a_bar_that_moves(clock: Clock, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    shown = StudyProgress(console, workers=1)
    shown.plan(1, 2, [])
    shown.started("a", "moe", "moe, seed 0", Work(100, 1000, 0.0, 0.0), tmp_path / "a.csv")
    shown.tick()
    task = shown.bar.tasks[0]
    assert (task.completed, task.total) == (1, 2)
    assert task.description == "time left not known yet; moe, seed 0: step 0 of 100"
    (tmp_path / "a.csv").write_text("step,seconds\n50,25\n")
    clock.now += 1
    shown.tick()
    assert task.completed == 1.5
    assert task.description == "about 25 s left; moe, seed 0: step 50 of 100"
