"""Values set by dotted key in a nested mapping, and the text `key=value` that asks for them, read and written."""

import copy
import difflib
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moesaic.config import flatten
from moesaic.errors import InputError

__all__ = ["apply_overrides", "command_line", "for_shell", "merge", "override", "parse_overrides", "quoted"]


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


def quoted(text: str) -> str:
    """`text` as Hydra's grammar and OmegaConf's interpolation read it back unchanged."""
    from hydra.core.override_parser.types import Quote, QuotedString

    literal = re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + r"\${", text)
    return QuotedString(literal, Quote.single).with_quotes()


def override(key: str, value: Any) -> str:
    """`key=value` as a command reads it back; a text has quotes only where it needs them.

    Args:
        value: a text, path, number, truth value or None, or a list of these.
    """
    if isinstance(value, (list, tuple)):
        return f"{key}=[{','.join(quoted(each) if isinstance(each, str) else _plain(each) for each in value)}]"
    text = _plain(value)
    if not isinstance(value, (str, Path)) or _reads_back(key, text):
        return f"{key}={text}"
    return f"{key}={quoted(text)}"


def _plain(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _reads_back(key: str, text: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return "${" not in text and OverridesParser.create().parse_override(f"{key}={text}").value() == text
    except HydraException:
        return False


def command_line(name: str, *arguments: str | Path) -> str:
    """A line to paste into a shell: moesaic NAME ARGUMENT ...

    Args:
        arguments: words, flags, and what `override` makes. A path must be a `Path`: it cannot be taken for a flag or
            for key=value then.
    """
    words = [_path_word(each) if isinstance(each, Path) else each for each in arguments]
    return " ".join(["moesaic", name, *map(for_shell, words)])


def _path_word(path: Path) -> str:
    first = path.parts[0] if path.parts else ""
    return f"./{path}" if first[:1] in ("-", "~") or "=" in first else str(path)


def for_shell(argument: str) -> str:
    """An argument as a shell reads it; in double quotes where it has single ones for Hydra, which is easier to read."""
    if "'" in argument and not set("$`!") & set(argument):
        return '"' + re.sub(r'(["\\])', r"\\\1", argument) + '"'
    return shlex.quote(argument)
