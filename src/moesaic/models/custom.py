"""Custom modules: parts of a user's own, named in a config by their dotted path."""

import ast
import functools
import hashlib
import inspect
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from moesaic.devices import require_memory
from moesaic.errors import InputError
from moesaic.imports import HANDED_IN, PARTS, is_own_code, require_trusted, resolve
from moesaic.layers.part import remember_marks
from moesaic.models.config import CustomModule, DecoderConfig

__all__ = [
    "Source",
    "asks_for",
    "build_custom",
    "construct",
    "custom_modules",
    "require_fresh",
    "require_maker",
    "require_trusted_modules",
    "source_hashes",
    "sources",
    "with_packages",
]

_KNOWN = {"moesaic", "torch", "lightning", *sys.stdlib_module_names}
"""Packages whose version says what is in them."""


class Source(NamedTuple):
    """The files that a custom module is written in, as they are now: its class, its bases, and the user's helpers."""

    files: dict[str, Path]
    """By module name. Those of torch, of Moesaic and of the standard library are left out."""
    sha256: str


def construct(custom: CustomModule, where: str, /, *, dispatches: bool = True, **known: Any) -> Any:
    """Import what a custom module's type names, and call it.

    Args:
        custom: {"type": dotted path, and keyword arguments for the call}.
        where: the place in the model, for messages.
        dispatches: whether a class with `dispatch` and `combine` will do; otherwise it must be a torch.nn.Module.
        known: what the constructor is given if it asks for it by name; the arguments of `custom` count before.

    Raises:
        InputError: it cannot be imported, is nothing that may be called here, or does not accept its arguments.
    """
    path = custom["type"]
    cls = resolve(path, f"{where}: type")
    if not path.startswith(f"{HANDED_IN}."):  # the person handed it over to be called
        require_maker(cls, f"{where}: {path}", dispatches)
    arguments = {key: value for key, value in custom.items() if key != "type"}
    try:
        asked = inspect.signature(cls).parameters
        arguments = {name: value for name, value in known.items() if name in asked} | arguments
        made = cls(**arguments)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{where}: {path}({', '.join(arguments)}) failed: {error}. By name it can ask for {', '.join(known)}"
        ) from error
    if isinstance(made, nn.Module):
        remember_marks(made)
    return made


def asks_for(custom: CustomModule, name: str) -> bool:
    """Whether a custom module's constructor receives the argument `name` from the model.

    Raises:
        InputError: it cannot be imported.
    """
    if name in custom:  # the config's own value counts
        return False
    try:
        return name in inspect.signature(resolve(custom["type"], "type")).parameters
    except (TypeError, ValueError):  # no signature: `construct` refuses it
        return False


def build_custom(
    custom: CustomModule, where: str, device: torch.device | str | None, dtype: torch.dtype | None, **known: Any
) -> nn.Module:
    """`construct`, for a torch.nn.Module; it is moved to device and dtype, so it needs no such arguments.

    Raises:
        InputError: as `construct`, it is no module, or one of ours that is larger than the memory.
    """
    if custom["type"].startswith(PARTS):  # it needs no trust, so its size may be a stranger's
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            sized = construct(custom, where, dispatches=False, **known)
        if isinstance(sized, nn.Module):
            require_memory(f"{where}: {custom['type']}", sum(p.numel() * p.itemsize for p in sized.parameters()))
    module = construct(custom, where, dispatches=False, **known)
    if not isinstance(module, nn.Module):
        raise InputError(f"{where}: {custom['type']} made a {type(module).__name__}; it must be a torch.nn.Module")
    return module.to(device=device, dtype=dtype)


def require_trusted_modules(config: DecoderConfig, where: object) -> None:
    """Refuse a model that a file describes, unless all code that it names is trusted; only then is it imported.

    Args:
        where: the file, for messages.

    Raises:
        InputError: code that nobody trusts; or a function that its trusted package has from elsewhere.
    """
    named = custom_modules(config)
    require_trusted([custom["type"] for custom in named.values()], where)
    for place, custom in named.items():
        found = resolve(custom["type"], f"{where}: {place}: type")
        if custom["type"].startswith(f"{HANDED_IN}."):
            continue
        require_maker(found, f"{where}: {place}: {custom['type']}", place == "moe.dispatcher")
        package, written = custom["type"].replace(":", ".").split(".")[0], str(_code_of(found).__module__)
        if not inspect.isclass(found) and written.split(".")[0] != package:
            raise InputError(f"{where}: {place}: {custom['type']} is of {written}; must be written in {package} itself")


def require_maker(found: Any, where: str, dispatches: bool) -> None:
    """Refuse, before it is called, what is neither a class for its place nor a function of a user's own.

    Raises:
        InputError: it begins with `where`.
    """
    code = _code_of(found)
    module = str(getattr(code, "__module__", None))
    if module.split(".")[0] == "moesaic" and not module.startswith(PARTS):
        raise InputError(f"{where} is of {module}; of this package it must be in {' or '.join(PARTS)}")
    if inspect.isclass(code):
        fits = dispatches and all(callable(getattr(code, name, None)) for name in ("dispatch", "combine"))
        if not fits and not issubclass(code, nn.Module):
            also = ", or have dispatch and combine" if dispatches else ""
            raise InputError(f"{where} is the class {code.__qualname__}; must be a torch.nn.Module{also}")
    elif not callable(code):
        raise InputError(f"{where} is a {type(found).__name__}; must be a class, or a function that makes a module")
    elif not is_own_code(module):
        raise InputError(f"{where} is a function of {module}; must be a torch.nn.Module, or code of your own")


def _code_of(found: Any) -> Any:
    """A class or a function: what a partial calls, and of an object its class's call."""
    while isinstance(found, functools.partial):
        found = found.func
    is_code = inspect.isclass(found) or inspect.isroutine(found)
    return found if is_code or not callable(found) else type(found).__call__


def custom_modules(config: DecoderConfig) -> dict[str, CustomModule]:
    """The custom modules of a model by where they stand ("layers.0.mixer", "moe.router")."""
    found: dict[str, CustomModule] = {}
    for i, layer in enumerate(config.layers):
        for name, part in (("mixer", layer.mixer), ("ffn", layer.ffn)):
            if isinstance(part, dict):
                found[f"layers.{i}.{name}"] = part
    if config.moe is not None:
        for name in ("router", "dispatcher", "experts"):
            seam = getattr(config.moe, name)
            if isinstance(seam, dict) and not (name == "router" and config.moe.built_in_router):
                found[f"moe.{name}"] = seam
    return found


def source_hashes(config: DecoderConfig | None) -> dict[str, str]:
    """The SHA-256 of every file of `sources`, for comparisons; none for a decoder without a config.

    What was handed in has none: nobody imports it from its file, and a script changes with every call that it makes.
    """
    found = {} if config is None else sources(config)
    return {path: source.sha256 for path, source in found.items() if not path.startswith(f"{HANDED_IN}.")}


def require_fresh(config: DecoderConfig) -> None:
    """Refuse custom modules whose files have changed since this process imported them: other processes would import
    other code under the same hash.

    Raises:
        InputError: it names the module.
    """
    for path, source in sources(config).items():
        for module in source.files if not path.startswith(f"{HANDED_IN}.") else ():
            if _is_stale(module):
                raise InputError(
                    f"{path}: the file of {module} has changed since this process imported it; restart Python, or "
                    f"reload it: importlib.reload(sys.modules[{module!r}])"
                )


def _is_stale(module: str) -> bool:
    """Whether a function of an imported module is not in its file as that is now."""
    loaded = sys.modules.get(module)
    loader: Any = getattr(getattr(loaded, "__spec__", None), "loader", None)
    if loaded is None or not hasattr(loader, "get_code"):
        return False
    try:
        whole = loader.get_code(module)  # as an import would, import hooks included
    except (ImportError, OSError, SyntaxError):
        return False
    there, waiting = set(), [whole]
    while waiting:
        code = waiting.pop()
        there.add(code)
        waiting += [each for each in code.co_consts if isinstance(each, types.CodeType)]
    held = [*vars(loaded).values()]
    held += [each for found in held if inspect.isclass(found) for each in vars(found).values()]
    mine = [each.__code__ for each in held if inspect.isfunction(each)]
    return any(code not in there for code in mine if code.co_filename == whole.co_filename)


def sources(config: DecoderConfig) -> dict[str, Source]:
    """Where the custom modules of a model are written, by dotted path; without those that have no source file.

    Raises:
        InputError: one of them cannot be imported.
    """
    found = {}
    for where, custom in custom_modules(config).items():
        files = _files(resolve(custom["type"], f"{where}: type"))
        if files:
            digest = hashlib.sha256(b"".join(file.read_bytes() for _, file in sorted(files.items())))
            found[custom["type"]] = Source(files, digest.hexdigest())
    return found


def with_packages(files: Mapping[str, Path]) -> dict[str, Path]:
    """These files and those of their packages, with what they import: enough to import them elsewhere."""
    found = dict(files)
    for module, file in files.items():
        names = module.split(".")
        folder = file.parent.parent if file.name == "__init__.py" else file.parent
        for depth in range(len(names) - 1, 0, -1):
            if (folder / "__init__.py").is_file():
                found[".".join(names[:depth])] = folder / "__init__.py"
            folder = folder.parent
    _add_helpers(found)
    return found


def _files(found: Any) -> dict[str, Path]:
    """Source files by module name, of a class and its bases, of a function, or of what a partial or an object is of."""
    found = getattr(found, "func", found)
    if not inspect.isclass(found) and not inspect.isroutine(found):
        found = type(found)
    files = {}
    for each in inspect.getmro(found) if inspect.isclass(found) else (found,):
        module = str(each.__module__)
        if module.split(".")[0] in _KNOWN and not module.startswith("moesaic.examples"):
            continue
        try:
            file = inspect.getsourcefile(each)
        except TypeError:  # a builtin
            continue
        if file is not None and Path(file).is_file():
            files[module] = Path(file)
    _add_helpers(files)
    return files


def _add_helpers(files: dict[str, Path]) -> None:
    """Add what these files import from their own package or folder, and so on. Installed packages have no helpers."""
    waiting = list(files.items())
    while waiting:
        module, file = waiting.pop()
        if {"site-packages", "dist-packages"} & set(file.parts):
            continue
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        root = file.parents[len(package.split(".")) if package else 0]
        for name in _imports(file, package):
            top = name.split(".")[0]
            if top in _KNOWN or (package and top != package.split(".")[0]):
                continue
            found = _file_of(root, name)
            if found is not None and found not in files.values():
                files[name] = found
                waiting.append((name, found))


def _imports(file: Path, package: str) -> list[str]:
    """Full names of what a file imports; of `from a import b` both a and a.b, as either may be a module."""
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError:
        return []
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".") if node.level and package else []
            above = above[: len(above) - (node.level - 1)] if node.level else []
            start = ".".join([*above, *([node.module] if node.module else [])])
            names += [start, *(f"{start}.{alias.name}" if start else alias.name for alias in node.names)]
    return [name for name in names if name]


def _file_of(root: Path, name: str) -> Path | None:
    """The file of a module below the folder that its top-level package or module stands in."""
    place = root.joinpath(*name.split("."))
    candidates = (place.with_name(f"{place.name}.py"), place / "__init__.py")
    return next((file for file in candidates if file.is_file()), None)
