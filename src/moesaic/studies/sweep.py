"""A tree of runs as a table per experiment: mean and 95% interval over seeds, with nothing silently left out."""

import contextlib
import csv
import dataclasses
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moesaic.arms import name_arms, short_value
from moesaic.config import flatten
from moesaic.errors import InputError, reason
from moesaic.evaluation.language_modeling import on_windows
from moesaic.evaluation.plots import plot_curves, read_columns
from moesaic.evaluation.plotting import Floats
from moesaic.files import find_all, write_atomically
from moesaic.formats import translate_run
from moesaic.reading import is_number, read_csv, read_json, read_yaml, reading
from moesaic.statistics import half_width, interval
from moesaic.studies.defining import defining
from moesaic.studies.tables import markdown_table, number
from moesaic.studies.where import matches, parse_where

__all__ = [
    "DEFAULT_METRICS",
    "ENDED",
    "Run",
    "SweepArm",
    "collect_runs",
    "group_runs",
    "read_metrics",
    "summarize_runs",
    "tables_of",
    "to_csv",
    "to_markdown",
    "write_report",
]

DEFAULT_METRICS = ("validation/bits_per_byte", "validation/loss")

COSTS = ("seconds", "parameters/total", "parameters/active")

NOT_AN_ARM = ("seed", "ckpt_path", "model.format")
"""Keys that define a run and yet do not make it another arm."""

UNREADABLE = "(config unreadable)"

ALONE = "one arm each"
"""Heading of the table of all experiments that have a single arm."""

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

    @property
    def name(self) -> str:
        """Name of its experiment."""
        return str(self.config.get("name", "")) if self.config else UNREADABLE


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
    usual: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What most arms of its table have, where the label does not say otherwise."""

    def values(self, metric: str) -> list[float]:
        found: list[Any] = [run.metrics.get(metric) for run in self.finished]
        return [float(value) for value in found if is_number(value)]

    def windows(self) -> str:
        """Tokens of a window of validation, on which scores depend, and of one of training; how many, if not all."""
        found = set()
        for run in self.finished:
            if (scored := run.metrics.get("validation/seq_len")) is not None:
                trained = flatten(run.config).get("training.seq_len", "?")
                found.add(" ".join(filter(None, [f"{scored:g} / {trained}", on_windows(run.metrics)])))
        return ", ".join(sorted(found))

    def mean(self, metric: str) -> float:
        values = self.values(metric)
        return statistics.fmean(values) if values else math.nan

    def half_width(self, metric: str) -> float:
        """Half of the 95% interval of the mean over seeds (Student t); nan for fewer than two."""
        return half_width(self.values(metric))


def collect_runs(root: Path) -> list[Run]:
    """Every run directory (one with a config.yaml) in a tree, but for runs of a study that only prepare or tune.

    Raises:
        InputError: no such folder, or no run in it.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such directory")
    unreadable: list[OSError] = []
    runs = [_read(path.parent) for path in find_all(root, "config.yaml", unreadable.append) if _counts(path.parent)]
    for error in unreadable:
        if Path(error.filename) == root:
            raise InputError(f"{root}: cannot be read ({reason(error)})")
        runs.append(Run(Path(error.filename), {}, "damaged", {"error": f"cannot be read ({reason(error)})"}))
    if not runs:
        raise InputError(f"{root}: no run in it; a run is a directory with a config.yaml, as moesaic train writes it")
    return runs


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by the name of their experiment, in order of names. Those whose config is unreadable come last."""
    names = sorted({run.name for run in runs}, key=lambda name: (name == UNREADABLE, name))
    return {name: [run for run in runs if run.name == name] for name in names}


def summarize_runs(runs: Sequence[Run], metric: str) -> list[SweepArm]:
    """The arms, best mean of `metric` first (lower is better), those without any finished run last."""
    arms: dict[str, list[Run]] = {}
    for run in runs:
        arms.setdefault(json.dumps(_arm(run), sort_keys=True, default=str), []).append(run)
    readable = [arm for arm, members in arms.items() if members[0].config]
    names, usual = name_arms([json.loads(arm) for arm in readable])
    labels = dict(zip(readable, names, strict=True))
    seeds = {run.seed for run in runs if run.status in ENDED}
    rows = []
    for arm, members in arms.items():
        newest: dict[Any, Run] = {}
        finished = [run for run in members if run.status in ENDED]
        for run in sorted(finished, key=lambda run: (run.directory / "metrics.json").stat().st_mtime):
            newest[run.seed] = run
        rows.append(
            SweepArm(
                label=labels.get(arm, UNREADABLE),
                runs=tuple(members),
                finished=tuple(newest[seed] for seed in sorted(newest, key=str)),
                set_aside=len(finished) - len(newest),
                missing_seeds=tuple(sorted(seeds - newest.keys(), key=str)),
                usual=usual,
            )
        )
    return _best_first(rows, metric)


def _best_first(arms: Sequence[SweepArm], metric: str) -> list[SweepArm]:
    return sorted(arms, key=lambda arm: (not arm.values(metric), arm.mean(metric)))


def tables_of(runs: Sequence[Run], metric: str) -> dict[str, list[SweepArm]]:
    """The arms of each experiment by its name. Experiments of a single arm share a table, where their names tell."""
    groups = {name: summarize_runs(members, metric) for name, members in group_runs(runs).items()}
    if len(groups) == 1:
        return groups
    alone = [dataclasses.replace(arms[0], label=name) for name, arms in groups.items() if len(arms) == 1]
    tables = {name: arms for name, arms in groups.items() if len(arms) > 1}
    return tables | ({ALONE: _best_first(alone, metric)} if alone else {})


def to_markdown(rows: Sequence[SweepArm], metrics: Sequence[str]) -> str:
    """One table, and what has to be known to read it."""
    windows = {row.label: row.windows() for row in rows}
    scored = ["window / trained (tokens)"] if any(windows.values()) else []
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
    if rows[0].usual:
        usual = ", ".join(f"{key}={short_value(value)}" for key, value in rows[0].usual.items())
        notes.append(f"Where a name does not say otherwise: {usual}.")
    for row in rows:
        notes += _notes_on(row)
    return "\n".join([markdown_table(header, lines), "", *(f"- {note}" for note in notes)]) + "\n"


def _notes_on(row: SweepArm) -> list[str]:
    """What is wrong with an arm, or missing."""
    notes = []
    for run in row.runs:
        if why := run.metrics.get("stopped_by"):
            wanted = flatten(run.config).get("training.steps", "?")
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
    return notes


def to_csv(tables: Mapping[str, Sequence[SweepArm]], metrics: Sequence[str]) -> str:
    """All tables as one, with the name of the experiment in the first column."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [(metric, part) for metric in metrics for part in ("mean", "half_width", "n")]
    scores = [f"{metric} {part}" for metric, part in columns]
    writer.writerow(["name", "arm", "runs", "finished", *scores, "window / trained (tokens)", *COSTS])
    for rows in tables.values():
        for row in rows:
            cells: list[Any] = [row.runs[0].name, row.label, len(row.runs), len(row.finished)]
            for metric in metrics:
                cells += [row.mean(metric), row.half_width(metric), len(row.values(metric))]
            writer.writerow([*cells, row.windows(), *(row.mean(cost) for cost in COSTS)])
    return text.getvalue()


def write_report(root: Path, metrics: Sequence[str] = (), where: str | None = None) -> str:
    """Write report.md, report.csv and report.png into `root`; returns the Markdown.

    Args:
        root: any folder with runs in it, at any depth.
        metrics: keys of metrics.json; the first one sorts. None: bits per byte and loss.
        where: the runs to choose, as `parse_where` reads it. None: all.

    Raises:
        InputError: no runs, a metric that no run has, or a condition that is no condition or that no run meets.
    """
    runs = _chosen(collect_runs(root), where)
    found = {name for run in runs for name, value in run.metrics.items() if is_number(value)}
    for metric in metrics:
        if metric not in found:
            raise InputError(f"metrics: no run has {metric}; found: {', '.join(sorted(found)) or 'none'}")
    chosen = list(metrics) or [name for name in DEFAULT_METRICS if name in found] or [DEFAULT_METRICS[-1]]
    tables = tables_of(runs, chosen[0])
    parts = {name: to_markdown(rows, chosen) for name, rows in tables.items()}
    markdown = "\n".join(f"## {name}\n\n{part}" if len(parts) > 1 else part for name, part in parts.items())
    if where is not None:
        markdown = f"Runs where {where}:\n\n{markdown}"
    write_atomically(root / "report.md", markdown)
    write_atomically(root / "report.csv", to_csv(tables, chosen))
    curves = {name: {row.label: _curves(row, chosen[0]) for row in rows} for name, rows in tables.items()}
    plot_curves(curves, root / "report.png", chosen[0])
    return markdown


def _chosen(runs: Sequence[Run], where: str | None) -> list[Run]:
    if where is None:
        return list(runs)
    fits = matches(parse_where(where), [{**flatten(run.config), **run.metrics} for run in runs])
    if not any(fits):
        raise InputError(f"where={where!r}: none of {len(runs)} runs is like that")
    return [run for run, fit in zip(runs, fits, strict=True) if fit]


def _curves(row: SweepArm, metric: str) -> list[dict[str, Floats]]:
    """What `plot_curves` draws of an arm: a seed's columns of metrics.csv, where it has them."""
    columns = ("step", "tokens", "active_flops", "seconds", metric)
    seeds = []
    for run in row.finished:
        table = run.directory / "metrics.csv"
        with contextlib.suppress(InputError):  # a number in it is none: the run has no curve
            values = read_columns(table, *columns) if table.exists() else ()
            seeds.append(dict(zip(columns, values, strict=False)))
    return [seed for seed in seeds if len(seed.get("step", ()))]


def _counts(directory: Path) -> bool:
    """Whether a directory with a config is a run whose numbers count: not a study's results, not what it tunes with."""
    if (directory / "rows.jsonl").exists():
        return False
    job = directory.parent / "job.json"
    if not job.is_file():
        return True
    with contextlib.suppress(InputError, KeyError, TypeError):
        return bool(read_json(job)["row"]["purpose"] == "measure")
    return True


NUMBERS = ("steps", "tokens", "seconds", "tokens_per_second", "active_flops", "teacher_flops", "peak_memory_bytes")
"""Keys of metrics.json that are numbers, beside those with a / in them."""


def read_metrics(path: Path) -> dict[str, Any]:
    """What metrics.json of a run holds.

    Raises:
        InputError: it cannot be read, or a value is of another kind than its key.
    """
    with reading(path):
        metrics = read_json(path)
        if not isinstance(metrics["status"], str):
            raise InputError(f"status={metrics['status']!r}: must be a string")
        for name, value in metrics.items():
            if "/" not in name and name not in NUMBERS:  # a remark
                continue
            if not (value is None or is_number(value) or (type(value) is float and not math.isfinite(value))):
                raise InputError(f"{name}={value!r}: must be a number")
    return metrics


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
        metrics = read_metrics(path)
        if (path := directory / "metrics.csv").exists():
            with reading(path):
                if (rows := read_csv(path)) and "step" not in rows[0]:
                    raise InputError(f"found columns {', '.join(rows[0])[:80]!r}; must have step")
            read_columns(path, "step")
        return Run(directory, config, metrics["status"], metrics)
    except InputError as error:
        return Run(directory, config, "damaged", {"error": str(error).removeprefix(f"{directory}/")})


def _arm(run: Run) -> dict[str, Any]:
    config = defining(run.config)  # of an older run it lacks the keys that have been added, which are null by default
    return {key: value for key, value in config.items() if key not in NOT_AN_ARM and value not in ({}, None)}
