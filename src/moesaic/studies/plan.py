"""Runs of a study that are missing, and the learning rate that is measured: pure functions of a config and of rows."""

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from moesaic.studies.config import Cell, StudyConfig
from moesaic.studies.jobs import Job, Row, job_of, needs, prepare_job, row_key

__all__ = ["Plan", "Tuning", "moved", "plan", "score", "tuning"]


EXTENSIONS = 2
"""How often a grid of learning rates grows by one factor when the best one is at its edge; the same for every arm."""


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How far the learning rate of a cell is known."""

    factors: tuple[float, ...]  # tried, or to be tried
    best: float | None  # None: not all of them have a row yet
    at_edge: bool = False  # the best one is the smallest or the largest, and the grid is not extended further
    failed: bool = False  # all of them diverged, so that there is nothing to measure


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where a study stands."""

    missing: list[Job]  # what can start now: preparations first, then runs for tuning
    done: int
    total: int
    may_grow: bool  # a learning rate at the edge of its grid adds some to the total


def score(study: StudyConfig, row: Row) -> float:
    """The metric of a row with lower as better; infinite for a diverged run."""
    value = row["metrics"].get(study.metric)
    if row["status"] != "finished" or not isinstance(value, (int, float)) or not math.isfinite(value):
        return math.inf
    return -value if study.higher_is_better else float(value)


def tuning(study: StudyConfig, cell: Cell, rows: Mapping[str, Row]) -> Tuning:
    """The learning-rate factors of a cell, the best of them if all have a row. The same rule for every cell."""
    if study.tune is None:
        return Tuning((1.0,), 1.0)
    if study.tune.at == "first":
        cell = study.first_cell(cell)
    factors = sorted(study.tune.factors)
    extensions = 0
    while True:
        keys = [
            row_key({**dataclasses.asdict(cell), "purpose": "tune", "seed": study.tune.seed, "factor": factor})
            for factor in factors
        ]
        if not all(key in rows for key in keys):
            return Tuning(tuple(factors), None)
        scores = [score(study, rows[key]) for key in keys]
        equal = [i for i, value in enumerate(scores) if value == min(scores)]
        # where the metric is saturated, the middle of what is best; where everything diverged, smaller ones are tried
        best = equal[len(equal) // 2] if math.isfinite(min(scores)) else 0
        at_edge = best in (0, len(factors) - 1)
        if not math.isfinite(min(scores)) and extensions == EXTENSIONS:
            return Tuning(tuple(factors), None, failed=True)
        if not at_edge or extensions == EXTENSIONS:
            return Tuning(tuple(factors), factors[best], at_edge)
        if best == 0:
            factors.insert(0, factors[0] ** 2 / factors[1])
        else:
            factors.append(factors[-1] ** 2 / factors[-2])
        extensions += 1


def moved(study: StudyConfig, cell: Cell, rows: Mapping[str, Row]) -> Tuning | None:
    """The tuning at the first value of the axis of a cell, if its best factor is measured in the cell as well."""
    first = study.first_cell(cell)
    if study.tune is None or study.tune.at != "both" or first == cell:
        return None
    return tuning(study, first, rows)


def plan(study: StudyConfig, base: Mapping[str, Any], rows: Mapping[str, Row], prepared: Collection[str] = ()) -> Plan:
    """What is missing. A measured run is missing as long as any of its variants is; tuning decides what is measured.

    Args:
        prepared: names of `study.prepare` whose results are at hand. Others are prepared if something missing needs
            them, a second time if they have a row.
    """
    jobs: dict[str, list[Job]] = {"tune": [], "measure": []}
    unknown, may_grow = 0, False
    for cell in study.cells:
        tuned = tuning(study, cell, rows)
        if study.tune is not None and not (study.tune.at == "first" and study.first_cell(cell) != cell):
            jobs["tune"] += [job_of(study, base, cell, "tune", study.tune.seed, factor) for factor in tuned.factors]
        there = moved(study, cell, rows)
        factors = [each.best for each in (tuned, there) if each is not None and not each.failed]
        for factor in dict.fromkeys(factors):
            if factor is None:
                may_grow = True
                unknown += len(study.seeds)
            else:
                jobs["measure"] += [job_of(study, base, cell, "measure", seed, factor) for seed in study.seeds]
    known = jobs["tune"] + jobs["measure"]
    missing = [job for job in known if not all(key in rows for key in _keys(study, job, rows))]
    lacking: dict[str, Job] = {}
    for job in missing:
        _add_lacking(study, base, job, rows, prepared, lacking)
    ready = [job for job in (*lacking.values(), *missing) if not lacking.keys() & needs(study, base, job)]
    preparations = [prepare_job(study, base, name) for name in study.prepare]
    kept = sum(job.key in rows and job.arm not in lacking for job in preparations)
    done = len(known) - len(missing) + kept
    return Plan(ready, done, len(known) + unknown + kept + len(lacking), may_grow)


def _add_lacking(
    study: StudyConfig,
    base: Mapping[str, Any],
    job: Job,
    rows: Mapping[str, Row],
    prepared: Collection[str],
    lacking: dict[str, Job],
) -> None:
    """To `lacking`: what has to be prepared before `job`, in an order that works; without a row it counts as absent."""
    for name in needs(study, base, job):
        preparation = prepare_job(study, base, name)
        if name in lacking or (name in prepared and preparation.key in rows):
            continue
        _add_lacking(study, base, preparation, rows, prepared, lacking)
        lacking[name] = preparation


def _keys(study: StudyConfig, job: Job, rows: Mapping[str, Row]) -> Iterator[str]:
    """The keys of all rows that a job makes; the variants of a diverged run have none."""
    yield job.key
    diverged = job.key in rows and rows[job.key]["status"] != "finished"
    if job.purpose == "measure" and not diverged:
        for name, variant in study.variants.items():
            if variant.arm == job.arm:
                yield row_key({**dataclasses.asdict(job), "arm": name, "purpose": "variant"})
