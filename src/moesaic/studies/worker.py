"""The runs of a study, one after the other: python -m moesaic.studies.worker reads their folders, see `serving`.

A folder holds job.json; a run adds run/ (an ordinary run directory), cpu_seconds and, at the end, rows.json. It may be
killed at any time and begun again. The CPU seconds of a row are those of its run; what a worker takes to import
everything, once for all its runs, is in no row.
"""

import dataclasses
import math
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from moesaic.checkpoints import load_model, save_model, with_config
from moesaic.config import from_mapping, to_mapping
from moesaic.data import DataConfig, load_data
from moesaic.distillation import TargetFormat
from moesaic.distillation.fill import fill_cache
from moesaic.errors import InputError, naming
from moesaic.evaluation.capacity import capacity_numbers
from moesaic.evaluation.language_modeling import evaluate_split
from moesaic.evaluation.plots import read_columns
from moesaic.evaluation.recall import recall_numbers, score_recall
from moesaic.files import standing, write_atomically, write_json
from moesaic.models import DecoderConfig, account
from moesaic.overrides import apply_overrides
from moesaic.reading import read_json, reading, require_finite
from moesaic.studies.config import VariantConfig
from moesaic.studies.jobs import Row, import_evaluation, sources_of, variant_options
from moesaic.studies.serving import serve
from moesaic.studies.sweep import read_metrics
from moesaic.training.config import RunConfig
from moesaic.training.records import environment
from moesaic.training.run import run

__all__ = ["evaluate_variant", "main", "work"]

CURVE_POINTS = 40


def work(folder: Path) -> list[Row]:
    """Train (or continue, or find finished) the run of `folder`/job.json; returns its row and those of its variants."""
    with _CpuClock(folder / "cpu_seconds") as clock:
        return _work(folder, clock)


def _work(folder: Path, clock: "_CpuClock") -> list[Row]:
    job = read_json(folder / "job.json")
    with reading(folder / "job.json"):
        row: Row = from_mapping(_Job, job).row
        row["purpose"], row["arm"], row["overrides"]
    config, run_dir = job["config"], folder / "run"
    _require_same_code(job["row"].get("sources", {}), config)
    checkpoint = run_dir / "checkpoints" / "last.ckpt"
    prepares = job["row"]["purpose"] == "prepare"
    if cache := job.get("cache"):
        result, here = _fill_cache(cache, config, folder / "targets"), environment()
    else:
        result = _train(config, run_dir, needs_checkpoint=prepares or bool(job["variants"] or job["evaluations"]))
        here = _read_environment(run_dir / "environment.json")
    changes = [line for line in here["git_uncommitted_changes"] or () if line[3:].startswith(("src/", "conf/"))]
    row = {
        **job["row"],
        "status": result["status"],
        "error": result.get("error"),
        "commit": here["git_commit"],
        "uncommitted_changes": bool(changes),
        "torch": torch.__version__,
        "python": here["python"],
        "processor": here["processor"],
        "metrics": {key: value for key, value in result.items() if _is_number(value)},
        "warnings": result.get("warnings", []),
    }
    if prepares:
        if row["status"] != "finished":
            raise InputError(f"study.prepare.{row['arm']}: {row['error']}")
        return [{**row, "curve": {}, "cpu_seconds": clock.read()}]
    row["metrics"] |= _distillation(run_dir / "metrics.csv")
    finished = result["status"] == "finished"
    # evaluations are for measured runs, unless one of them is what is tuned for
    evaluated = finished and (row["purpose"] == "measure" or job["metric"] not in row["metrics"])
    if evaluated:
        row["metrics"] |= _evaluate(job, checkpoint, config)
    if finished and job["metric"] not in row["metrics"]:
        found = ", ".join(sorted(row["metrics"]))
        raise InputError(f"study.metric={job['metric']!r}: the run has none; found: {found}")
    if finished and not math.isfinite(row["metrics"][job["metric"]]):
        finished = False
        row |= {"status": "diverged", "error": f"{job['metric']} is {row['metrics'][job['metric']]}"}
    row["metrics"] = {key: value for key, value in row["metrics"].items() if math.isfinite(value)}
    row |= {"curve": _curve(run_dir / "metrics.csv", job["metric"]), "cpu_seconds": clock.read()}
    rows = [row]
    for name, overrides in job["variants"].items() if finished else ():
        began = clock.read()
        where, variant = f"study.variants.{name}.overrides", VariantConfig(job["row"]["arm"], overrides)
        changed = apply_overrides(config, variant.model, where)
        options = variant_options(job["evaluation_options"], variant, where)
        place = folder / f"{name}.ckpt"
        metrics = evaluate_variant(checkpoint, changed, place)
        metrics |= _evaluate({**job, "evaluation_options": options}, place, changed)
        place.unlink()
        line = {**row, "arm": name, "purpose": "variant", "overrides": {**row["overrides"], **overrides}}
        rows.append({**line, "metrics": metrics, "curve": {}, "cpu_seconds": clock.read() - began})
    if job["row"]["purpose"] == "tune":
        shutil.rmtree(checkpoint.parent, ignore_errors=True)
    return rows


@dataclasses.dataclass(frozen=True)
class _Job:
    """What job.json holds, see `moesaic.studies.runner`."""

    row: dict[str, Any]
    config: dict[str, Any]
    metric: str
    variants: dict[str, dict[str, Any]]
    evaluations: tuple[str, ...]
    evaluation_options: dict[str, Any]
    cache: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class _Environment:
    """What a row has of a run's environment.json."""

    python: str
    processor: str
    git_commit: str | None
    git_uncommitted_changes: tuple[str, ...] | None


def _read_environment(path: Path) -> dict[str, Any]:
    with reading(path):
        stored = read_json(path)
        names = [field.name for field in dataclasses.fields(_Environment)]
        return to_mapping(from_mapping(_Environment, {name: stored[name] for name in names if name in stored}))


def _require_same_code(planned: Mapping[str, str], config: Mapping[str, Any]) -> None:
    """Refuse code that is not the one in the row that the study has planned."""
    now = sources_of(config) if planned else {}
    for path, digest in planned.items():
        if now.get(path) != digest:
            raise InputError(f"{path}: its source file has changed since the study planned this run; start it again")


def _fill_cache(cache: Mapping[str, Any], config: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Fill a cache for the data and windows of `config`; it continues what was killed."""
    seq_len = config["training"]["seq_len"]
    settings = {
        **dataclasses.asdict(TargetFormat()),
        **{"seed": 0, "batch_size": 8, "windows_per_shard": 256, "accelerator": "cpu"},
        **cache,
        **{"directory": str(directory), "seq_len": seq_len, "data": config["data"]},
    }
    found = fill_cache(settings, Console(emoji=False, soft_wrap=True, highlight=False))
    teacher = account(load_model(cache["teacher"]).config, seq_len)
    return {
        "status": "finished",
        "warnings": [],
        "windows": found["windows"],
        "bytes_per_token": found["bytes"] / (found["windows"] * seq_len),
        "teacher_flops": found["windows"] * seq_len * teacher.forward_flops,
    }


def _distillation(metrics_csv: Path) -> dict[str, float]:
    """Means over the run of what the teacher did, where there was one."""
    names = [f"distillation/{name}" for name in ("soft_weight", "agreement")]
    columns = read_columns(metrics_csv, *names)
    return {name: float(column.mean()) for name, column in zip(names, columns, strict=True) if len(column)}


def evaluate_variant(checkpoint: Path, config: Mapping[str, Any], out: Path) -> dict[str, float]:
    """Write the checkpoint's weights under the model of `config` to `out`; returns its loss on the validation split.

    Of a task its accuracy and what is stored of it too.

    Raises:
        InputError: the weights do not fit that model.
    """
    trained = load_model(checkpoint)
    run_config = from_mapping(RunConfig, config)
    model = from_mapping(DecoderConfig, {**run_config.model, "vocab_size": trained.config.vocab_size}, "model")
    with naming(f"{out.stem}: {checkpoint}"):
        decoder = with_config(trained.decoder, model)
    training = config["training"]
    out.unlink(missing_ok=True)
    save_model(out, decoder, trained.tokenizer, training["seq_len"])
    data = load_data(from_mapping(DataConfig, config["data"], "data"))
    seq_len = training["validation_seq_len"] or training["seq_len"]
    batch_size = max(1, training["batch_size"] * training["seq_len"] // seq_len)
    score = evaluate_split(
        decoder,
        data,
        seq_len=seq_len,
        batch_size=batch_size,
        windows=training.get("score_windows"),  # runs of older versions have no such key
        token_bytes=trained.token_bytes,
    )
    numbers = {**score.numbers(), "validation/seq_len": seq_len}
    if data.task is not None:
        numbers |= recall_numbers(score_recall(decoder, data.task, training["seq_len"], training["batch_size"]))
        numbers["recall/chance"] = data.task.chance
    numbers |= capacity_numbers(score, data.task, account(model, seq_len))
    return numbers


def _train(config: Mapping[str, Any], run_dir: Path, needs_checkpoint: bool) -> dict[str, Any]:
    checkpoint = run_dir / "checkpoints" / "last.ckpt"
    metrics = run_dir / "metrics.json"
    found: dict[str, Any] = read_metrics(metrics) if metrics.exists() else {}
    if found.get("status") == "diverged" or (
        found.get("status") == "finished" and (checkpoint.exists() or not needs_checkpoint)
    ):
        return found
    if standing(checkpoint).exists():
        _read_environment(run_dir / "environment.json")  # what is wrong with it is said before the training
        return run({**config, "resume": True, "run_dir": str(run_dir)})
    shutil.rmtree(run_dir, ignore_errors=True)  # killed before its first checkpoint: nothing in it is worth keeping
    return run({**config, "run_dir": str(run_dir)})


def _evaluate(job: Mapping[str, Any], checkpoint: Path, config: Mapping[str, Any]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for path in job["evaluations"]:
        numbers |= import_evaluation(path)(checkpoint, config, job["evaluation_options"])
    return numbers


def _curve(metrics_csv: Path, metric: str) -> dict[str, Any]:
    """The checks during the run, thinned; of the loss if the metric is known only at the end."""
    for name in (metric, "validation/bits_per_byte", "validation/loss"):
        for axes in (("tokens", "seconds", "active_flops", "teacher_flops"), ("tokens", "seconds", "active_flops")):
            columns = read_columns(metrics_csv, *axes, name)
            if len(columns[0]):
                every = math.ceil(len(columns[0]) / CURVE_POINTS)
                values = [[float(f"{x:.6g}") for x in column[::-1][::every][::-1]] for column in columns]
                return {"metric": name, **dict(zip((*axes, "values"), values, strict=True))}
    return {}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class _CpuClock:
    """CPU seconds of this process from now on, and of those that were killed before it in the same folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.began = time.process_time()
        with reading(path):
            self.before = float(path.read_text(encoding="utf-8")) if path.exists() else 0.0
            require_finite(self.before, "CPU seconds")
        self.done = threading.Event()

    def __enter__(self) -> "_CpuClock":
        threading.Thread(target=self._tick, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()

    def read(self) -> float:
        return round(self.before + time.process_time() - self.began, 2)

    def _tick(self) -> None:
        while not self.done.wait(1.0):
            write_atomically(self.path, str(self.read()))


def main(folder: Path) -> None:
    """Do the job of a folder in this process.

    Raises:
        SystemExit: 2 for bad input, which is printed.
    """
    try:
        write_json(folder / "rows.json", work(folder))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    serve(main)
