"""The runs of a study: what each computes, what it needs prepared, and what is refused before the first one."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal, cast

from moesaic import imports
from moesaic.config import flatten, from_mapping, to_mapping
from moesaic.distillation.config import teacher_mapping
from moesaic.errors import InputError
from moesaic.layers import Fp8Recipe
from moesaic.models import DecoderConfig
from moesaic.models.custom import source_hashes
from moesaic.overrides import apply_overrides
from moesaic.studies.config import PREPARED, Cell, Overrides, StudyConfig, VariantConfig
from moesaic.studies.defining import defining
from moesaic.training.config import RunConfig
from moesaic.training.launched import require_one_process
from moesaic.training.memory import require_memory_of_run
from moesaic.training.transfer import TransferBase

__all__ = [
    "Evaluation",
    "Job",
    "Row",
    "canonical",
    "config_hash",
    "fingerprint",
    "import_evaluation",
    "job_hash",
    "job_of",
    "needs",
    "prepare_job",
    "prepared_names",
    "read_row",
    "resolve",
    "row_key",
    "run_config_of",
    "shown_key",
    "sources_of",
    "validate",
    "variant_options",
    "write_row",
]


Row = dict[str, Any]
"""One line of rows.jsonl: a finished or diverged run, see `moesaic.studies.worker`."""

Evaluation = Callable[[Path, Mapping[str, Any], Mapping[str, Any]], Mapping[str, float]]
"""(checkpoint, run config, study.evaluation_options) -> numbers that join the metrics of the row."""


YOUNGER: dict[str, Any] = {
    "training.score_windows": None,
    "model.parametrization": "standard",
    "model.base": None,
    "transfer.proxy": False,
    "model.moe.identity_experts": 0,
    "model.moe.skip_experts": 0,
    "model.moe.latent_dim": None,
    "model.moe.latent_norm": False,
    "model.moe.experts_norm_eps": 1e-5,
    "model.attention.clip_qkv": None,
    "upcycle": None,
    "fusion": None,
    "data.captions": None,
    "model.attention.mla": None,
    "model.first_dense_layers": 0,
    "model.attention.window": None,
    "model.attention.sinks": False,
    "model.moe.swiglu_alpha": 1.702,
    "model.moe.swiglu_limit": 7.0,
    **{f"transfer.base.{key}": value for key, value in to_mapping(TransferBase()).items()},
    **{f"trainer.fp8.{key}": value for key, value in to_mapping(Fp8Recipe()).items()},
}
"""Keys that are younger than rows, and the value that was meant before: with it the hash of a config is as it was."""


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


def row_key(row: Mapping[str, Any]) -> str:
    """What a run is called and found by; no two rows of a study share it."""
    place = f"{row['arm']}, {row['axis']}" if row["axis"] else str(row["arm"])
    return f"{place}, {row['purpose']}, seed {row['seed']}, learning rate x{row['factor']:g}"


def shown_key(study: StudyConfig, row: Mapping[str, Any]) -> str:
    """What a run is called where people read it: `row_key`, with the mark of its arm."""
    return row_key({**row, "arm": study.shown(row["arm"])})


def write_row(row: Row) -> str:
    """The line of a row, which ends in a digest of all else in it."""
    return json.dumps({**row, "digest": _digest(row)})


def read_row(line: str) -> Row:
    """The row of a line as it was written; rows of older versions carry no digest.

    Raises:
        InputError: the line is no row, or was changed since.
    """
    row = json.loads(line)
    if not isinstance(row, dict):
        raise InputError(f"found a {type(row).__name__}; must be a row")
    digest = row.pop("digest", None)
    if digest is not None and digest != _digest(row):
        raise InputError(f"damaged, its content has not the digest {digest!r}; put the line back, or remove it")
    return row


def _digest(row: Row) -> str:
    return _hash(row)[:16]


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


def variant_options(options: Mapping[str, Any], variant: VariantConfig, where: str) -> dict[str, Any]:
    """`study.evaluation_options` as a variant has them.

    Raises:
        InputError: an override of an option that the study does not give; it names `where`.
    """
    whole = apply_overrides({"evaluation_options": dict(options)}, variant.options, where, "the study")
    changed: dict[str, Any] = whole["evaluation_options"]
    return changed


def canonical(config: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides what a run computes, by dotted key, with today's defaults filled in.

    Raises:
        InputError: the config is not one of a run.
    """
    run_config = from_mapping(RunConfig, config)
    whole = {**to_mapping(run_config), "model": to_mapping(_model_of(run_config))}
    compared = defining(whole)
    del compared["data.path"]  # data are compared by their content hash
    compared = {key: value for key, value in compared.items() if key not in YOUNGER or value != YOUNGER[key]}
    return compared | {f"sources.{path}": digest for path, digest in sources_of(config).items()}


def sources_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The hashes of the files that the custom modules of a run are written in, by dotted path."""
    return source_hashes(_model_of(from_mapping(RunConfig, config)))


def _model_of(config: RunConfig) -> DecoderConfig:
    model = {**config.model, "vocab_size": config.model.get("vocab_size") or 1}  # 1: as the data say
    return from_mapping(DecoderConfig, model, "model")


def config_hash(config: Mapping[str, Any]) -> str:
    return _hash(canonical(config))


def _hash(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


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


def needs(study: StudyConfig, base: Mapping[str, Any], job: Job) -> list[str]:
    """Names of what has to be prepared before a job starts."""
    return prepared_names([run_config_of(study, base, job), job.overrides])


def import_evaluation(path: str) -> Evaluation:
    """Import the function at a dotted path.

    Raises:
        InputError: there is none.
    """
    found = imports.resolve(path, "study.evaluations")
    if not callable(found):
        raise InputError(f"study.evaluations: {path!r} is not a function")
    return cast(Evaluation, found)


def validate(study: StudyConfig, base: Mapping[str, Any], workers: int = 1) -> None:
    """Refuse before the first run what would fail in any of them.

    Raises:
        InputError: an override, a resulting config or an evaluation is bad; the arm or variant is named.
    """
    for path in study.evaluations:
        import_evaluation(path)
    for step in study.prepare:
        job = prepare_job(study, base, step)
        at = f"study.prepare.{step}"
        config = run_config_of(study, base, job)
        _require_prepared(study, at, config, list(study.prepare)[: list(study.prepare).index(step)])
        _named(at, config)
    for name, variant in study.variants.items():
        variant_options(study.evaluation_options, variant, f"study.variants.{name}.overrides")
    for name, axis in study.axes.items():
        for value, overrides in axis.values.items():
            apply_overrides(base, overrides, f"study.axes.{name}.values.{value}")
    for cell in study.cells:
        apply_overrides(base, study.arms[cell.arm], f"study.arms.{cell.arm}")
        at = f"study.arms.{cell.arm}" + (f" at {cell.axis}" if cell.axis else "")
        config = apply_overrides(base, job_of(study, base, cell, "measure", 0, 1.0).overrides, at)
        _require_prepared(study, at, config, list(study.prepare))
        _named(at, config, workers)
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
                raise InputError(f"{where}: {key}={PREPARED + name!r}: must here be one of {allowed}")


def _named(where: str, config: Mapping[str, Any], workers: int = 1) -> None:
    try:
        canonical(config)
        run_config = from_mapping(RunConfig, config)
        require_one_process(to_mapping(run_config.trainer), "a study")
        require_memory_of_run(run_config, _model_of(run_config), workers)
        if overrides := (config.get("distillation") or {}).get("teacher_model"):
            teacher = teacher_mapping({**run_config.model, "vocab_size": 1}, overrides)
            from_mapping(DecoderConfig, teacher, "distillation.teacher_model")
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
