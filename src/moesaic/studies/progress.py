"""How far a study is, and how long it will take: learned from the runs that have ended and from those that run.

Work is counted in optimizer steps. A forward pass over as many tokens is a third of a step, so that the checks during a
run and its final score count as well.
"""

import csv
import dataclasses
import heapq
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moesaic.studies.jobs import Row
from moesaic.training.batches import evaluation_sizes
from moesaic.training.config import TrainingConfig

__all__ = ["Pace", "StudyProgress", "Work", "duration", "last_step", "time_left"]

FORWARD = 1 / 3
"""Share of a training step that its forward pass takes: backward takes twice as long."""

LOOK_SECONDS = 0.5
"""How often the tables of the running runs are read."""

FIRST_LINE, NEXT_LINES = 5.0, 30.0
"""Seconds after which there is a line on a pipe: since the start, and since the line before."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What a run does, in optimizer steps."""

    steps: int
    check_every: int
    check: float
    """A check during the run."""
    score: float
    """The score at the end."""

    @property
    def whole(self) -> float:
        return self.until(self.steps) + self.score

    def until(self, step: int) -> float:
        """Training up to a step, with the checks until then."""
        return step + step // self.check_every * self.check

    @classmethod
    def of(cls, training: TrainingConfig, split_tokens: int) -> "Work":
        """The work of a run that is scored on a split of so many tokens."""
        sizes = evaluation_sizes(training)
        per_step = training.tokens_per_step
        batch = sizes["batch_size"] * sizes["seq_len"]
        checked = min((training.validation_batches or split_tokens) * batch, split_tokens)
        scored = min((training.score_windows or split_tokens) * sizes["seq_len"], split_tokens)
        return cls(training.steps, training.validate_every, FORWARD * checked / per_step, FORWARD * scored / per_step)


class Pace:
    """Seconds that a step takes, by kind of run, and what a run takes beside its work."""

    def __init__(self) -> None:
        self._steps: dict[str, float] = {}
        self._beside: list[float] = []

    @property
    def is_known(self) -> bool:
        """Whether any run has been seen."""
        return bool(self._steps)

    def saw(self, kind: str, done: float, seconds: float) -> None:
        """Note the seconds in which a run did so much work."""
        if done > 0:
            self._steps[kind] = seconds / done

    def ended(self, kind: str, work: float, seconds: float) -> None:
        """Note the seconds of a whole run, from its start to its row."""
        if kind in self._steps:
            self._beside.append(max(0.0, seconds - self._steps[kind] * work))

    def seconds(self, kind: str, work: float) -> float:
        """Seconds of a run with so much work before it; a kind that has not been seen is as the mean of the others."""
        step = self._steps.get(kind, statistics.fmean(self._steps.values()))
        return step * work + (statistics.fmean(self._beside) if self._beside else 0.0)


def time_left(running: Sequence[float], planned: Sequence[float], workers: int) -> float:
    """Seconds until all runs have ended: each worker takes the next planned one as soon as it is free.

    Args:
        running: seconds that each running one has left.
        planned: seconds of each that has not begun, in their order.
    """
    free_at = [*running, *[0.0] * (workers - len(running))]
    heapq.heapify(free_at)
    for seconds in planned:
        heapq.heapreplace(free_at, free_at[0] + seconds)
    return max(free_at, default=0.0)


def last_step(metrics_csv: Path) -> tuple[int, float]:
    """The last logged step of a run and its seconds of training until then; (0, 0.0) if there is none yet."""
    try:
        with metrics_csv.open("rb") as file:
            columns = file.readline().decode().strip().split(",")
            begin = file.tell()
            file.seek(max(begin, file.seek(0, 2) - 8192))
            lines = file.read().decode(errors="replace").split("\n")[:-1]  # what follows the last end of a line is half
        at = columns.index("step"), columns.index("seconds")
        for cells in csv.reader(reversed(lines)):
            if len(cells) == len(columns) and all(cells[i] for i in at):
                return int(float(cells[at[0]])), float(cells[at[1]])
    except (OSError, ValueError):  # not there yet, or being written
        pass
    return 0, 0.0


def duration(seconds: float) -> str:
    """Seconds in words, as exact as a person wants them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


@dataclasses.dataclass
class _Run:
    """A run that a worker does."""

    kind: str
    shown: str
    work: Work
    metrics_csv: Path
    began: float
    changed: float
    """When its step was last seen to change."""
    step: int = 0

    @property
    def left(self) -> float:
        return self.work.whole - self.work.until(self.step)

    def __str__(self) -> str:
        return f"{self.shown}: step {self.step:,} of {self.work.steps:,}" if self.work.steps else self.shown


class StudyProgress:
    """Says how far a study is: a live bar on terminals, a line now and then elsewhere; a line for each ended run.

    Args:
        estimate: seconds that the whole study was said to take; it counts until runs tell better.
    """

    def __init__(self, console: Console, workers: int, estimate: float | None = None) -> None:
        self.console, self.workers, self.estimate = console, workers, estimate
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
        )
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.ended_here = 0
        """Runs that have ended well since this began."""
        self._task = self.bar.add_task("")
        self._pace = Pace()
        self._running: dict[str, _Run] = {}
        self._planned: list[tuple[str, Work]] = []
        self._done = self._total = 0
        self._may_grow = False
        self._began = time.monotonic()
        self._next_look = self._began
        self._next_line = self._began + FIRST_LINE

    def begin(self, name: str, done: int, total: int, may_grow: bool = False) -> None:
        """Say at once what will be done; the total may grow."""
        self._may_grow = may_grow
        estimate = "" if self.estimate is None else f"; it should take about {duration(self.estimate)}"
        at_a_time = f"{self.workers} at a time" if self.workers > 1 else "one at a time"
        self._say(f"study {name}: {done} of {self._of(total)} runs are done, the others run {at_a_time}{estimate}")
        self._next_line = self._began + FIRST_LINE

    def plan(self, done: int, total: int, planned: Sequence[tuple[str, Work]], may_grow: bool = False) -> None:
        """Set how many runs are done, of how many, and the kind and work of those that could begin."""
        self._done, self._total, self._planned, self._may_grow = done, total, list(planned), may_grow

    def started(self, key: str, kind: str, shown: str, work: Work, metrics_csv: Path) -> None:
        """Note a run that has begun; runs of one kind take equally long."""
        now = time.monotonic()
        self._running[key] = _Run(kind, shown, work, metrics_csv, now, now)

    def ended(self, key: str, ready_at: float = 0.0) -> None:
        """Note a run that has ended; it could not begin before its worker was ready."""
        run = self._running.pop(key)
        self._look(run)
        self._pace.ended(run.kind, run.work.whole, time.monotonic() - max(run.began, ready_at))

    def say_result(self, shown: str, row: Row, metric: str) -> None:
        """Say what a run has found, after `plan` has heard of it."""
        self.ended_here += 1
        result = f"{row['metrics'][metric]:.4f}" if metric in row["metrics"] else row["status"]
        self._say(
            f"run {self._done} of {self._of(self._total)}: {shown}: {result} in {row['cpu_seconds']:.0f} CPU s; "
            f"{duration(self._elapsed())} so far, {self._words_left()}"
        )

    def tick(self) -> None:
        """Look at the running runs; show them on the bar, or in a line if it is time for one."""
        if (now := time.monotonic()) < self._next_look:
            return
        self._next_look = now + LOOK_SECONDS
        for run in self._running.values():
            self._look(run)
        words = "; ".join([self._words_left(), *map(str, self._running.values())])  # a narrow terminal cuts the end off
        if self.console.is_terminal:
            here = sum(1 - run.left / run.work.whole for run in self._running.values())
            self.bar.update(self._task, completed=self._done + here, total=self._total, description=words)
        elif now >= self._next_line:
            self._say(f"{duration(self._elapsed())}: {self._done} of {self._of(self._total)} runs are done, {words}")

    def left(self) -> float | None:
        """Seconds until the study is done; None if nobody knows yet."""
        now, runs = time.monotonic(), list(self._running.values())
        if not self._pace.is_known:
            left = math.inf if self.estimate is None else self.estimate - self._elapsed()
            return left if 0 < left < math.inf else None  # it was estimated wrongly
        running = [max(0.0, self._pace.seconds(run.kind, run.left) - (now - run.changed)) for run in runs]
        planned = [self._pace.seconds(kind, work.whole) for kind, work in self._planned]
        known = [*planned, *(self._pace.seconds(run.kind, run.work.whole) for run in runs)]
        not_planned_yet = self._total - self._done - len(running) - len(planned)
        if known:
            planned += [statistics.fmean(known)] * not_planned_yet
        return time_left(running, planned, self.workers)

    def _look(self, run: _Run) -> None:
        step, seconds = last_step(run.metrics_csv)
        if step != run.step:
            run.step, run.changed = step, time.monotonic()
            self._pace.saw(run.kind, run.work.until(step), seconds)

    def _words_left(self) -> str:
        left = self.left()
        return "time left not known yet" if left is None else f"about {duration(left)} left"

    def _of(self, total: int) -> str:
        return f"about {total}" if self._may_grow else str(total)

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _say(self, text: str) -> None:
        self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._next_line = time.monotonic() + NEXT_LINES
