"""What is stored by any version (checkpoints, configs and rows of runs), in the words of this version.

A stored model says its format; one without is of version 1. Keys that were added since need no entry here: where a
stored config lacks a key, its dataclass fills in the default.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from moesaic.errors import InputError
from moesaic.models.config import FORMAT
from moesaic.overrides import merge

__all__ = ["translate_model", "translate_overrides", "translate_run", "translate_study", "version_of"]

MIXERS = {"full_rope": "rope", "rope": "chunked_rope"}
"""Names of version 1 and of version 2. A `rope` of version 1 without a chunk size was full attention: `rope` still."""

STUDY_KEYS = {"probes": "evaluations", "probe_options": "evaluation_options"}

EVALUATIONS = {
    f"moesaic.training.probes.{name}_probe": f"moesaic.evaluation.checkpoint_evaluations.{name}_evaluation"
    for name in ("loss_by_position", "needle", "copying")
}


def version_of(stored: Mapping[str, Any], where: str) -> int:
    """Return the format of a stored mapping.

    Raises:
        InputError: a later version wrote it, or what stands there is no version.
    """
    version = stored.get("format", 1)
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise InputError(f"{where}: format={version!r}: must be 1 to {FORMAT}; a later version of moesaic reads others")
    return version


def translate_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mapping of a `DecoderConfig` as it was stored; what is newer than this version is left to it."""
    translated = {**model, "format": model.get("format", 1)}
    if translated["format"] != 1:
        return translated
    attention, pattern = model.get("attention"), model.get("pattern")
    if isinstance(pattern, list):  # what else may stand there is for `DecoderConfig` to refuse
        is_chunked = isinstance(attention, Mapping) and attention.get("attention_chunk_size") is not None
        names = MIXERS if is_chunked else {**MIXERS, "rope": "rope"}
        translated["pattern"] = [_rename_mixer(layer, names) for layer in pattern]
    return {**translated, "format": FORMAT}


def translate_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a run as it was stored; what it lacks is left out."""
    translated = dict(config)
    if "parallel" not in config:
        translated |= _of_all_processes(config)
    if isinstance(model := config.get("model"), Mapping):
        translated["model"] = translate_model(model)
        distillation = config.get("distillation") or {}
        if (distillation.get("teacher_model") or {}).get("pattern"):  # the teacher's other keys are the student's
            teacher = translate_model(merge(model, distillation["teacher_model"]))
            changed = {**distillation["teacher_model"], "pattern": teacher["pattern"]}
            translated["distillation"] = {**distillation, "teacher_model": changed}
    return translated


def _of_all_processes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The section `training` of a run that had a batch for each of several processes: today it is that of all."""
    trainer, training = config.get("trainer"), config.get("training")
    if not isinstance(trainer, Mapping) or not isinstance(training, Mapping):
        return {}
    devices: Any = trainer.get("devices", 1)
    nodes: Any = trainer.get("num_nodes", 1)
    devices = len(devices) if isinstance(devices, (list, tuple)) else devices
    batch_size: Any = training.get("batch_size")
    if not all(type(each) is int and each >= 1 for each in (devices, nodes, batch_size)) or devices * nodes == 1:
        return {}
    return {"training": {**training, "batch_size": batch_size * devices * nodes}}


def translate_overrides(overrides: Mapping[str, Any], config: Mapping[str, Any], version: int) -> dict[str, Any]:
    """Return overrides by dotted key, of the run config `config` as it was stored, or of a study's options.

    Args:
        version: of the overrides, which may be younger than the config.
    """
    changed = dict(config)
    if version > 1 and isinstance(changed.get("model"), Mapping):
        changed["model"] = {**changed["model"], "format": version}
    for key, value in overrides.items():
        changed = _with(changed, key.split("."), value)
    changed = translate_run(changed)
    translated = {}
    for key in overrides:
        section, dot, rest = key.partition(".")
        translated[f"{STUDY_KEYS.get(section, section)}{dot}{rest}"] = _at(changed, key.split("."))
    return translated


def translate_study(study: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a `study` block that is stored with its rows; its old keys mean nothing else today."""
    translated = {STUDY_KEYS.get(key, key): value for key, value in study.items()}
    if "evaluations" in translated:
        translated["evaluations"] = [_renamed(path, EVALUATIONS) for path in translated["evaluations"]]
    return translated


def _rename_mixer(layer: Any, names: Mapping[str, str]) -> Any:
    is_named = isinstance(layer, Mapping) and "mixer" in layer
    return {**layer, "mixer": _renamed(layer["mixer"], names)} if is_named else layer


def _renamed(name: Any, names: Mapping[str, str]) -> Any:
    return names.get(name, name) if isinstance(name, str) else name


def _with(config: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    below = value if len(path) == 1 else _with(config.get(path[0]) or {}, path[1:], value)
    return {**config, path[0]: below}


def _at(config: Any, path: Sequence[str]) -> Any:
    return _at(config[path[0]], path[1:]) if path else config
