"""Values set by dotted key in a nested mapping, and the text `key=value` that asks for them."""

import copy
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moesaic.config import flatten
from moesaic.errors import InputError

__all__ = ["apply_overrides", "merge", "parse_overrides"]


def apply_overrides(
    config: Mapping[str, Any], overrides: Mapping[str, Any], where: str, what: str = "the run config"
) -> dict[str, Any]:
    """Return a copy of `config` with the values at the dotted keys replaced.

    A section that is null is made; what its keys may be is for the reader of the result to check.

    Args:
        where: names the source of the overrides in messages.
        what: names the config in messages.

    Raises:
        InputError: a key that the config does not have.
    """
    changed = copy.deepcopy(dict(config))
    for key, value in overrides.items():
        *sections, last = key.split(".")
        place: Any = changed if _has(config, [*sections, last]) else None
        for section in sections if place is not None else ():
            if place.get(section) is None:
                place[section] = {}
            place = place[section]
            if not isinstance(place, dict):  # an override before this one put a value there
                break
        if not isinstance(place, dict):
            close = difflib.get_close_matches(key, flatten(config), n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise InputError(f"{where}.{key}: {what} has no such key{hint}")
        place[last] = copy.deepcopy(value)
    return changed


def _has(config: Any, path: Sequence[str]) -> bool:
    """Whether a nested mapping has this key, or null where the key would be below."""
    if not path or config is None:
        return True
    return isinstance(config, Mapping) and path[0] in config and _has(config[path[0]], path[1:])


def merge(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` with nested `changes` merged into it: mappings by key, everything else replaced."""
    merged = dict(config)
    for key, value in changes.items():
        below = merged.get(key)
        nested = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(below, value) if nested else value  # type: ignore[arg-type]
    return merged


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Return {key: value} of texts like "attention.rope_theta=1e4", in the grammar of Hydra's command line.

    Raises:
        InputError: another form, a number that is not finite, or a key that stands twice.
    """
    # hydra is installed for commands only; the grammar is its own, so that a value means the same everywhere
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType, Sweep
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    found: dict[str, Any] = {}
    for word in words:
        try:
            override = parser.parse_override(word)
            value = override.value()
        except HydraException as error:
            raise InputError(f"{word}: must be key=value ({str(error).splitlines()[0]})") from error
        is_plain = override.type is OverrideType.CHANGE and override.package is None
        if not override.key_or_group or not is_plain or isinstance(value, Sweep):
            raise InputError(f"{word}: must be key=value, with one value")
        if not all(math.isfinite(x) for x in _numbers(value)):
            raise InputError(f"{word}: must be a finite number")
        if override.key_or_group in found:
            raise InputError(f"{override.key_or_group} stands twice")
        found[override.key_or_group] = value
    return found


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, (list, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(item)
