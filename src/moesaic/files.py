"""Files that appear whole or not at all, and room for them."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from moesaic.errors import InputError

__all__ = ["disk_full", "require_disk_space", "write_atomically", "write_json", "write_yaml"]


def require_disk_space(path: Path, needed: int) -> None:
    """Raise InputError unless `needed` bytes are free where `path` is."""
    free = shutil.disk_usage(path).free
    if free < needed:
        raise InputError(
            f"{path}: {free / 1e6:.0f} MB free, but checkpoints and logs of this run need about {needed / 1e6:.0f} MB; "
            "free some space or choose another output_dir"
        )


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def write_yaml(path: Path, value: Any) -> None:
    write_atomically(path, yaml.safe_dump(value, sort_keys=False))


def disk_full(path: Path, error: OSError) -> Exception:
    """The error to raise for a failed write: a message about the disk if it is full, else the original."""
    if error.errno == errno.ENOSPC:
        return InputError(f"{path}: no space left on the device; the last checkpoint is intact, resume=true continues")
    return error
