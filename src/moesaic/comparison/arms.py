"""The arms of a comparison: what each is called, and how its run config differs from the baseline's."""

import dataclasses
import hashlib
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moesaic.config import from_mapping
from moesaic.errors import InputError
from moesaic.models import DecoderConfig
from moesaic.models.custom import custom_modules
from moesaic.models.seams import FoundPart
from moesaic.overrides import apply_overrides
from moesaic.studies.config import Overrides
from moesaic.training.config import RunConfig

__all__ = [
    "Arm",
    "custom_paths",
    "differences",
    "folder_name",
    "is_assignment",
    "name_of",
    "named_apart",
    "part_overrides",
    "split_words",
    "with_parts",
]

OF_MOE = ("router", "dispatcher", "expert")
"""Seams within a MoE layer."""

LONGEST_NAME = 40

LONGEST_FOLDER = 120
"""File systems allow 255 bytes, and names may be in any script."""

ASSIGNMENT = re.compile(r"(?:\+{0,2}|~)[\w./@-]+=|~[\w.]+$")
"""A word that is an override; any other names a part."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One side of a comparison."""

    name: str
    config: dict[str, Any]
    """A whole run config, see `moesaic.training.config.RunConfig`."""
    given: frozenset[str] = frozenset()
    """Dotted keys that the person set for this arm alone. Nothing solves them."""
    words: tuple[str, ...] = ()
    """How the person gave it, where that was in words."""


def split_words(key: str, text: str) -> list[str]:
    """The words of a candidate, split like a shell's; blanks within braces and brackets split nothing.

    Raises:
        InputError: a quotation without an end; it names `key`.
    """
    try:
        pieces = shlex.split(text)
    except ValueError as error:
        raise InputError(f"{key}={text!r}: {error}; must be words with spaces between them") from error
    words: list[str] = []
    for piece in pieces:
        if words and _is_open(words[-1]):
            words[-1] += f" {piece}"
        else:
            words.append(piece)
    return words


def _is_open(word: str) -> bool:
    """Whether a word has a brace or a bracket that nothing closes."""
    return sum(map(word.count, "{[")) > sum(map(word.count, "}]"))


def is_assignment(word: str) -> bool:
    """Whether a word of a candidate is key=value; otherwise it names a part."""
    return ASSIGNMENT.match(word) is not None


def name_of(words: Sequence[str]) -> str:
    """What an arm is called: its parts, experiments and values, shortly. "baseline" without any words."""
    names = []
    for word in words:
        key, equals, value = word.lstrip("+~").partition("=")
        path = re.search(r"type:\s*['\"]?([\w.:]+)", value)
        if not equals or not is_assignment(word):
            names.append(_last(key))
        elif path:
            names.append(_last(path[1]))
        elif key == "experiment":
            names.append(value)
        else:
            names.append(f"{_last(key)}={value}")
    name = ", ".join(names) or "baseline"
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..."


def named_apart(arms: Sequence[Arm]) -> tuple[Arm, ...]:
    """The arms, those of one name called by their words as they were given; the baseline, the first, at last."""
    for which in (arms[1:], arms):
        names = [arm.name for arm in arms]
        arms = [
            dataclasses.replace(arm, name=", ".join(arm.words))
            if any(arm is each for each in which) and arm.words and names.count(arm.name) > 1
            else arm
            for arm in arms
        ]
    return tuple(arms)


def _last(path: str) -> str:
    """The last part of a path; with the one before it if it says nothing alone, as in optimizer.name."""
    parts = re.split(r"[.:]", path)
    return ".".join(parts[-2:]) if parts[-1] == "name" else parts[-1]


def with_parts(config: Mapping[str, Any], parts: Iterable[FoundPart], key: str) -> dict[str, Any]:
    """A run config with each part in its place, one after the other.

    Args:
        key: names the candidate in messages.

    Raises:
        InputError: the model has no place for one, or one takes the place of another.
    """
    changed = dict(config)
    placed: dict[str, str] = {}
    for seam, path in parts:
        if seam in placed:
            raise InputError(
                f"{key}: {placed[seam]} and {path} are both a {seam}, and a model has one; must be two candidates"
            )
        placed[seam] = path
        run = from_mapping(RunConfig, changed)
        model = from_mapping(DecoderConfig, {**run.model, "vocab_size": 1}, "model")
        changed = apply_overrides(changed, part_overrides(seam, path, model), key)
    if "ffn" in placed and (lost := [placed[seam] for seam in placed if seam in OF_MOE]):
        raise InputError(f"{key}: {placed['ffn']} takes the place of the MoE layers, which {lost[0]} needs")
    return changed


def part_overrides(seam: str, path: str, model: DecoderConfig) -> Overrides:
    """The keys that put a part into a model: a router into every MoE layer, a mixer into every layer.

    A channel mixer ("ffn") takes the place of the MoE layers, or of all FFNs where there is none.

    Raises:
        InputError: the model has no place for it.
    """
    custom = {"type": path}
    if seam in OF_MOE:
        if model.moe is None or not any(layer.ffn == "moe" for layer in model.layers):
            raise InputError(f"{path}: is a {seam}, and the baseline has no MoE layer")
        return {f"model.moe.{'experts' if seam == 'expert' else seam}": custom}
    if seam not in ("mixer", "ffn"):
        raise InputError(f"{path}: found a part of kind {seam!r}; must be a router, experts, dispatcher, mixer or ffn")
    has_moe = any(layer.ffn == "moe" for layer in model.layers)
    layers = []
    for layer in model.layers:
        entry: dict[str, Any] = {"mixer": layer.mixer, "ffn": layer.ffn}
        if seam == "mixer" or not has_moe or layer.ffn == "moe":
            entry[seam] = custom
        layers.append(entry)
    return {
        "model.pattern": layers,
        "model.interleave_moe_layer_step": None,
        "model.nope_layer_interval": None,
    }


def differences(base: Mapping[str, Any], config: Mapping[str, Any], prefix: str = "") -> Overrides:
    """The overrides that turn one run config into another; a section whose keys are others is replaced as a whole."""
    found: Overrides = {}
    for key in base:
        old, new = base[key], config[key]
        path = f"{prefix}{key}"
        if isinstance(old, Mapping) and isinstance(new, Mapping) and old.keys() == new.keys():
            found |= differences(old, new, f"{path}.")
        elif old != new:
            found[path] = new
    return found


def custom_paths(model: DecoderConfig) -> list[str]:
    """The dotted paths of the custom modules of a model, each once."""
    return list(dict.fromkeys(custom["type"] for custom in custom_modules(model).values()))


def folder_name(new: Sequence[str], baseline: str) -> str:
    """What the directory of a comparison is called."""
    words = [*new, *([] if baseline == "baseline" else ["against", baseline])]
    name = re.sub(r"[^\w.=-]+", "_", "_".join(words)).strip("_.") or "comparison"
    if len(name) > LONGEST_FOLDER:
        name = f"{name[: LONGEST_FOLDER - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name
