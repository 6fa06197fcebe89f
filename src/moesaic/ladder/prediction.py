"""Predictions on record: written before a run, kept beside its rows, compared with what came of it.

A prediction is a file prediction-RUNG.json in the results directory. It holds a hash of the rows that it was made from
and the commit, so that nobody has to believe that it was there first.
"""

import dataclasses
import datetime
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moesaic import __version__
from moesaic.checkout import git
from moesaic.config import from_mapping, to_mapping
from moesaic.errors import InputError
from moesaic.files import write_json
from moesaic.formats import translate_run
from moesaic.ladder.bootstrap import Estimate, RefutedLaw, held_out, predict, sample_laws
from moesaic.ladder.config import LadderConfig, name_of
from moesaic.ladder.laws import read_runs
from moesaic.ladder.points import Cell, Points, cells_of, points_of
from moesaic.ladder.rungs import AXIS, Rung, Rungs
from moesaic.reading import read_json, read_yaml, reading
from moesaic.studies.config import StudyConfig
from moesaic.studies.jobs import Row, read_row, row_key
from moesaic.studies.runner import read_rows

__all__ = [
    "LADDER",
    "Ladder",
    "Outcome",
    "Predicted",
    "Prediction",
    "outcomes",
    "path_of",
    "read_ladder",
    "read_prediction",
    "record",
    "require_on_record",
    "rows_hash",
    "with_recorded",
]

LADDER = "ladder.yaml"
"""What a results directory has beside the files of a study: the ladder that its rows are of."""


@dataclasses.dataclass(frozen=True)
class _Stored:
    """What ladder.yaml holds."""

    ladder: LadderConfig
    vocab_size: int


@dataclasses.dataclass(frozen=True)
class Ladder:
    """A ladder as its results directory has it."""

    config: LadderConfig
    rungs: Rungs
    study: StudyConfig
    base: dict[str, Any]
    rows: dict[str, Row]

    @property
    def cells(self) -> list[Cell]:
        return cells_of(self.config, self.study, self.rows)


def read_ladder(results: Path) -> Ladder:
    """Read a results directory of moesaic ladder.

    Raises:
        InputError: it is none, or damaged.
    """
    for name in (LADDER, "config.yaml", "rows.jsonl"):
        if not (results / name).is_file():
            raise InputError(f"{results}: it has no {name}; must be a results directory of moesaic ladder")
    with reading(results / LADDER):
        stored = from_mapping(_Stored, read_yaml(results / LADDER))
    with reading(results / "config.yaml"):
        base = translate_run(read_yaml(results / "config.yaml"))
        base.pop("study", None)
    rungs = Rungs(stored.ladder, base, stored.vocab_size)
    study, base = rungs.study()
    return Ladder(stored.ladder, rungs, study, base, read_rows(results, study, base))


@dataclasses.dataclass(frozen=True)
class Predicted:
    """What is on record for an arm."""

    flops: float
    """Active, of its training."""
    law: Estimate
    """Bits per byte by the law, and the interval of what the law says."""
    expected: Estimate
    """The same number, and the interval of the mean over as many seeds as the ladder has: this is what counts."""
    other_law: Estimate | None
    """By the law with the other kind of asymptote, for comparison; None where it cannot be fitted."""
    expected_of_held_out: Estimate
    """What the law of the smaller rungs said of the largest one."""
    measured_of_held_out: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A file prediction-RUNG.json."""

    ladder: str
    at: float
    rung: Rung
    asymptote: float | None
    """Bits per byte; null: fitted."""
    fitted_rungs: tuple[str, ...]
    ratio: float
    """FLOPs of the prediction over those of the largest fitted rung."""
    seeds: tuple[int, ...]
    arms: dict[str, Predicted]
    rows_sha256: str
    """Hash of the lines of rows.jsonl that were used, see `rows_hash`."""
    data_hash: str | None
    date: str
    commit: str | None
    uncommitted_changes: bool | None
    version: str


def path_of(results: Path, flops: float) -> Path:
    """Where the prediction of a rung is kept."""
    return results / f"prediction-{name_of(flops)}.json"


def rows_hash(results: Path, rows: Iterable[Row]) -> str:
    """SHA-256 of the lines that these rows have in rows.jsonl, in the order of their keys."""
    keys = {row_key(row) for row in rows}
    text = (results / "rows.jsonl").read_text(encoding="utf-8")
    lines = {row_key(read_row(line)): line for line in text.splitlines()}
    used = "".join(f"{line}\n" for key, line in sorted(lines.items()) if key in keys)
    return hashlib.sha256(used.encode()).hexdigest()


def record(results: Path, at: float, *, free: bool = False, least: float = 0.0) -> Prediction:
    """Predict the bits per byte of every arm at a larger rung, and write it down.

    Args:
        at: active FLOPs of the baseline's training.
        free: fit the asymptote; else it is that of the ladder.
        least: use only rungs of so many FLOPs or more.

    Raises:
        InputError: no ladder, a prediction or rows that are there already, runs that are missing or diverged, too few
            rungs, or a law that its own largest rung refutes.
    """
    ladder = read_ladder(results)
    path, config = path_of(results, at), ladder.config
    if path.exists():
        raise InputError(f"{path}: there is a prediction already, which must stay; remove it by hand if it is wrong")
    if at <= config.rungs[-1]:
        raise InputError(f"at={name_of(at)}: must be above the largest rung, {name_of(config.rungs[-1])} FLOPs")
    if any(row["axis"] == f"{AXIS}={name_of(at)}" for row in ladder.rows.values()):
        raise InputError(
            f"at={name_of(at)}: {results / 'rows.jsonl'} has runs of this rung; a prediction must be made before them"
        )
    rung, cells = ladder.rungs.at(at), ladder.cells
    arms, used = {}, list[Row]()
    for arm in config.arms:
        if arm != config.baseline and any(cell.out for cell in cells if cell.arm == arm):
            continue  # what was dropped has no law, and no run of the target
        points = points_of(config, cells, arm, least)
        flops = ladder.rungs.flops_per_token(arm, rung.dim) * rung.tokens
        arms[arm] = _predict(config, points, flops, free, results)
        used += points.rows
    fitted = config.fitted(least)
    changes = git("status", "--porcelain", "--", "src", "conf")
    prediction = Prediction(
        ladder=ladder.base["name"],
        at=at,
        rung=rung,
        asymptote=None if free else config.asymptote,
        fitted_rungs=fitted,
        ratio=at / config.rungs[-1],
        seeds=config.seeds,
        arms=arms,
        rows_sha256=rows_hash(results, used),
        data_hash=used[0]["data_hash"],
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        commit=git("rev-parse", "HEAD"),
        uncommitted_changes=None if changes is None else bool(changes),
        version=__version__,
    )
    write_json(path, to_mapping(prediction))
    return prediction


def _predict(config: LadderConfig, points: Points, flops: float, free: bool, results: Path) -> Predicted:
    asymptotes = (None, config.asymptote) if free else (config.asymptote, None)
    try:
        held = held_out(points.flops, points.loss, asymptote=asymptotes[0])
        held.require()
        samples = sample_laws(read_runs(points.flops, points.loss), asymptotes[0])
    except InputError as error:
        ways = "least=0 uses all rungs, and asymptote=free|pinned another law"
        if isinstance(error, RefutedLaw):
            ways = (
                "least=FLOPs uses only rungs from there on, asymptote=free|pinned another law, and ladder.rungs can "
                "have a larger one"
            )
        raise InputError(f"{results}: {points.arm}: {error}. {ways}") from error
    try:
        other = predict(points.flops, points.loss, flops, asymptote=asymptotes[1])
    except InputError:
        other = None
    scatter = samples.noise.means([len(config.seeds)], np.random.default_rng(SEED))[:, 0]
    expected = Estimate.of(samples.law(flops), np.exp(samples.log_loss(flops) + scatter))
    return Predicted(flops, samples.at(flops), expected, other, held.expected, held.measured)


SEED = 1
"""Seed of what the runs to come add to the interval."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A prediction beside what was measured."""

    prediction: Prediction
    arm: str
    measured: float
    """Mean bits per byte over the seeds."""
    seeds: int
    rows_unchanged: bool
    """Whether the rows that it was made from are those of today."""

    @property
    def inside(self) -> bool:
        """Whether the measured mean is in the interval."""
        predicted = self.prediction.arms[self.arm].expected
        return predicted.low <= self.measured <= predicted.high

    @property
    def error(self) -> float:
        """Measured over predicted, less 1."""
        return self.measured / self.prediction.arms[self.arm].expected.value - 1


def read_prediction(path: Path) -> Prediction:
    """Read a prediction.

    Raises:
        InputError: damaged.
    """
    with reading(path):
        return from_mapping(Prediction, read_json(path))


def outcomes(results: Path, config: LadderConfig, cells: Sequence[Cell], rows: Mapping[str, Row]) -> list[Outcome]:
    """Every prediction whose rung has finished runs, arm by arm."""
    found = []
    for flops in config.targets:
        if not path_of(results, flops).exists():
            continue
        prediction = read_prediction(path_of(results, flops))
        used = [
            row
            for row in rows.values()
            if row["purpose"] == "measure"
            and row["arm"] in prediction.arms
            and row["axis"] in {f"{AXIS}={name}" for name in prediction.fitted_rungs}
            and row["seed"] in prediction.seeds
        ]
        unchanged = rows_hash(results, used) == prediction.rows_sha256
        for cell in cells:
            if cell.rung == prediction.rung.name and cell.finished and cell.arm in prediction.arms:
                score = cell.score
                found.append(Outcome(prediction, cell.arm, score.mean, score.n, unchanged))
    return found


def with_recorded(config: LadderConfig, results: Path) -> LadderConfig:
    """The ladder with every target that is on record and has rows, so that no report leaves an outcome out."""
    path = results / "rows.jsonl"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    recorded = [read_prediction(each).at for each in sorted(results.glob("prediction-*.json"))]
    begun = {at for at in recorded if f'"{AXIS}={name_of(at)}"' in text}
    return dataclasses.replace(config, targets=tuple(sorted({*config.targets, *begun} - {*config.rungs})))


def require_on_record(results: Path, config: LadderConfig) -> None:
    """Refuse a target that has no prediction.

    Raises:
        InputError: it says how to make one.
    """
    for flops in config.targets:
        if not path_of(results, flops).exists():
            raise InputError(
                f"ladder.targets: {name_of(flops)} has no prediction on record; must be predicted first "
                f"(moesaic predict {results} at={name_of(flops)}), or be one of ladder.rungs"
            )
