"""What a study is, which runs it consists of, and which of them are missing: pure functions of a config and of rows."""

import copy
import dataclasses
import difflib
import hashlib
import importlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from moesaic.config import flatten, from_mapping, to_mapping
from moesaic.distillation import TargetFormat
from moesaic.distillation.config import teacher_mapping
from moesaic.errors import InputError
from moesaic.models import DecoderConfig
from moesaic.training.config import RunConfig

__all__ = [
    "AxisConfig",
    "CacheConfig",
    "Cell",
    "Job",
    "Plan",
    "PrepareConfig",
    "Probe",
    "Row",
    "StudyConfig",
    "TuneConfig",
    "Tuning",
    "VariantConfig",
    "apply_overrides",
    "canonical",
    "config_hash",
    "fingerprint",
    "import_probe",
    "job_hash",
    "job_of",
    "needs",
    "plan",
    "prepare_job",
    "prepared_names",
    "resolve",
    "row_key",
    "run_config_of",
    "score",
    "tuning",
    "validate",
    "variant_options",
]

Row = dict[str, Any]
"""One line of rows.jsonl: a finished or diverged run, see `moesaic.studies.worker`."""

Overrides = dict[str, Any]
"""Dotted keys of the run config and their values."""

Probe = Callable[[Path, Mapping[str, Any], Mapping[str, Any]], Mapping[str, float]]
"""(checkpoint, run config, study.probe_options) -> numbers that join the metrics of the row."""

PREPARED = "prepared:"
PROBE_OPTIONS = "probe_options."

EXTENSIONS = 2
"""How often a grid of learning rates grows by one factor when the best one is at its edge; the same for every arm."""

NOT_COMPARED = frozenset(
    {"name", "output_dir", "run_dir", "resume", "trainer.threads", "trainer.keep_freed_memory"}
    | {"data.cache_dir", "data.path"}
)
"""Keys that say where a run happens, not what it computes (data are compared by their content hash)."""


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """The learning rates of each cell are multiplied by each factor on a seed of its own; the best one is measured."""

    seed: int
    factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    keys: tuple[str, ...] = ("optimizer.learning_rate", "optimizer.muon_learning_rate")

    def __post_init__(self) -> None:
        if len(set(self.factors)) < 2 or len(set(self.factors)) < len(self.factors) or min(self.factors) <= 0:
            raise ValueError(f"factors={list(self.factors)}: allowed are two or more different numbers > 0")
        if not self.keys:
            raise ValueError("keys=[]: name at least one learning rate")


@dataclasses.dataclass(frozen=True)
class AxisConfig:
    """A second dimension: every arm is run at every value, except arms that the axis does not change."""

    values: dict[str, Overrides]
    fixed: tuple[str, ...] = ()  # arms that are run once, without the axis, and compared at each of its values


@dataclasses.dataclass(frozen=True)
class VariantConfig:
    """The checkpoints of an arm, evaluated with another model config or other options of probes; nothing is trained."""

    arm: str
    overrides: Overrides  # model.... and probe_options....

    @property
    def model(self) -> Overrides:
        return {key: value for key, value in self.overrides.items() if not key.startswith(PROBE_OPTIONS)}

    @property
    def options(self) -> Overrides:
        return {key: value for key, value in self.overrides.items() if key.startswith(PROBE_OPTIONS)}


@dataclasses.dataclass(frozen=True)
class CacheConfig(TargetFormat):
    """A teacher's targets for the whole training split; keys as in conf/cache_targets.yaml."""

    teacher: str = ""  # name of a prepared run; windows and data are those of the study's base config

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.teacher:
            raise ValueError("teacher='': name a prepared run")


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """What is made once before the arms that name it as the value prepared:NAME; one of the two.

    A run of the base config with overrides on the seed of tuning, stands for its checkpoint, a cache for its directory.
    """

    train: Overrides | None = None
    cache: CacheConfig | None = None

    def __post_init__(self) -> None:
        if (self.train is None) == (self.cache is None):
            raise ValueError("train, cache: give one of the two")


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """The `study` block of an experiment. The rest of the experiment is the run that all arms start from."""

    question: str
    equal: str  # what is held equal, in words
    baseline: str  # the arm that all others are compared with
    arms: dict[str, Overrides]
    seeds: tuple[int, ...]
    metric: str = "validation/bits_per_byte"  # of metrics.json or of a probe
    higher_is_better: bool = False
    also: tuple[str, ...] = ()  # more metrics for the table; of a pattern with * the mean over what it matches
    tune: TuneConfig | None = None  # null: every arm at the learning rates of the config
    prepare: dict[str, PrepareConfig] = dataclasses.field(default_factory=dict)  # in this order
    axes: dict[str, AxisConfig] = dataclasses.field(default_factory=dict)
    variants: dict[str, VariantConfig] = dataclasses.field(default_factory=dict)
    probes: tuple[str, ...] = ()  # dotted paths of `Probe` functions
    probe_options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        known = ", ".join(self.arms)
        if self.baseline not in self.arms:
            raise ValueError(f"baseline={self.baseline!r}: unknown arm; allowed: {known}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds={list(self.seeds)}: allowed are one or more different integers >= 0")
        if self.tune is not None and self.tune.seed < 0:
            raise ValueError(f"tune.seed={self.tune.seed}: allowed are integers >= 0")
        if self.tune is not None and self.tune.seed in self.seeds:
            raise ValueError(f"tune.seed={self.tune.seed}: it must not be one of seeds={list(self.seeds)}")
        for name, axis in self.axes.items():
            for arm in axis.fixed:
                if arm not in self.arms:
                    raise ValueError(f"axes.{name}.fixed: unknown arm {arm!r}; allowed: {known}")
        for name, variant in self.variants.items():
            if variant.arm not in self.arms:
                raise ValueError(f"variants.{name}.arm={variant.arm!r}: unknown arm; allowed: {known}")
            if name in self.arms:
                raise ValueError(f"variants.{name}: an arm has this name already")
            for key in variant.overrides:
                if not key.startswith(("model.", PROBE_OPTIONS)):
                    raise ValueError(
                        f"variants.{name}.overrides.{key}: allowed are keys of the model (model....) and of the "
                        "probes' options (probe_options....)"
                    )

        trained: list[str] = []
        for name, step in self.prepare.items():
            if step.cache is None:
                trained.append(name)
            elif step.cache.teacher not in trained:
                raise ValueError(
                    f"prepare.{name}.cache.teacher={step.cache.teacher!r}: allowed are the prepared runs above it: "
                    + (", ".join(trained) or "none")
                )

    @property
    def points(self) -> list[tuple[str, str] | None]:
        """(axis, value) of every place at which arms are compared; [None] without axes."""
        return [(name, value) for name, axis in self.axes.items() for value in axis.values] or [None]

    def cell(self, arm: str, point: tuple[str, str] | None) -> "Cell":
        """Where the runs of an arm (not of a variant) at a point are kept."""
        if point is None or arm in self.axes[point[0]].fixed:
            return Cell(arm, None, self.arms[arm])
        axis, value = point
        return Cell(arm, f"{axis}={value}", {**self.axes[axis].values[value], **self.arms[arm]})

    def result_cell(self, name: str, point: tuple[str, str] | None) -> "Cell":
        """As `cell`, of an arm or of the arm that a variant evaluates."""
        return self.cell(self.variants[name].arm if name in self.variants else name, point)

    @property
    def cells(self) -> list["Cell"]:
        cells = [self.cell(arm, point) for point in self.points for arm in self.arms]
        return list({(cell.arm, cell.axis): cell for cell in cells}.values())


@dataclasses.dataclass(frozen=True)
class Cell:
    """An arm at one value of an axis: what learning rates are tuned for. Where both set a key, the arm wins."""

    arm: str
    axis: str | None  # "experts=4"
    overrides: Overrides


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How far the learning rate of a cell is known."""

    factors: tuple[float, ...]  # tried, or to be tried
    best: float | None  # None: not all of them have a row yet
    at_edge: bool = False  # the best one is the smallest or the largest, and the grid is not extended further


@dataclasses.dataclass(frozen=True)
class Job:
    """One training run, or a cache."""

    arm: str  # or name of what is prepared
    axis: str | None
    purpose: Literal["prepare", "tune", "measure"]
    seed: int
    factor: float
    overrides: Overrides  # on the study's base config, seed and learning rates included; of a cache its settings

    @property
    def key(self) -> str:
        return row_key(dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where a study stands."""

    missing: list[Job]  # what can start now: preparations first, then runs for tuning
    done: int
    total: int  # as far as known: a learning rate at the edge of its grid adds some


def row_key(row: Mapping[str, Any]) -> str:
    """What a run is called and found by; no two rows of a study share it."""
    place = f"{row['arm']}, {row['axis']}" if row["axis"] else str(row["arm"])
    return f"{place}, {row['purpose']}, seed {row['seed']}, learning rate x{row['factor']:g}"


def apply_overrides(
    config: Mapping[str, Any], overrides: Mapping[str, Any], where: str, what: str = "the run config"
) -> dict[str, Any]:
    """A copy of `config` with the values at the dotted keys replaced.

    Raises:
        InputError: a key that the config (in words: `what`) does not have; it names `where`.
    """
    changed = copy.deepcopy(dict(config))
    for key, value in overrides.items():
        *parents, last = key.split(".")
        section: Any = changed
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if not isinstance(section, dict) or last not in section:
            close = difflib.get_close_matches(key, flatten(config), n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise InputError(f"{where}.{key}: {what} has no such key{hint}")
        section[last] = copy.deepcopy(value)
    return changed


def variant_options(options: Mapping[str, Any], variant: VariantConfig, where: str) -> dict[str, Any]:
    """`study.probe_options` as a variant has them.

    Raises:
        InputError: an override of an option that the study does not give; it names `where`.
    """
    whole = apply_overrides({"probe_options": dict(options)}, variant.options, where, "the study")
    changed: dict[str, Any] = whole["probe_options"]
    return changed


def canonical(config: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides what a run computes, by dotted key, with today's defaults filled in.

    Raises:
        InputError: the config is not one of a run.
    """
    run_config = from_mapping(RunConfig, config)
    model = {**run_config.model, "vocab_size": run_config.model.get("vocab_size") or 1}  # 1: as the data say
    whole = {**to_mapping(run_config), "model": to_mapping(from_mapping(DecoderConfig, model, "model"))}
    return {
        key: value for key, value in flatten(whole).items() if key not in NOT_COMPARED and not key.startswith("sample.")
    }


def config_hash(config: Mapping[str, Any]) -> str:
    return _hash(canonical(config))


def _hash(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def prepared_names(config: Any) -> list[str]:
    """The names that stand as prepared:NAME among the values of a config, in order."""
    if isinstance(config, str):
        return [config.removeprefix(PREPARED)] if config.startswith(PREPARED) else []
    values = config.values() if isinstance(config, Mapping) else config if isinstance(config, (list, tuple)) else ()
    return list(dict.fromkeys(name for value in values for name in prepared_names(value)))


def resolve(config: Any, paths: Mapping[str, Path]) -> Any:
    """A copy of a config with the path of what was prepared for every prepared:NAME."""
    if isinstance(config, str):
        return str(paths[config.removeprefix(PREPARED)]) if config.startswith(PREPARED) else config
    if isinstance(config, Mapping):
        return {key: resolve(value, paths) for key, value in config.items()}
    return [resolve(value, paths) for value in config] if isinstance(config, (list, tuple)) else config


def prepare_job(study: StudyConfig, base: Mapping[str, Any], name: str) -> Job:
    """What prepares `name`: on the seed of tuning, which no measured run has."""
    step, seed = study.prepare[name], base.get("seed", 0) if study.tune is None else study.tune.seed
    overrides = {**step.train, "seed": seed} if step.train is not None else {}
    if step.cache is not None:
        overrides = {f"cache.{key}": value for key, value in step.cache.settings().items()}
        overrides["cache.teacher"] = f"{PREPARED}{step.cache.teacher}"
    return Job(name, None, "prepare", seed, 1.0, overrides)


def run_config_of(study: StudyConfig, base: Mapping[str, Any], job: Job) -> dict[str, Any]:
    """The config of a run with prepared:NAME in it; of a cache the base config, which has its data and windows."""
    if job.purpose != "prepare":
        return apply_overrides(base, job.overrides, f"study.arms.{job.arm}")
    is_run = study.prepare[job.arm].train is not None
    return apply_overrides(base, job.overrides if is_run else {}, f"study.prepare.{job.arm}.train")


def needs(study: StudyConfig, base: Mapping[str, Any], job: Job) -> list[str]:
    """Names of what has to be prepared before a job starts."""
    return prepared_names([run_config_of(study, base, job), job.overrides])


def job_hash(study: StudyConfig, base: Mapping[str, Any], job: Job) -> str:
    """`config_hash`, and that of a cache."""
    config = run_config_of(study, base, job)
    settings = {key: value for key, value in job.overrides.items() if key.startswith("cache.")}
    return _hash({**canonical(config), **settings}) if settings else config_hash(config)


def fingerprint(study: StudyConfig, base: Mapping[str, Any], job: Job) -> str:
    """What decides what a job computes, data aside: `job_hash`, and those of all that it needs prepared."""
    below = [fingerprint(study, base, prepare_job(study, base, name)) for name in needs(study, base, job)]
    digest = job_hash(study, base, job)
    return " ".join([digest, *below])


def import_probe(path: str) -> Probe:
    """The function at a dotted path.

    Raises:
        InputError: there is none.
    """
    module, _, name = path.rpartition(".")
    try:
        probe = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"study.probes: {path!r} cannot be imported ({error})") from error
    if not callable(probe):
        raise InputError(f"study.probes: {path!r} is not a function")
    return probe


def validate(study: StudyConfig, base: Mapping[str, Any]) -> None:
    """Refuse before the first run what would fail in any of them.

    Raises:
        InputError: an override, a resulting config or a probe is bad; the arm or variant is named.
    """
    for probe in study.probes:
        import_probe(probe)
    for step in study.prepare:
        job = prepare_job(study, base, step)
        at = f"study.prepare.{step}"
        config = run_config_of(study, base, job)
        _require_prepared(study, at, config, list(study.prepare)[: list(study.prepare).index(step)])
        _named(at, config)
    for name, variant in study.variants.items():
        variant_options(study.probe_options, variant, f"study.variants.{name}.overrides")
    for name, axis in study.axes.items():
        for value, overrides in axis.values.items():
            apply_overrides(base, overrides, f"study.axes.{name}.values.{value}")
    for cell in study.cells:
        apply_overrides(base, study.arms[cell.arm], f"study.arms.{cell.arm}")
        at = f"study.arms.{cell.arm}" + (f" at {cell.axis}" if cell.axis else "")
        config = apply_overrides(base, job_of(study, base, cell, "measure", 0, 1.0).overrides, at)
        _require_prepared(study, at, config, list(study.prepare))
        _named(at, config)
        for name, variant in study.variants.items():
            if variant.arm == cell.arm:
                where = f"study.variants.{name}"
                _named(where, apply_overrides(config, variant.model, f"{where}.overrides"))


def _require_prepared(study: StudyConfig, where: str, config: Mapping[str, Any], known: Collection[str]) -> None:
    for key, value in flatten(config).items():
        for name in prepared_names(value):
            caches = key == "distillation.cache"
            fitting = [other for other in known if (study.prepare[other].cache is not None) == caches]
            if name not in fitting:
                allowed = ", ".join(f"{PREPARED}{other}" for other in fitting) or "nothing is prepared for it"
                raise InputError(f"{where}: {key}={PREPARED + name!r}: allowed here: {allowed}")


def _named(where: str, config: Mapping[str, Any]) -> None:
    try:
        canonical(config)
        if overrides := (config.get("distillation") or {}).get("teacher_model"):
            teacher = teacher_mapping({**config["model"], "vocab_size": 1}, overrides)
            from_mapping(DecoderConfig, teacher, "distillation.teacher_model")
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def job_of(
    study: StudyConfig,
    base: Mapping[str, Any],
    cell: Cell,
    purpose: Literal["tune", "measure"],
    seed: int,
    factor: float,
) -> Job:
    """The run of a cell with this seed and this factor on its learning rates."""
    config = apply_overrides(base, cell.overrides, f"study.arms.{cell.arm}")
    flat = flatten(config)
    rates: Overrides = {}
    for key in study.tune.keys if study.tune is not None else ():
        if not isinstance(flat.get(key), (int, float)):
            raise InputError(f"study.tune.keys: {key!r} is no number of the run config")
        rates[key] = flat[key] * factor
    return Job(cell.arm, cell.axis, purpose, seed, factor, {**cell.overrides, **rates, "seed": seed})


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
        # where the metric is saturated, the middle of what is best; where everything diverged, the smallest
        best = equal[len(equal) // 2] if math.isfinite(min(scores)) else 0
        at_edge = best in (0, len(factors) - 1)
        if not at_edge or extensions == EXTENSIONS:
            return Tuning(tuple(factors), factors[best], at_edge)
        if best == 0:
            factors.insert(0, factors[0] ** 2 / factors[1])
        else:
            factors.append(factors[-1] ** 2 / factors[-2])
        extensions += 1


def plan(study: StudyConfig, base: Mapping[str, Any], rows: Mapping[str, Row], prepared: Collection[str] = ()) -> Plan:
    """What is missing. A measured run is missing as long as any of its variants is; tuning decides what is measured.

    Args:
        prepared: names of `study.prepare` whose results are at hand. Others are prepared if something missing needs
            them, a second time if they have a row.
    """
    jobs: dict[str, list[Job]] = {"tune": [], "measure": []}
    unknown = 0
    for cell in study.cells:
        tuned = tuning(study, cell, rows)
        if study.tune is not None:
            jobs["tune"] += [job_of(study, base, cell, "tune", study.tune.seed, factor) for factor in tuned.factors]
        if tuned.best is None:
            unknown += len(study.seeds)
        else:
            jobs["measure"] += [job_of(study, base, cell, "measure", seed, tuned.best) for seed in study.seeds]
    known = jobs["tune"] + jobs["measure"]
    missing = [job for job in known if not all(key in rows for key in _keys(study, job, rows))]
    lacking: dict[str, Job] = {}
    for job in missing:
        _add_lacking(study, base, job, rows, prepared, lacking)
    ready = [job for job in (*lacking.values(), *missing) if not lacking.keys() & needs(study, base, job)]
    preparations = [prepare_job(study, base, name) for name in study.prepare]
    there = sum(job.key in rows and job.arm not in lacking for job in preparations)
    done = len(known) - len(missing) + there
    return Plan(ready, done, len(known) + unknown + there + len(lacking))


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
