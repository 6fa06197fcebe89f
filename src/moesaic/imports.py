"""Names in Python modules, given by dotted path: what is imported, and what a file may ask for.

To import a module is to run it. What a person types (a command line, an experiment, Python) is imported as it is. What
a file names (a checkpoint, the stored config of a run or a study) is imported only if the person trusts it: with the
key `trust`, the environment variable MOESAIC_TRUST, or the argument of a function.
"""

import contextlib
import contextvars
import importlib
import os
import re
import sys
import sysconfig
import types
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moesaic.errors import InputError

__all__ = [
    "HANDED_IN",
    "PARTS",
    "VARIABLE",
    "handing_in",
    "is_own_code",
    "names_in",
    "require_trusted",
    "resolve",
    "trust_argument",
    "trusted",
    "trusting",
    "trusts_change",
]

VARIABLE = "MOESAIC_TRUST"
"""Environment variable: names of trusted packages, with commas between them."""

PARTS = ("moesaic.layers", "moesaic.examples")
"""Where the parts of a model are that ship, which a file may name without trust."""

NAMING_KEYS = ("type", "_target_")
"""Keys whose value is a dotted path."""

HANDED_IN = "handed_in"
"""The package that objects handed in from Python seem to be in."""

_handed_in: contextvars.ContextVar[Mapping[str, Any]] = contextvars.ContextVar(
    "handed_in", default=types.MappingProxyType({})
)

_trusted: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar("trusted", default=frozenset())


def resolve(path: str, where: str) -> Any:
    """Import what `package.module.name` or `package.module:name` stands for, also of the working directory.

    Args:
        where: the key or argument that gives the path, for the message.

    Raises:
        InputError: nothing can be imported under this path.
    """
    module, _, name = _dotted(path).rpartition(".")
    if not _is_path(path) or not module:
        raise InputError(f"{where}={path!r}: must be package.module.name")
    if module == HANDED_IN:
        if name in _handed_in.get():
            return _handed_in.get()[name]
        raise InputError(
            f"{where}={path!r}: this was handed in from Python as an object; hand it in again: "
            f"with moesaic.imports.handing_in({name}=...)"
        )
    try:
        with _working_directory(module):
            return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise InputError(
            f"{where}={path!r} cannot be imported ({error}); it must be package.module.name, importable from here"
        ) from error


@contextlib.contextmanager
def handing_in(**objects: Any) -> Iterator[None]:
    """Let handed_in.NAME stand for these objects within: parts that no file can name, such as a function in a notebook.

    A checkpoint with such a part says so by this name, and can be read only where it is handed in again.
    """
    token = _handed_in.set({**_handed_in.get(), **objects})
    try:
        with trusting([f"{HANDED_IN}.{name}" for name in objects]):
            yield
    finally:
        _handed_in.reset(token)


@contextlib.contextmanager
def trusting(names: Iterable[str] | str | None) -> Iterator[None]:
    """Trust these packages, modules and names as well, within.

    Args:
        names: dotted paths; NAME@HASH trusts the code of NAME although it has changed, while its SHA-256 begins so.

    Raises:
        InputError: one is no dotted path.
    """
    token = _trusted.set(_trusted.get() | _checked(names, "trust"))
    try:
        yield
    finally:
        _trusted.reset(token)


def trusted() -> frozenset[str]:
    """The names that are trusted here, those of the environment included."""
    return _trusted.get() | _checked(filter(None, map(str.strip, os.environ.get(VARIABLE, "").split(","))), VARIABLE)


def require_trusted(paths: Collection[str], where: object, free: Collection[str] = ()) -> None:
    """Refuse what a file names and nobody trusts; nothing is imported.

    Args:
        paths: all dotted paths that the file names.
        where: the file, for the message.
        free: paths that need no trust, beside the parts that ship.

    Raises:
        InputError: it lists all `paths`, and says what would allow them.
    """
    known, names = trusted(), list(dict.fromkeys(map(_dotted, paths)))
    for name in names:
        if not _is_path(name):
            raise InputError(f"{where}: names code as {name!r}; must be package.module.name")
    asked = [name for name in names if not _covers(PARTS, name) and name not in free]
    if not all(_covers(known, name) for name in asked):
        words = _packages(asked)
        raise InputError(
            f"{where}: names code that would be imported and run: {', '.join(asked)}. If you trust it, add "
            f"trust=[{words}], set {VARIABLE}={words}, or in Python give trust={tuple(words.split(','))}"
        )


def trusts_change(path: str, digest: str) -> bool:
    """Whether the changed code of this path, whose SHA-256 is `digest` now, is trusted as it is (NAME@HASH)."""
    pinned = (name.split("@") for name in trusted() if "@" in name)
    return any(name == _dotted(path) and digest.startswith(start) for name, start in pinned)


def trust_argument(paths: Collection[str]) -> str:
    """What a command needs to read a file that names these paths: " trust=[my_package]"; "" for parts that ship."""
    asked = [path for path in map(_dotted, paths) if not _covers(PARTS, path)]
    return f" trust=[{_packages(asked)}]" if asked else ""


def names_in(config: Any) -> frozenset[str]:
    """The dotted paths that a config of a run or a study gives, wherever they stand; also in its overrides by key."""
    if isinstance(config, Mapping):
        found: set[str] = set()
        for key, value in config.items():
            last = str(key).rpartition(".")[2]
            if last in NAMING_KEYS and isinstance(value, str):
                found.add(value)
            elif last == "evaluations" and isinstance(value, (list, tuple)):
                found |= {each for each in value if isinstance(each, str)}
            found |= names_in(value)
        named = (path for path in found if _is_path(path) and _dotted(path).rpartition(".")[0])
        return frozenset(map(_dotted, named))  # a name without a module imports nothing
    if isinstance(config, (list, tuple)):
        return frozenset().union(*map(names_in, config))
    return frozenset()


def is_own_code(module: str) -> bool:
    """Whether an imported module is a file of a user's own: not of Python, of an installed package, or ours."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if module == "__main__":
        return True  # a notebook, or the script that runs
    if file is None or module.split(".")[0] in {"moesaic", "torch", *sys.stdlib_module_names}:
        return False
    library = Path(sysconfig.get_paths()["stdlib"]).resolve()
    place = Path(file).resolve()
    return not {"site-packages", "dist-packages"} & {*place.parts} and library not in place.parents


def _packages(paths: Collection[str]) -> str:
    return ",".join(sorted({path.split(".")[0] for path in paths}))


def _dotted(path: str) -> str:
    return path.replace(":", ".")


def _is_path(name: str) -> bool:
    return re.fullmatch(r"[^\W\d]\w*([.:][^\W\d]\w*)*", name) is not None


def _checked(names: object, where: str) -> frozenset[str]:
    several = isinstance(names, Iterable) and not isinstance(names, (str, Mapping))
    listed = [] if names is None else list(names) if several else [names]  # type: ignore[call-overload]
    for name in listed:
        if not isinstance(name, str) or not _is_path(re.sub("@[0-9a-f]{12,64}$", "", name)):
            raise InputError(f"{where}: found {name!r}; must be names of packages, such as [my_package]")
    return frozenset(map(_dotted, listed))


def _covers(names: Iterable[str], path: str) -> bool:
    return any(path == name.split("@")[0] or path.startswith(f"{name}.") for name in names)


@contextlib.contextmanager
def _working_directory(module: str) -> Iterator[None]:
    """Look into the working directory last, so that nothing in it stands in for what is installed.

    It stays on the path only if `module` came from there: another process of this run has to find it again.
    """
    here = os.path.realpath(".")
    if here in sys.path:
        yield
        return
    importlib.invalidate_caches()
    sys.path.append(here)
    try:
        yield
    finally:
        file = getattr(sys.modules.get(module), "__file__", None)
        if file is None or not is_own_code(module) or not Path(file).is_relative_to(here):
            sys.path.remove(here)
