"""Files that a person or another program gave, read so that all that can be wrong with one is an InputError.

Each kind of file has one reader, which opens it and checks it within `reading`: checkpoints in `moesaic.checkpoints`,
streams of tokens in `moesaic.data.streams`, targets in `moesaic.distillation.cache`, runs and rows where they are used.
"""

import contextlib
import csv
import json
import math
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from moesaic.errors import InputError, UnknownKey, reason

__all__ = ["is_number", "read_csv", "read_json", "read_yaml", "reading", "require_file", "require_finite"]


@contextlib.contextmanager
def reading(file: object) -> Iterator[None]:
    """Name the file in what is refused within, and make an InputError of all that goes wrong with its content.

    Raises:
        InputError: whatever is raised within, but for what ends the process.
    """
    try:
        yield
    except InputError as error:
        newer = "; a newer version of moesaic may have written it" if isinstance(error, UnknownKey) else ""
        named = "" if str(error).startswith(str(file)) else f"{file}: "
        raise InputError(f"{named}{error}{newer}") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({reason(error)})") from error
    except Exception as error:  # what parsers and wrong types raise has no common base
        what = (str(error).splitlines() or [""])[0][:200]
        raise InputError(f"{file}: damaged ({type(error).__name__}: {what})") from error


def require_file(path: Path, wanted: str = "a file") -> None:
    """Raise InputError where there is no regular file: opening a pipe or a device may wait for ever.

    Raises:
        InputError: what is there instead.
        OSError: the folder cannot be looked into.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        broken = f"; a link to {path.readlink()}, which is not there" if path.is_symlink() else ""
        raise InputError(f"no such file{broken}") from error
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a pipe, a device or a socket"
        raise InputError(f"{kind}; must be {wanted}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: it cannot be read, is no JSON, holds something else, or a key twice.
    """
    with reading(path):
        require_file(path)
        return _mapping(json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_each_once))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file of plain values.

    Raises:
        InputError: it cannot be read, is no YAML, holds something else, or a key twice.
    """
    import yaml  # an optional package

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            _each_once([(key.value, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)])
            return super().construct_mapping(node, deep)

    with reading(path):
        require_file(path)
        content = yaml.load(path.read_text(encoding="utf-8"), Strict)
        _require_tree(content)
        return _mapping(content)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a table with a header. A row that was cut short lacks values, or is left out where all are missing.

    Raises:
        InputError: it cannot be read as text.
    """
    with reading(path):
        require_file(path)
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            return [{name: value or "" for name, value in row.items() if name is not None} for row in rows]


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The mapping of these pairs; of two values under one key nobody knows which one was meant."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise InputError(f"{key}: stands twice; must be there once")
        found[key] = value
    return found


MOST_VALUES = 10**6
"""A file of this many values is none of ours; a few aliases of YAML can stand for any number."""


def _require_tree(content: Any) -> None:
    """Raise InputError for a value that is within itself, or that its aliases repeat without end."""
    waiting, count = [content], 0
    while waiting:
        value, count = waiting.pop(), count + 1
        if count > MOST_VALUES:
            raise InputError(f"its aliases make more than {MOST_VALUES:,} values of it; must be plain values")
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def is_number(value: Any) -> TypeGuard[float]:
    """Whether this, read from a file, is a finite number; true and false are none, nor is what no float can hold."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def require_finite(value: Any, key: str) -> None:
    """Raise InputError that names the first number below `key` that is nan or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{key}: found {value}; must be a finite number")
    if isinstance(value, Mapping):
        for name, item in value.items():
            require_finite(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            require_finite(item, f"{key}[{i}]")


def _mapping(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"found a {type(content).__name__}; must be a mapping of names")
    return content
