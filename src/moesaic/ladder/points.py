"""From the rows of a ladder to points that laws are fitted to, and what is refused on the way."""

import dataclasses
import fnmatch
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import InputError
from moesaic.ladder.config import LadderConfig, name_of
from moesaic.ladder.dropping import dropped
from moesaic.ladder.rungs import AXIS, METRIC
from moesaic.statistics import Interval, interval
from moesaic.studies.config import StudyConfig
from moesaic.studies.jobs import Row, row_key
from moesaic.studies.results import summarize_study

__all__ = ["Cell", "Points", "cells_of", "flops_of", "points_of", "require_corpus"]


@dataclasses.dataclass(frozen=True)
class Cell:
    """An arm at a rung: its measured runs, one for each seed."""

    arm: str
    rung: str
    rows: tuple[Row, ...]
    missing: tuple[int, ...]
    """Seeds without a row."""
    factor: float | None
    """On the learning rates, as it was tuned at the lowest rung; None if that is not done."""
    at_edge: bool
    out: str = ""
    """Why the arm has no runs here: it failed, or was dropped at a smaller rung."""

    @property
    def diverged(self) -> list[Row]:
        return [row for row in self.rows if row["status"] != "finished"]

    @property
    def finished(self) -> list[Row]:
        return [row for row in self.rows if row["status"] == "finished"]

    @property
    def score(self) -> Interval:
        """Bits per byte over the seeds."""
        return interval([row["metrics"][METRIC] for row in self.finished])

    def mean_of(self, metric: str) -> float:
        """Mean of a metric over the runs that finished, of which there is one at least."""
        return statistics.fmean(row["metrics"][metric] for row in self.finished)

    def mean_matching(self, pattern: str) -> float:
        """Mean of all metrics that match, over the runs that finished; nan without any."""
        found = [
            value
            for row in self.finished
            for name, value in row["metrics"].items()
            if fnmatch.fnmatchcase(name, pattern)
        ]
        return statistics.fmean(found) if found else math.nan

    @property
    def flops(self) -> float:
        """Active FLOPs of the training, as `flops_of`."""
        return statistics.fmean(flops_of(row) for row in self.finished)

    @property
    def flops_per_second(self) -> float:
        """Active FLOPs of the training over its seconds."""
        return self.flops / self.mean_of("seconds")


@dataclasses.dataclass(frozen=True)
class Points:
    """The runs of an arm that a law is fitted to, one entry each (n,); runs of a rung have equal sizes.

    Where a rung's runs differ in a size (seconds, or FLOPs where tokens choose how many experts), all have its mean.
    """

    arm: str
    rungs: tuple[str, ...]
    seeds: tuple[int, ...]
    flops: NDArray[np.float64]
    """Active, of the training."""
    seconds: NDArray[np.float64]
    parameters: NDArray[np.float64]
    """All of them, embeddings and experts that a token does not meet among them."""
    loss: NDArray[np.float64]
    """Bits per byte."""
    rows: tuple[Row, ...]


def flops_of(row: Row) -> float:
    """Active FLOPs of a run: those of the experts that tokens really had, where the row says how many these were."""
    metrics = row["metrics"]
    return float(metrics.get("measured_flops", metrics["active_flops"]))


def cells_of(ladder: LadderConfig, study: StudyConfig, rows: Mapping[str, Row]) -> list[Cell]:
    """All arms at all rungs, rung by rung, the baseline first.

    Raises:
        InputError: a baseline that diverged at the rung by which arms are dropped.
    """
    order = [study.baseline, *(arm for arm in study.arms if arm != study.baseline)]
    found = {(result.arm, result.axis): result for result in summarize_study(study, rows)}
    out = dropped(ladder, study, rows)
    reached = {name_of(flops) for flops in ladder.rungs if ladder.drop is not None and flops <= ladder.drop.rung}
    cells = []
    for rung in study.axes[AXIS].values:
        for arm in order:
            result = found[arm, f"{AXIS}={rung}"]
            tuned = result.tuning
            why = "" if rung in reached and not tuned.failed else out.get(arm, "")
            missing = () if why else result.missing
            cells.append(Cell(arm, rung, result.rows, missing, tuned.best, tuned.at_edge, why))
    return cells


def points_of(ladder: LadderConfig, cells: Iterable[Cell], arm: str, least: float = 0.0) -> Points:
    """The points of an arm for its law, without the targets.

    Args:
        least: leave out rungs of fewer FLOPs.

    Raises:
        InputError: a rung without all its runs, a run that diverged, or a loss that is no number; the message says
            which.
    """
    fitted = ladder.fitted(least)
    chosen = [cell for cell in cells if cell.arm == arm and cell.rung in fitted]
    for cell in chosen:
        if cell.out:
            raise InputError(f"{arm}: {cell.out}")
    for cell in chosen:
        for row in cell.diverged:
            raise InputError(
                f"{row_key(row)}: diverged ({row['error']}); a law must have all runs of a rung. Choose other "
                "rates, or leave the rung out"
            )
        if cell.missing or not cell.rows:
            seeds = ", ".join(map(str, cell.missing))
            raise InputError(f"{arm} at {cell.rung}: no run of seed {seeds} yet; moesaic ladder continues")
    rows = [row for cell in chosen for row in cell.rows]
    seconds = [cell.mean_of("seconds") for cell in chosen for _ in cell.rows]
    return Points(
        arm=arm,
        rungs=tuple(cell.rung for cell in chosen for _ in cell.rows),
        seeds=tuple(row["seed"] for row in rows),
        flops=np.array([cell.flops for cell in chosen for _ in cell.rows]),
        seconds=np.array(seconds),
        parameters=_column(rows, "parameters/total"),
        loss=_column(rows, METRIC),
        rows=tuple(rows),
    )


def _column(rows: Sequence[Row], metric: str) -> NDArray[np.float64]:
    return np.array([row["metrics"][metric] for row in rows], dtype=np.float64)


def require_corpus(rows: Mapping[str, Row], facts: Mapping[str, Any], where: str) -> None:
    """Refuse rows of another corpus.

    Raises:
        InputError: it has both content hashes.
    """
    for key, row in rows.items():
        if row["data_hash"] != facts.get("content_hash"):
            raise InputError(
                f"{where}: {key}: of a corpus with the content hash {row['data_hash']}; must be "
                f"{facts.get('content_hash')}, that of data.source={facts.get('source')!r}. Choose another "
                "results_dir, or put the data back"
            )
