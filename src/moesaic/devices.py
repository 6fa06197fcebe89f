"""Devices of this machine, and how much memory they have."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from moesaic.errors import InputError

__all__ = ["cgroup_limit", "gigabytes", "machine_memory", "on_gpu", "require_accelerator", "require_memory"]


def require_accelerator(key: str, accelerator: str) -> None:
    """Raise InputError that names `key` if this machine does not have the accelerator that was asked for."""
    if accelerator not in ("auto", "cpu", "gpu", "mps"):
        raise InputError(f"{key}={accelerator!r}: must be one of auto, cpu, gpu, mps")
    found = {"gpu": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not found.get(accelerator, True):
        raise InputError(
            f"{key}={accelerator!r}: torch {torch.__version__} finds none on this machine; must be auto or cpu"
        )


def require_memory(what: str, needed: int, accelerator: str = "cpu", advice: str = "") -> None:
    """Raise InputError with both numbers if more bytes are needed than there are, whoever else uses them now.

    Args:
        what: begins the message: the keys or the file, and what is done with them.
        accelerator: "gpu", or "auto" where there is one, asks for the memory of the first GPU.
        advice: what must be smaller.
    """
    if on_gpu(accelerator):
        there, owner = torch.cuda.get_device_properties(0).total_memory, "the GPU"
    else:
        there, owner = machine_memory()
    if needed > there:
        must = f"; {advice}" if advice else ""
        raise InputError(f"{what} needs {gigabytes(needed)} of memory, but {owner} has {gigabytes(there)}{must}")


def on_gpu(accelerator: str) -> bool:
    """Whether this name of an accelerator means a GPU here."""
    return accelerator in ("auto", "gpu") and torch.cuda.is_available()


def gigabytes(n: float) -> str:
    return f"{n / 1e9:,.2f} GB" if n < 1e15 else f"{n / 1e9:.3g} GB"


def machine_memory() -> tuple[int, str]:
    """Bytes that this process can have at most, and whose limit that is; more than anybody has if it is unknown."""
    try:
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on Windows
        physical = 2**63
    limit = cgroup_limit()
    return (physical, "this machine") if limit is None or limit >= physical else (limit, "the cgroup of this process")


def cgroup_limit(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that the control groups of a process allow (version 1 and 2), None if they set no limit.

    Args:
        groups: what the kernel says of the process's groups.
        root: where the groups are mounted.
    """
    limits = []
    for file in _limit_files(groups, root):
        try:
            limits.append(int(file.read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(limits, default=None)


def _limit_files(groups: Path, root: Path) -> Iterator[Path]:
    """Files of the limits of all groups that the process is in, their parents included."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                yield folder / name
