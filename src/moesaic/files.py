"""Files that appear whole or not at all, and room for them."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moesaic.errors import InputError

__all__ = ["atomic", "disk_full", "require_disk_space", "sync", "write_atomically", "write_json", "write_yaml"]


def require_disk_space(path: Path, needed: int) -> None:
    """Raise InputError unless `needed` bytes are free where `path` is."""
    free = shutil.disk_usage(path).free
    if free < needed:
        raise InputError(
            f"{path}: {free / 1e6:.0f} MB free, but checkpoints and logs of this run need about {needed / 1e6:.0f} MB; "
            "free some space or choose another output_dir"
        )


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a path to write to; what is there at the end takes the name `path`, whole and on the disk.

    After an error `path` is as it was. A kill leaves the partial file, under one name beside `path`, and the next call
    writes over it. One process at a time may write a file.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)  # the name as well


def sync(path: Path) -> None:
    """Wait until the file or the names of the folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def write_yaml(path: Path, value: Any) -> None:
    import yaml  # an optional package

    write_atomically(path, yaml.safe_dump(value, sort_keys=False))


def disk_full(path: Path, error: OSError) -> Exception:
    """The error to raise for a failed write: a message about the disk if it is full, else the original."""
    if error.errno == errno.ENOSPC:
        return InputError(f"{path}: no space left on the device; the last checkpoint is intact, resume=true continues")
    return error
