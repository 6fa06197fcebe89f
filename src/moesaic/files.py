"""Files that appear whole or not at all, room for them, and locks of directories."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moesaic.errors import CannotWrite, InputError, reason

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "LOCK",
    "append",
    "atomic",
    "find_all",
    "is_locked",
    "lock",
    "make_folder",
    "old_of",
    "partial_of",
    "remove_partials",
    "require_disk_space",
    "staging_folder",
    "standing",
    "sync",
    "take_place",
    "write_atomically",
    "write_json",
    "write_yaml",
    "writing",
]

LOCK = ".lock"
"""The file in a directory that says whose it is."""


def require_disk_space(path: Path, needed: int) -> None:
    """Raise InputError unless `needed` bytes are free on the disk where `path` is or will be."""
    there = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise InputError(
            f"{path}: {free / 1e6:.0f} MB free, but checkpoints and logs of this run need about {needed / 1e6:.0f} MB; "
            "free some space or choose another output_dir"
        )


def make_folder(path: Path, key: str) -> None:
    """Make the folder that a key asks for, if it is not there.

    Raises:
        InputError: it cannot be made, or nothing can be made in it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise InputError(f"{key}={str(path)!r}: cannot be written ({reason(error)})") from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a full or read-only disk raises within into CannotWrite, which names `path`."""
    try:
        yield
    except OSError as error:
        raise CannotWrite(path, error) from error
    except RuntimeError as error:  # torch.save hides the OSError of the file that it was given
        if isinstance(error.__context__, OSError):
            raise CannotWrite(path, error.__context__) from error
        raise


def partial_of(path: Path) -> Path:
    """Where a file or folder is until it is whole."""
    return path.with_name(f".{path.name}.partial")


def old_of(path: Path) -> Path:
    """Where a file or folder is while another takes its name."""
    return path.with_name(f".{path.name}.old")


def standing(path: Path) -> Path:
    """Where to find what has this name, though a process was killed while something else was to take it."""
    return path if os.path.lexists(path) or not os.path.lexists(old_of(path)) else old_of(path)


def take_place(new: Path, path: Path) -> None:
    """Give a file or folder, which is whole, the name of another of either kind, which is removed.

    No system renames over a folder with files. So what was there is moved aside first: `standing` finds it after a
    kill, until `path` is there again.
    """
    sync(new)
    if os.path.lexists(path):
        _remove(old_of(path))
        path.rename(old_of(path))
    new.rename(path)
    sync(path.parent)
    _remove(old_of(path))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic(path: Path, over_folder: bool = False) -> Iterator[Path]:
    """Yield a path to write to; what is there at the end takes the name `path`, whole and on the disk.

    After an error `path` is as it was. A kill leaves the partial file, under one name beside `path`, and the next call
    writes over it.

    Args:
        over_folder: whether it may replace a folder, with all that is in it.

    Raises:
        CannotWrite: the disk is full or read-only, or the folder may not be written.
        InputError: another process is writing the same file.
    """
    partial = partial_of(path)
    with writing(path), _alone(partial, f"{path}: another process is writing it; wait for its end"):
        try:
            yield partial
            sync(partial)
            if over_folder and path.is_dir():
                take_place(partial, path)
            else:
                partial.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
        sync(path.parent)  # the name as well


@contextlib.contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target` for files that move there together; it is gone at the end.

    A kill leaves it, under one name, and the next call begins with an empty one.

    Raises:
        CannotWrite: the disk is full or read-only.
        InputError: another process is writing to the same target.
    """
    staging = partial_of(target)
    with writing(target):
        staging.mkdir(exist_ok=True)
        with lock(staging, f"{target}: another process is writing it"):
            for left in staging.iterdir():
                if left.name != LOCK:
                    left.unlink()
            try:
                yield staging
            finally:
                shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def _alone(partial: Path, busy: str) -> Iterator[None]:
    """Hold the partial file itself as the lock, so that no other file is left. Windows has no such lock."""
    if fcntl is None:
        yield
        return
    with contextlib.ExitStack() as opened:
        while True:
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
            opened.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(busy) from error
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), partial.stat()):
                    break  # else another process has just moved it to its place
        yield


def append(path: Path, text: str) -> None:
    """Add whole lines to a file. A disk that fills up in between may leave a part of the last line."""
    with writing(path), path.open("a", newline="", encoding="utf-8") as file:
        file.write(text)


def find_all(root: Path, name: str, tell: Callable[[OSError], None] | None = None) -> list[Path]:
    """All files of a name below `root`, sorted. Linked folders are looked into, each folder once.

    Args:
        tell: called for each folder that cannot be looked into.
    """
    found, seen = [], set()
    for folder, folders, files in os.walk(root, onerror=tell, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        found += [Path(folder, name)] if name in files else []
    return sorted(found)


def remove_partials(directory: Path) -> None:
    """Remove what killed processes left below a directory that nobody else writes to.

    A checkpoint that one of them had moved aside, to put another in its place, is put back.
    """
    for path in [*directory.rglob(".*.partial"), *directory.rglob(".*.ckpt.old")]:
        with contextlib.suppress(OSError):
            name = path.with_name(path.name.removeprefix(".").removesuffix(".old"))
            if path.suffix == ".old" and not os.path.lexists(name):
                path.rename(name)
            else:
                _remove(path)


def sync(path: Path) -> None:
    """Wait until the file or the names of the folder are on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def lock(directory: Path, busy: str) -> Iterator[None]:
    """Keep other processes from a directory that exists. However this one dies, the lock ends with it.

    Raises:
        InputError: `busy`, because another process has it.
        CannotWrite: no lock file can be made there.
    """
    import filelock  # an optional package

    held = filelock.FileLock(directory / LOCK, timeout=0)
    try:
        held.acquire()
    except filelock.Timeout as error:
        raise InputError(busy) from error
    except OSError as error:
        raise CannotWrite(directory, error) from error
    try:
        yield
    finally:
        held.release()


def is_locked(directory: Path) -> bool:
    """Whether another process holds the `lock` of a directory."""
    if not (directory / LOCK).exists():
        return False
    try:
        with lock(directory, "busy"):
            return False
    except CannotWrite:  # whoever wants to write there will be told
        return False
    except InputError:
        return True


def write_atomically(path: Path, text: str) -> None:
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def write_yaml(path: Path, value: Any) -> None:
    import yaml  # an optional package

    write_atomically(path, yaml.safe_dump(value, sort_keys=False))
