"""From rows to intervals and a verdict: means over seeds, differences paired by seed, Student's t."""

import dataclasses
import fnmatch
import math
import statistics
from collections.abc import Iterable, Mapping

from moesaic.evaluation.language_modeling import on_windows
from moesaic.statistics import Interval, interval
from moesaic.studies.config import Cell, StudyConfig
from moesaic.studies.jobs import Row, row_key
from moesaic.studies.plan import Tuning, tuning

__all__ = [
    "ArmResult",
    "listed_factors",
    "paired_difference",
    "processors",
    "scored_windows",
    "summarize_study",
    "verdict",
]


@dataclasses.dataclass(frozen=True)
class ArmResult:
    """An arm or a variant at one point of an axis (None: no axis, or an arm that the axis does not change)."""

    arm: str
    axis: str | None
    baseline: str | None  # name of the arm it is compared with; None for that arm itself
    rows: tuple[Row, ...]  # measured or evaluated, in the order of the seeds; diverged ones included
    values: dict[int, float]  # the metric by seed; finished runs only
    missing: tuple[int, ...]  # seeds without a row
    tuning: Tuning
    tuning_cpu_seconds: float
    level: Interval
    difference: Interval | None  # to the baseline, paired by seed
    switched: (
        Interval | None
    )  # of a variant: to its own arm, whose checkpoints it evaluates; None if that's the baseline
    verdict: str
    shown: str
    """The name with the mark of the arm, if it has one."""

    @property
    def name(self) -> str:
        return f"{self.shown} ({self.axis})" if self.axis else self.shown

    @property
    def diverged(self) -> list[int]:
        return [row["seed"] for row in self.rows if _diverged(row)]

    def mean_of(self, pattern: str) -> float:
        """Mean over finished runs of a metric, of all metrics that match, or of the row's cpu_seconds; nan without."""
        numbers = [{**row["metrics"], "cpu_seconds": row["cpu_seconds"]} for row in self.rows if not _diverged(row)]
        found = [value for of_run in numbers for key, value in of_run.items() if fnmatch.fnmatchcase(key, pattern)]
        return statistics.fmean(found) if found else math.nan


def paired_difference(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Interval:
    """Interval of arm - baseline over the seeds that both have: the same data order, so its noise cancels."""
    return interval([arm[seed] - baseline[seed] for seed in arm if seed in baseline])


def verdict(arm: str, baseline: str, difference: Interval, higher_is_better: bool) -> str:
    """One sentence, from the numbers alone."""
    if difference.n == 0:
        return f"{arm} against {baseline}: no pair of finished runs, no verdict"
    if difference.n == 1:
        return f"{arm} minus {baseline} is {difference.mean:+.4f} on one seed: no interval, no verdict"
    pairs = f"({difference.n} pairs)"
    if difference.low <= 0 <= difference.high:
        bounds = f"[{difference.low:+.4f}, {difference.high:+.4f}]"
        return f"no difference seen between {arm} and {baseline}: the interval {bounds} holds 0 {pairs}"
    word = "better" if (difference.mean > 0) == higher_is_better else "worse"
    low, high = sorted((abs(difference.low), abs(difference.high)))
    return f"{arm} is {word} than {baseline} by {abs(difference.mean):.4f} [{low:.4f}, {high:.4f}] {pairs}"


def summarize_study(study: StudyConfig, rows: Mapping[str, Row]) -> list[ArmResult]:
    """Every arm and variant at every point, the baseline first; an arm that an axis does not change comes once."""
    others = [arm for arm in study.arms if arm != study.baseline]
    results: dict[tuple[str, str | None], ArmResult] = {}
    for point in study.points:
        baseline = _result(study, rows, study.baseline, point, None)
        for arm in (*others, *study.variants):
            own = study.variants[arm].arm if arm in study.variants else study.baseline
            unswitched = None if own == study.baseline else _result(study, rows, own, point, baseline)
            result = _result(study, rows, arm, point, baseline, unswitched)
            results.setdefault((baseline.arm, baseline.axis), baseline)
            results.setdefault((arm, result.axis), result)
        results.setdefault((baseline.arm, baseline.axis), baseline)
    return list(results.values())


def _tuning_cpu_seconds(cell: Cell, rows: Mapping[str, Row]) -> float:
    return math.fsum(
        row["cpu_seconds"]
        for row in rows.values()
        if (row["arm"], row["axis"], row["purpose"]) == (cell.arm, cell.axis, "tune")
    )


def _result(
    study: StudyConfig,
    rows: Mapping[str, Row],
    arm: str,
    point: tuple[str, str] | None,
    baseline: ArmResult | None,
    unswitched: ArmResult | None = None,
) -> ArmResult:
    cell = study.result_cell(arm, point)
    tuned = tuning(study, cell, rows)
    purpose = "variant" if arm in study.variants else "measure"
    found: dict[int, Row] = {}
    for seed in study.seeds if tuned.best is not None else ():
        run = {"arm": arm, "axis": cell.axis, "purpose": purpose, "seed": seed, "factor": tuned.best}
        trained = rows.get(row_key({**run, "arm": cell.arm, "purpose": "measure"}))
        if row_key(run) in rows:
            found[seed] = rows[row_key(run)]
        elif trained is not None and _diverged(trained):  # there is nothing that a variant could evaluate
            found[seed] = trained
    finished = {seed: row["metrics"] for seed, row in found.items() if not _diverged(row)}
    values = {seed: metrics[study.metric] for seed, metrics in finished.items() if study.metric in metrics}
    shown = study.shown(arm)
    place = f"{shown} at {cell.axis}" if cell.axis else shown
    if baseline is None:
        difference, text = None, ""
    else:
        difference = paired_difference(values, baseline.values)
        elsewhere = baseline.axis not in (None, cell.axis)
        against = f"{baseline.shown} at {baseline.axis}" if elsewhere else baseline.shown
        text = verdict(place, against, difference, study.higher_is_better)
    switched = None
    if unswitched is not None:
        switched = paired_difference(values, unswitched.values)
        text = "; ".join((verdict(place, unswitched.name, switched, study.higher_is_better), text))
    if tuned.failed:
        text = f"{place} failed: at all learning rates that were tried ({listed_factors(tuned)}) the run diverged"
    diverged = len(found) - len(finished)
    if diverged:
        text = "; ".join(
            filter(None, [text, f"{place}: {diverged} of {len(found)} runs diverged and count in no mean"])
        )
    return ArmResult(
        arm=arm,
        axis=cell.axis,
        baseline=None if baseline is None else baseline.name,
        rows=tuple(found.values()),
        values=values,
        missing=() if tuned.failed else tuple(seed for seed in study.seeds if seed not in found),
        tuning=tuned,
        tuning_cpu_seconds=_tuning_cpu_seconds(cell, rows) if purpose == "measure" else 0.0,
        level=interval(list(values.values())),
        difference=difference,
        switched=switched,
        verdict=text,
        shown=shown,
    )


def listed_factors(tuned: Tuning) -> str:
    """The factors that were tried: "x0.25, x0.5"."""
    return ", ".join(f"x{factor:g}" for factor in tuned.factors)


def _diverged(row: Row) -> bool:
    return bool(row["status"] != "finished")


def processors(rows: Iterable[Row]) -> list[str]:
    """Return the kinds of processor, by instruction set, that rows were made on; old rows do not say."""
    return sorted({row["processor"] for row in rows if row.get("processor") is not None})


def scored_windows(rows: Iterable[Row]) -> str:
    """On how many windows of how many these rows are scored; "" where all are scored on the whole split."""
    return ", ".join(sorted({found for row in rows if (found := on_windows(row["metrics"]))}))
