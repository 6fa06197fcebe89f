"""A tree of runs as one table: mean and 95% interval over seeds, with nothing silently left out."""

import contextlib
import csv
import dataclasses
import io
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moesaic.errors import InputError
from moesaic.evaluation.language_modeling import on_windows
from moesaic.evaluation.plots import plot_curves, read_columns
from moesaic.files import find_all, write_atomically
from moesaic.formats import translate_run
from moesaic.reading import read_json, read_yaml, reading
from moesaic.statistics import half_width, interval
from moesaic.studies.defining import defining
from moesaic.studies.tables import markdown_table, number

__all__ = [
    "DEFAULT_METRICS",
    "Run",
    "SweepArm",
    "collect_runs",
    "summarize_runs",
    "to_csv",
    "to_markdown",
    "write_report",
]

DEFAULT_METRICS = ("validation/bits_per_byte", "validation/loss")

COSTS = ("seconds", "parameters/total", "parameters/active")

NOT_AN_ARM = ("seed", "ckpt_path", "model.format")
"""Keys that define a run and yet do not make it another arm."""

ENDED = ("finished", "stopped")
"""Status of a run that has its numbers; one that a time limit or early stopping ended has fewer steps."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run directory. `status` is that of metrics.json, "unfinished" without one, "damaged" if unreadable."""

    directory: Path
    config: dict[str, Any]
    status: str
    metrics: dict[str, Any]

    @property
    def seed(self) -> Any:
        return self.config.get("seed")


@dataclasses.dataclass(frozen=True)
class SweepArm:
    """One arm: all runs whose configs differ in nothing but the seed."""

    label: str
    runs: tuple[Run, ...]
    finished: tuple[Run, ...]
    """One per seed, the newest; also of those that ended before all steps."""
    set_aside: int
    """Finished runs of a seed that has a newer one."""
    missing_seeds: tuple[Any, ...]
    """Seeds that other arms have finished."""

    def values(self, metric: str) -> list[float]:
        found = [run.metrics.get(metric) for run in self.finished]
        return [float(value) for value in found if isinstance(value, (int, float)) and math.isfinite(value)]

    def windows(self) -> str:
        """Lengths of the windows of validation, on which scores depend; and how many were scored, if not all."""
        lengths = ", ".join(f"{length:g}" for length in sorted(set(self.values("validation/seq_len"))))
        scored = sorted({found for run in self.finished if (found := on_windows(run.metrics))})
        return " ".join([lengths, *scored])

    def mean(self, metric: str) -> float:
        values = self.values(metric)
        return statistics.fmean(values) if values else math.nan

    def half_width(self, metric: str) -> float:
        """Half of the 95% interval of the mean over seeds (Student t); nan for fewer than two."""
        return half_width(self.values(metric))


def collect_runs(root: Path) -> list[Run]:
    """Every run directory (one with a config.yaml) in a tree.

    Raises:
        InputError: no such folder, or no run in it.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such directory")
    runs = [_read(path.parent) for path in find_all(root, "config.yaml")]
    if not runs:
        raise InputError(f"{root}: no run in it; a run is a directory with a config.yaml, as moesaic train writes it")
    return runs


def summarize_runs(runs: Sequence[Run], metric: str) -> list[SweepArm]:
    """The arms, best mean of `metric` first (lower is better), those without any finished run last."""
    arms: dict[str, list[Run]] = {}
    for run in runs:
        arms.setdefault(json.dumps(_arm(run), sort_keys=True, default=str), []).append(run)
    flat = [json.loads(arm) for arm in arms]
    differing = sorted({key for arm in flat for key in arm if any(arm.get(key) != other.get(key) for other in flat)})
    seeds = {run.seed for run in runs if run.status in ENDED}
    rows = []
    for arm, members in zip(flat, arms.values(), strict=True):
        newest: dict[Any, Run] = {}
        finished = [run for run in members if run.status in ENDED]
        for run in sorted(finished, key=lambda run: (run.directory / "metrics.json").stat().st_mtime):
            newest[run.seed] = run
        if not members[0].config:
            label = "(config unreadable)"
        else:
            label = ", ".join(f"{name}={_plain(arm.get(name))}" for name in differing) or "(all equal)"
        rows.append(
            SweepArm(
                label=label,
                runs=tuple(members),
                finished=tuple(newest[seed] for seed in sorted(newest, key=str)),
                set_aside=len(finished) - len(newest),
                missing_seeds=tuple(sorted(seeds - newest.keys(), key=str)),
            )
        )
    return sorted(rows, key=lambda row: (not row.values(metric), row.mean(metric)))


def to_markdown(rows: Sequence[SweepArm], metrics: Sequence[str]) -> str:
    windows = {row.label: row.windows() for row in rows}
    scored = ["window (tokens)"] if any(windows.values()) else []
    header = ["arm", "seeds", *metrics, *scored, "seconds", "parameters", "active"]
    lines = []
    for row in rows:
        cells = [row.label, f"{len(row.finished)} of {len({run.seed for run in row.runs} | set(row.missing_seeds))}"]
        cells += [str(interval(row.values(metric))) for metric in metrics]
        cells += [windows[row.label]] if scored else []
        cells += [number(row.mean("seconds"), ".0f")]
        cells += [number(row.mean(name), ",.0f") for name in ("parameters/total", "parameters/active")]
        lines.append(cells)
    notes = ["Mean ± half of the 95% interval over seeds (Student t); one seed has no interval."]
    for row in rows:
        for run in row.runs:
            if why := run.metrics.get("stopped_by"):
                wanted = run.config.get("training", {}).get("steps", "?")
                steps = f"{run.metrics.get('steps', '?')} of {wanted} steps"
                notes.append(f"**fewer steps** {run.directory} ({row.label}, seed {run.seed}): {steps}, {why}")
            if run.status not in ENDED:
                error = f": {run.metrics['error']}" if run.metrics.get("error") else ""
                notes.append(f"**{run.status}** {run.directory} ({row.label}, seed {run.seed}){error}")
        if row.missing_seeds:
            seeds = ", ".join(str(seed) for seed in row.missing_seeds)
            notes.append(f"**missing** {row.label}: no finished run with seed {seeds}")
        if row.set_aside:
            notes.append(f"**repeats** {row.label}: {row.set_aside} older run(s) of a seed set aside")
    return "\n".join([markdown_table(header, lines), "", *(f"- {note}" for note in notes)]) + "\n"


def to_csv(rows: Sequence[SweepArm], metrics: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [(metric, part) for metric in metrics for part in ("mean", "half_width", "n")]
    writer.writerow(["arm", "runs", "finished", *(f"{metric} {part}" for metric, part in columns), *COSTS])
    for row in rows:
        cells: list[Any] = [row.label, len(row.runs), len(row.finished)]
        for metric in metrics:
            cells += [row.mean(metric), row.half_width(metric), len(row.values(metric))]
        writer.writerow([*cells, *(row.mean(cost) for cost in COSTS)])
    return text.getvalue()


def write_report(root: Path, metrics: Sequence[str] = ()) -> str:
    """Write report.md, report.csv and report.png into `root`; returns the Markdown.

    Raises:
        InputError: no runs, or a metric that no run has.
    """
    runs = collect_runs(root)
    found = {name for run in runs for name, value in run.metrics.items() if isinstance(value, (int, float))}
    for metric in metrics:
        if metric not in found:
            raise InputError(f"metrics: no run has {metric}; found: {', '.join(sorted(found)) or 'none'}")
    chosen = list(metrics) or [name for name in DEFAULT_METRICS if name in found] or [DEFAULT_METRICS[-1]]
    rows = summarize_runs(runs, chosen[0])
    markdown = to_markdown(rows, chosen)
    write_atomically(root / "report.md", markdown)
    write_atomically(root / "report.csv", to_csv(rows, chosen))
    columns = ("step", "tokens", "active_flops", "seconds", chosen[0])
    curves = {}
    for row in rows:
        seeds = []
        for run in row.finished:
            table = run.directory / "metrics.csv"
            with contextlib.suppress(InputError):  # a number in it is none: the run has no curve
                values = read_columns(table, *columns) if table.exists() else ()
                seeds.append(dict(zip(columns, values, strict=False)))
        curves[row.label] = [seed for seed in seeds if len(seed.get("step", ()))]
    plot_curves({label: seeds for label, seeds in curves.items() if seeds}, root / "report.png", chosen[0])
    return markdown


def _read(directory: Path) -> Run:
    config: dict[str, Any] = {}
    path = directory / "config.yaml"
    try:
        with reading(path):
            stored = translate_run(read_yaml(path))
            if type(stored.get("seed", 0)) is not int:
                raise InputError(f"seed={stored['seed']!r}: must be an integer")
            config = stored
        path = directory / "metrics.json"
        if not path.exists():
            return Run(directory, config, "unfinished", {})
        with reading(path):
            metrics = read_json(path)
            if not isinstance(metrics["status"], str):
                raise InputError(f"status={metrics['status']!r}: must be a string")
        if (directory / "metrics.csv").exists():
            read_columns(directory / "metrics.csv", "step")
        return Run(directory, config, metrics["status"], metrics)
    except InputError as error:
        return Run(directory, config, "damaged", {"error": str(error).removeprefix(f"{directory}/")})


def _arm(run: Run) -> dict[str, Any]:
    config = defining(run.config)  # of an older run it lacks the keys that have been added, which are null by default
    return {key: value for key, value in config.items() if key not in NOT_AN_ARM and value not in ({}, None)}


def _plain(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, list, bool)) or value is None else str(value)
