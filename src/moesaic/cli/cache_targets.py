"""Compute a teacher's targets once: moesaic cache-targets TEACHER DIRECTORY [key=value ...]"""

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from moesaic.cli.common import launch, plain, typed
from moesaic.distillation.fill import fill_cache
from moesaic.overrides import command_line, for_shell, override

__all__ = ["describe", "main"]


def describe(config: dict[str, Any], found: dict[str, Any], overrides: Sequence[str] = ()) -> str:
    """What was written, and the command that trains from it, on the same data in windows of the same length."""
    directory = config["directory"]
    training = command_line(
        "train",
        "experiment=codistill_cached",
        override("distillation.cache", directory),
        override("training.seq_len", config["seq_len"]),
        *(each for each in overrides if each.startswith("data")),
    )
    teacher = for_shell(override("distillation.teacher", config["teacher"]))
    reads = f"\nif these are other data than the teacher's: {teacher} too, for its BPE"
    return (
        f"written   {directory}: {found['windows']:,} windows, {found['bytes'] / 1e6:,.1f} MB; "
        f"{found['new windows']:,} of them now, in {found['seconds']:.0f} s\n"
        f"next\n  {training}"
        f"{reads if found['tokenizer'] == 'of the teacher' else ''}"
    )


def main(arguments: Sequence[str]) -> None:
    def task(config: DictConfig) -> None:
        console = Console(emoji=False, soft_wrap=True, highlight=False)
        given = plain(config)
        try:
            found = fill_cache(given, console)
        except KeyboardInterrupt:
            console.print("interrupted; the same command continues after the last complete shard")
            raise
        console.print(describe(given, found, typed(arguments)), markup=False)

    launch("cache-targets", arguments, task)
