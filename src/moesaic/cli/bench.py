"""Measure on this machine: moesaic bench [NAME] [key=value ...]"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from moesaic.checkout import checkout
from moesaic.cli.arguments import require_known, require_list, require_switches
from moesaic.cli.common import launch, plain
from moesaic.errors import InputError
from moesaic.interrupts import ENDING, Interrupted, handling

__all__ = ["exit_status_of", "main"]

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
    if name is not None:
        require_known("name", name, NAMES, ", or null for all")
    require_switches(given, "smoke", "keep_freed_memory", "torch")
    takes = ALL if name is None else (*ONE, *MORE.get(name, ()))
    flags = []
    for key, value in given.items():
        if key == "name" or value is None or value is False or value == []:  # a number may be 0
            continue
        if key not in takes:
            raise InputError(
                f"{key}={value}: {name or 'running all'} does not have it; must be one of {', '.join(takes)}"
            )
        flag = f"--{key.replace('_', '-')}"
        if key == "layers":
            require_list(key, value)
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
    sys.exit(exit_status_of([sys.executable, "-m", module, *flags], environment))


def exit_status_of(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a process; what ends this one, ends it too, with all processes that it has started."""
    came: list[int] = []
    process = None
    try:
        with handling(lambda signum, frame: came.append(signum), *ENDING):  # a half-started process cannot be ended
            # a terminal's Ctrl-C is for this process alone: the other would answer it with a traceback
            process = subprocess.Popen(command, env=environment, start_new_session=True)
        if came:
            raise Interrupted(came[0])
        status = process.wait()
    except BaseException:
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM) if hasattr(os, "killpg") else process.terminate()
            process.wait()
        raise
    return 128 - status if status < 0 else status


def main(arguments: Sequence[str]) -> None:
    launch("bench", arguments, _task)
