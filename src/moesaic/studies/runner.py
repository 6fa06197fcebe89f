"""Run what is missing of a study, several runs at a time, each in a process of its own; one row per run."""

import contextlib
import dataclasses
import hashlib
import json
import math
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from moesaic.config import from_mapping, require_same
from moesaic.data import DataConfig, load_data
from moesaic.errors import InputError, reason
from moesaic.files import lock, write_atomically, write_json, write_yaml
from moesaic.formats import translate_overrides, translate_run, translate_study, version_of
from moesaic.imports import names_in, require_trusted, trusting
from moesaic.models.config import FORMAT
from moesaic.overrides import apply_overrides
from moesaic.reading import read_yaml, reading, require_finite
from moesaic.studies.config import StudyConfig
from moesaic.studies.jobs import (
    Job,
    Row,
    canonical,
    fingerprint,
    job_hash,
    job_of,
    prepare_job,
    read_row,
    resolve,
    row_key,
    run_config_of,
    shown_key,
    sources_of,
    validate,
    write_row,
)
from moesaic.studies.plan import Plan, plan
from moesaic.studies.progress import FORWARD, StudyProgress, Work
from moesaic.studies.slots import Slot, Worker
from moesaic.training.config import TrainingConfig

__all__ = ["read_rows", "run_study"]

POLL_SECONDS = 0.1
"""How often the study looks at its workers."""


def read_rows(results: Path, study: StudyConfig, base: Mapping[str, Any]) -> dict[str, Row]:
    """Read the rows of a results directory by key, in the words of this version; none if there is no such directory.

    Rows are valid as long as they are of the same overrides on the same config. Keys that have been added since count
    as their defaults; renamed ones are translated.

    Raises:
        InputError: damaged, or of another configuration, evaluations or data, or without the study's metric; it names
            the file and what differs.
    """
    with trusting(names_in([base, dataclasses.asdict(study)])):
        return _read_rows(results, study, base)


def _read_rows(results: Path, study: StudyConfig, base: Mapping[str, Any]) -> dict[str, Row]:
    path = results / "rows.jsonl"
    rows: dict[str, Row] = {}
    if not path.exists():
        return rows
    stored = _read_config(results, study, base)
    data_hashes: dict[str, str | None] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error})") from error
    if not lines:
        raise InputError(f"{path}: damaged, it is empty; put it back, or remove it to begin again")
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        row = _parse_row(line, where, stored)
        key, data_hash = row_key(row), row["data_hash"]
        if key in rows:
            raise InputError(f"{where}: a second row for {key}")
        rows[key] = row
        expected = _expected_overrides(row, where, study, base)
        if expected is None:
            continue
        variant = study.variants.get(row["arm"]) if row["purpose"] == "variant" else None
        _require_equal(where, row["overrides"], expected | ({} if variant is None else variant.overrides))
        if row["purpose"] != "prepare" and (written := row.get("sources")):  # changed code is another arm
            now = sources_of(apply_overrides(base, expected, where))
            _require_equal(where, _named_sources(written), _named_sources({path: now.get(path) for path in written}))
        first = data_hashes.setdefault(_data_of(row["overrides"]), data_hash)
        _require_equal(where, {"content hash of the data": data_hash}, {"content hash of the data": first})
        if row["purpose"] != "prepare" and row["status"] == "finished" and study.metric not in row["metrics"]:
            found = ", ".join(sorted(row["metrics"]))
            raise InputError(f"{where}: study.metric={study.metric!r}: {key} has none; found: {found}")
    return rows


def _read_config(results: Path, study: StudyConfig, base: Mapping[str, Any]) -> dict[str, Any]:
    """The config that the rows were made with, which must be this study's; without its part about the study."""
    path = results / "config.yaml"
    if not path.exists():
        rows = results / "rows.jsonl"
        raise InputError(f"{rows}: rows without the config.yaml they were made with; choose another results_dir")
    with reading(path):
        stored = read_yaml(path)
        require_finite(stored, "")
        require_trusted(names_in(stored.get("model")), path)
        evaluated = stored.pop("study", None)
        if evaluated is not None:  # older ones do not say
            _require_equal(path, {"study": translate_study(evaluated)}, {"study": _evaluations(study)})
        _require_equal(path, canonical({**translate_run(stored), "seed": 0}), canonical({**base, "seed": 0}))
        return stored


def _parse_row(line: str, where: str, stored: Mapping[str, Any]) -> Row:
    """A row in the words of this version."""
    with reading(where):
        row = read_row(line)
        row_key(row), row["data_hash"], {row["arm"], row["axis"]}
        overrides = translate_overrides(row["overrides"], stored, version_of(row, where))
        _require_whole(row)
        return {**row, "overrides": overrides}


def _expected_overrides(row: Row, where: str, study: StudyConfig, base: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the run of a row must have been; of a variant, the run whose checkpoint it evaluates.

    None for a row of what the study no longer has.
    """
    arm, purpose = row["arm"], row["purpose"]
    if purpose == "prepare":
        if arm not in study.prepare:
            return None
        preparation = prepare_job(study, base, arm)
        if preparation.key != row_key(row):  # another seed: of tune
            _require_equal(where, {"prepared": row_key(row)}, {"prepared": preparation.key})
        return dict(preparation.overrides)
    if purpose == "variant" and arm in study.variants:
        arm = study.variants[arm].arm
    cell = {(cell.arm, cell.axis): cell for cell in study.cells}.get((arm, row["axis"]))
    return None if cell is None else dict(job_of(study, base, cell, purpose, row["seed"], row["factor"]).overrides)


def _named_sources(hashes: Mapping[str, str | None]) -> dict[str, Any]:
    return {f"source file of {path}": digest for path, digest in hashes.items()}


def _lines(path: Path) -> dict[str, str]:
    """The rows of a file as they were written, by key: those that there are stay as they are."""
    return {row_key(read_row(line)): line for line in path.read_text(encoding="utf-8").splitlines()}


def _require_whole(row: Row) -> None:
    """Raise an error that names what a report would stumble over."""
    numbers = {"cpu_seconds": row["cpu_seconds"], "factor": row["factor"], **row["metrics"]}
    for key in ("error", "commit", "uncommitted_changes", "torch"):
        row[key]
    if row["purpose"] not in ("prepare", "tune", "measure", "variant") or row["status"] not in ("finished", "diverged"):
        raise ValueError(f"a row of purpose {row['purpose']!r} and status {row['status']!r}")
    if type(row["seed"]) is not int or not isinstance(row["data_hash"], str | None):
        raise ValueError(f"seed {row['seed']!r}, data_hash {row['data_hash']!r}")
    curve = {name: values for name, values in row["curve"].items() if name != "metric"}
    numbers |= {f"curve.{name}[{i}]": value for name, values in curve.items() for i, value in enumerate(values)}
    if len({len(values) for values in curve.values()}) > 1:
        raise ValueError("the columns of its curve are not equally long")
    for key, value in numbers.items():
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{key} is {value!r}, no number")


def _evaluations(study: StudyConfig) -> dict[str, Any]:
    """What decides the numbers of evaluations, in every row of a results directory."""
    return {"evaluations": list(study.evaluations), "evaluation_options": study.evaluation_options}


def run_study(
    study: StudyConfig,
    base: Mapping[str, Any],
    *,
    results: Path,
    runs: Path,
    workers: int,
    console: Console,
    estimate: float | None = None,
    make_worker: Callable[[Path], Slot] | None = None,
) -> dict[str, str]:
    """Run what has no row in `results` yet, until nothing is missing; returns the runs that failed and why.

    What the missing runs need prepared comes first, again if its file is gone: only rows travel between machines.

    Args:
        base: the run config that all arms start from.
        results: keeps rows.jsonl and config.yaml; they are enough to continue elsewhere.
        runs: keeps the run directories; a killed run continues from its last checkpoint there.
        estimate: seconds that it should take, shown until runs tell better.
        make_worker: makes what does one run after another, of which there are `workers`; by default a process.

    Raises:
        InputError: bad configuration, or results of another configuration or data.
        KeyboardInterrupt: Ctrl-C; no worker is left behind.
    """
    with trusting(names_in([base, dataclasses.asdict(study)])):
        progress = StudyProgress(console, workers, estimate)
        return _run_study(study, base, results, runs, progress, make_worker or Worker)


def _run_study(
    study: StudyConfig,
    base: Mapping[str, Any],
    results: Path,
    runs: Path,
    progress: StudyProgress,
    make_worker: Callable[[Path], Slot],
) -> dict[str, str]:
    validate(study, base, progress.workers)
    with _locked(runs, "output_dir", runs.parent), _locked(results, "results_dir", results):
        rows = read_rows(results, study, base)
        todo = plan(study, base, rows)
        if not todo.missing:
            if base["data"].get("path") is not None:  # named on the command line, which the report shows
                known = {_data_of(row["overrides"]): row["data_hash"] for row in rows.values()}
                _load(base, results / "rows.jsonl", known.get(_data_of({})))
            return {}
        if not rows:  # there may be the config of a study that was stopped before its first row
            write_yaml(results / "config.yaml", {**base, "study": _evaluations(study)})
        progress.begin(base["name"], todo.done, todo.total, todo.may_grow)
        return _Running(study, base, results, runs, rows, progress, make_worker).until_done()


class _Running:
    """A study while it runs: its rows so far, the processes that make more, and what failed."""

    def __init__(
        self,
        study: StudyConfig,
        base: Mapping[str, Any],
        results: Path,
        runs: Path,
        rows: dict[str, Row],
        progress: StudyProgress,
        make_worker: Callable[[Path], Slot],
    ) -> None:
        self.study, self.base, self.runs, self.rows, self.progress = study, base, runs, rows, progress
        self.make_worker = make_worker
        self.path = results / "rows.jsonl"
        self.lines = _lines(self.path) if rows else {}
        self.known = {_data_of(row["overrides"]): row["data_hash"] for row in rows.values()}
        """Content hashes of the data of the rows that were there."""
        self.loaded: dict[str, _Loaded] = {}
        """The data that are in the cache."""
        self.prepared = {name: self.folder_of(prepare_job(study, base, name)) for name in study.prepare}
        self.failed: dict[str, tuple[str, str]] = {}
        """By key, what a run is called and why it failed."""
        self.workers: list[Slot] = []
        """All of them, with a job or without."""
        self.jobs: dict[Slot, tuple[Job, Path]] = {}
        self.sources: dict[str, str] = {}
        """Hashes of the source files of custom modules, as they were when the first run with them started."""

    def until_done(self) -> dict[str, str]:
        """Run until nothing is missing or too much fails; returns what failed and why."""
        try:
            with self.progress.bar:
                while True:
                    todo, workers = self.plan(), self.progress.workers
                    hopeless = len(self.failed) > workers and not self.progress.ended_here
                    busy = self.failed.keys() | {job.key for job, _ in self.jobs.values()}
                    waiting = [] if hopeless else [job for job in todo.missing if job.key not in busy]
                    for job in waiting[: workers - len(self.jobs)]:
                        self.start(job)
                    self.tell(todo)
                    if not self.jobs:
                        self.say_imports()
                        return dict(self.failed.values())
                    self.finish(*self.next_to_end())
        finally:
            for worker in self.workers:
                worker.end()

    def say_imports(self) -> None:
        seconds = sum(worker.import_seconds for worker in self.workers)
        if seconds:
            text = f"workers: {seconds:.0f} CPU s to import what all runs need, in no row"
            self.progress.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def next_to_end(self) -> tuple[Slot, int]:
        """Wait for a job to end; returns its worker and its exit status."""
        while True:
            self.progress.tick()
            for worker in self.jobs:
                if (status := worker.poll()) is not None:
                    return worker, status
            time.sleep(POLL_SECONDS)

    def tell(self, todo: Plan) -> None:
        """Tell the progress what is done and what is left."""
        busy = self.failed.keys() | {job.key for job, _ in self.jobs.values()}
        planned = [(_kind(job), self.work_of(job)) for job in todo.missing if job.key not in busy]
        self.progress.plan(todo.done, todo.total, planned, todo.may_grow)

    def work_of(self, job: Job) -> Work:
        """What a run does; of data that have not been read yet, as with those that have."""
        config = run_config_of(self.study, self.base, job)
        training = from_mapping(TrainingConfig, config["training"], "training")
        data = self.loaded.get(_data_of(job.overrides), next(iter(self.loaded.values()), _Loaded(None, 0, 0)))
        if any(key.startswith("cache.") for key in job.overrides):  # a pass of the teacher over the training split
            steps = data.training_tokens / training.tokens_per_step
            return Work(0, 1, 0.0, FORWARD * steps)
        return Work.of(training, data.validation_tokens)

    def plan(self) -> Plan:
        return plan(self.study, self.base, self.rows, _at_hand(self.study, self.prepared))

    def folder_of(self, job: Job) -> Path:
        """The folder of a run, whose data are in the cache afterwards."""
        data = _data_of(job.overrides)
        if data not in self.loaded:
            self.loaded[data] = _load(run_config_of(self.study, self.base, job), self.path, self.known.get(data))
        return _folder(self.study, self.base, job, self.loaded[data].content_hash, self.runs)

    def start(self, job: Job) -> None:
        folder = self.folder_of(job)
        data_hash = self.loaded[_data_of(job.overrides)].content_hash
        sources = _describe(self.study, self.base, job, folder, data_hash, self.prepared)
        for path, digest in sources.items():
            if self.sources.setdefault(path, digest) != digest:
                raise InputError(
                    f"{path}: its source file has changed while the study ran; put it back, or choose another "
                    "results_dir, and start the study again"
                )
        idle = [worker for worker in self.workers if worker not in self.jobs]
        worker = idle[0] if idle else self.make_worker(folder / "log.txt")
        if not idle:
            self.workers.append(worker)
        self.jobs[worker] = (job, folder)
        self.progress.started(job.key, _kind(job), self.shown(job), self.work_of(job), folder / "run" / "metrics.csv")
        worker.begin(folder)

    def finish(self, worker: Slot, status: int) -> None:
        """Keep the rows of a job that has ended, or why it failed."""
        job, folder = self.jobs.pop(worker)
        self.progress.ended(job.key, worker.ready_at)
        if not worker.takes_more:
            worker.end()
            self.workers.remove(worker)
        console = self.progress.bar.console
        if status:
            shown, reason = self.shown(job), _reason(status, folder / "log.txt")
            self.failed[job.key] = (shown, reason)
            console.print(f"failed: {shown}: {reason}", markup=False, soft_wrap=True)
            return
        new = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
        again = job.key in self.rows and _tell_again(console, self.rows[job.key], new[0])
        # variants are compared with the very run whose checkpoint they evaluate
        replaces = again and job.purpose == "measure"
        made = {row_key(row): row for row in new if replaces or row_key(row) not in self.rows}
        self.rows |= made
        self.lines |= {key: write_row(row) for key, row in made.items()}
        write_atomically(self.path, "".join(f"{line}\n" for line in self.lines.values()))
        self.tell(self.plan())
        self.progress.say_result(self.shown(job), self.rows[job.key], self.study.metric)

    def shown(self, job: Job) -> str:
        return shown_key(self.study, dataclasses.asdict(job))


class _Loaded(NamedTuple):
    """Data that are in the cache."""

    content_hash: str | None
    training_tokens: int
    validation_tokens: int


def _load(config: Mapping[str, Any], rows: Path, known: str | None) -> _Loaded:
    """Fill the data cache before the workers need it, and see whether these are the data of the rows."""
    data = load_data(from_mapping(DataConfig, config["data"], "data"))
    found: str | None = data.facts.get("content_hash")
    if known is not None:
        of_python = f"content hash of the data (stdlib and packages are Python's, here {platform.python_version()})"
        what = of_python if config["data"]["source"] in ("stdlib", "packages") else "content hash of the data"
        _require_equal(rows, {what: known}, {what: found})
    if data.task is not None:
        seq_len = config["training"]["seq_len"]
        return _Loaded(found, 0, data.task.test_size(seq_len) * seq_len)
    return _Loaded(found, len(data.train.tokens), len(data.validation.tokens))


def _folder(study: StudyConfig, base: Mapping[str, Any], job: Job, data_hash: str | None, runs: Path) -> Path:
    """Folder of a run. Another configuration, another teacher or other data have another folder."""
    place = re.sub(r"[^\w.=-]+", "_", f"{job.arm} {job.axis or ''} {job.purpose} seed{job.seed} x{job.factor:g}")
    digest = hashlib.sha256(f"{fingerprint(study, base, job)} {data_hash}".encode()).hexdigest()
    return runs / f"{place}-{digest[:8]}"


def _result(study: StudyConfig, name: str, folder: Path) -> Path:
    """What prepared:NAME stands for, of the folder that prepares it."""
    is_cache = study.prepare[name].cache is not None
    return folder / "targets" if is_cache else folder / "run" / "checkpoints" / "last.ckpt"


def _at_hand(study: StudyConfig, prepared: Mapping[str, Path]) -> list[str]:
    """What is there and whole: a killed preparation leaves a checkpoint or a cache too, but no rows.json."""
    return [
        name
        for name, folder in prepared.items()
        if (folder / "rows.json").is_file() and _result(study, name, folder).exists()
    ]


def _describe(
    study: StudyConfig,
    base: Mapping[str, Any],
    job: Job,
    folder: Path,
    data_hash: str | None,
    prepared: Mapping[str, Path],
) -> dict[str, str]:
    """Write job.json into the folder of a run; returns the hashes of its custom modules' source files."""
    folder.mkdir(exist_ok=True)
    (folder / "rows.json").unlink(missing_ok=True)
    config = run_config_of(study, base, job)
    paths = {name: _result(study, name, place).absolute() for name, place in prepared.items()}
    digest = job_hash(study, base, job)
    row = {"format": FORMAT, "study": config["name"], **dataclasses.asdict(job)}
    row |= {"config_hash": digest, "data_hash": data_hash}
    if job.purpose != "prepare" and (mark := study.mark_of(job.arm)):
        row["mark"] = mark
    written = sources_of(config)
    if written:
        row["sources"] = written
    threads = {"trainer.threads": 1}
    variants = {n: v.overrides for n, v in study.variants.items() if v.arm == job.arm and job.purpose == "measure"}
    description = {
        "row": row,
        "config": resolve(apply_overrides(config, threads, "trainer"), paths),
        "metric": study.metric,
        "evaluations": study.evaluations,
        "evaluation_options": study.evaluation_options,
        "variants": variants,
        "cache": {
            key.removeprefix("cache."): resolve(value, paths)
            for key, value in job.overrides.items()
            if key.startswith("cache.")
        },
    }
    write_json(folder / "job.json", description)
    return written


def _tell_again(console: Console, row: Row, again: Row) -> bool:
    """Whether a run differs from its row: another machine may round otherwise."""
    prepares = row["purpose"] == "prepare"
    numbers = [
        f"{name} {value:.6g} now, {row['metrics'][name]:.6g} there"
        for name in sorted(row["metrics"].keys() & again["metrics"].keys())
        if name.startswith("validation/") and (value := again["metrics"][name]) != row["metrics"][name]
    ]
    kept = ", which stays" if prepares else "; it and its variants are replaced"
    text = f"differs from its row ({'; '.join(numbers)}){kept}" if numbers else "as in its row"
    what = f"prepared again: {row['arm']}" if prepares else f"run again for its variants: {row_key(row)}"
    console.print(f"{what}: {text}", markup=False, highlight=False, soft_wrap=True)
    return bool(numbers)


def _reason(returncode: int, log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    last = f"killed by signal {-returncode}" if returncode < 0 or not lines else lines[-1].removeprefix("error: ")
    return f"{last} (see {log})"


def _data_of(overrides: Mapping[str, Any]) -> str:
    """What tells runs of one study on different data apart."""
    return json.dumps({key: value for key, value in overrides.items() if key.startswith("data.")}, sort_keys=True)


def _kind(job: Job) -> str:
    """What runs that take equally long have in common."""
    return f"{job.arm} {job.axis or ''}"


def _require_equal(path: Path | str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    advice = "nothing was changed; choose another results_dir, or put the config back"
    require_same(f"{path}: results of another configuration, {advice}", found, wanted)


@contextlib.contextmanager
def _locked(folder: Path, key: str, value: Path) -> Iterator[None]:
    """Make a folder that the key of this value asks for, and keep other processes from it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{key}={str(value)!r}: cannot be written ({reason(error)})") from error
    with lock(folder, f"{folder}: another process is running this study"):
        yield
