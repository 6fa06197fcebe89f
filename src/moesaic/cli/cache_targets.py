"""Compute a teacher's targets once: moesaic cache-targets TEACHER DIRECTORY [key=value ...]"""

import sys
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from moesaic.cli.common import launch, plain
from moesaic.distillation.fill import fill_cache

__all__ = ["describe", "main"]


def describe(config: dict[str, Any], found: dict[str, Any], overrides: Sequence[str] = ()) -> str:
    """What was written, and the command that trains from it, on the same data in windows of the same length."""
    directory = config["directory"]
    reads = f"\nif these are other data than the teacher's: distillation.teacher={config['teacher']} too, for its BPE"
    same = "".join(f" {override}" for override in overrides if override.startswith("data"))
    return (
        f"written   {directory}: {found['windows']:,} windows, {found['bytes'] / 1e6:,.1f} MB; "
        f"{found['new windows']:,} of them now, in {found['seconds']:.0f} s\n"
        f"next\n  moesaic train experiment=codistill_cached distillation.cache={directory} "
        f"training.seq_len={config['seq_len']}{same}"
        f"{reads if found['tokeniser'] == 'of the teacher' else ''}"
    )


def _task(config: DictConfig) -> None:
    console = Console(soft_wrap=True, highlight=False)
    given = plain(config)
    try:
        found = fill_cache(given, console)
    except KeyboardInterrupt:
        console.print("interrupted; the same command continues after the last complete shard")
        raise
    console.print(describe(given, found, sys.argv[1:]))


def main(arguments: Sequence[str]) -> None:
    launch("cache-targets", arguments, _task)
