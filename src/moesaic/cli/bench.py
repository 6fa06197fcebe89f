"""Measure on this machine: moesaic bench [NAME] [key=value ...]"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from moesaic.checkout import checkout
from moesaic.cli.common import launch, plain
from moesaic.errors import InputError

__all__ = ["main"]

ALL = ("smoke", "directory")
ONE = ("smoke", "output", "device", "clock", "threads", "rounds", "keep_freed_memory")
MORE = {
    "loss": ("torch",),
    "peers": ("layers", "memory_gb"),
    "acceleration": ("models", "experts", "tokens", "dim", "hidden_dim", "dtype", "memory_gb"),
}
"""Keys of single benchmarks, beside those of every one."""

NAMES = (
    *("acceleration", "attention", "decoding", "experts", "gpu", "loss", "peers", "roofline", "scaling"),
    "training_step",
)


def flags_of(given: Mapping[str, Any]) -> list[str]:
    """The command line of the benchmark's own module.

    Raises:
        InputError: no such benchmark, or a key that it does not have.
    """
    name = given["name"]
    if name is not None and name not in NAMES:
        raise InputError(f"name={name}: must be one of {', '.join(NAMES)}, or null for all")
    takes = ALL if name is None else (*ONE, *MORE.get(name, ()))
    flags = []
    for key, value in given.items():
        if key == "name" or value in (None, False, []):
            continue
        if key not in takes:
            raise InputError(
                f"{key}={value}: {name or 'running all'} does not have it; must be one of {', '.join(takes)}"
            )
        flag = f"--{key.replace('_', '-')}"
        if key == "layers":
            flags += [word for layer in value for word in ("--layer", layer)]
        elif value is True:
            flags.append(flag)
        else:
            flags += [flag, *map(str, value if isinstance(value, list) else [value])]
    return flags


def _task(config: DictConfig) -> None:
    given = plain(config)
    flags = flags_of(given)
    root = checkout()
    package = "moesaic.benchmarks" if root is None else "benchmarks"
    module = f"{package}.{given['name']}" if given["name"] else package
    paths = [*filter(None, [None if root is None else str(root), os.environ.get("PYTHONPATH")])]
    # a process of its own, as every benchmark has: without what Hydra and we have imported here
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    sys.exit(subprocess.run([sys.executable, "-m", module, *flags], env=environment).returncode)


def main(arguments: Sequence[str]) -> None:
    launch("bench", arguments, _task)
