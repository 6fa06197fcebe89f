"""Compute a teacher's targets once: python scripts/cache_targets.py teacher=PATH directory=NEW [key=value ...]"""

import sys
from collections.abc import Sequence
from typing import Any

import hydra
from omegaconf import DictConfig
from rich.console import Console

from moesaic.cli.common import CONFIG_PATH, exit_on_bad_input, plain, refuse_unknown_keys
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
        f"next\n  python scripts/train.py experiment=codistill_cached distillation.cache={directory} "
        f"training.seq_len={config['seq_len']}{same}"
        f"{reads if found['tokeniser'] == 'of the teacher' else ''}"
    )


@hydra.main(config_path=CONFIG_PATH, config_name="cache_targets", version_base="1.3")
def _main(config: DictConfig) -> None:
    console = Console(soft_wrap=True, highlight=False)
    try:
        given = exit_on_bad_input(lambda: plain(config))
        found = exit_on_bad_input(lambda: fill_cache(given, console))
    except KeyboardInterrupt:
        console.print("interrupted; the same command continues after the last complete shard")
        sys.exit(130)
    console.print(describe(given, found, sys.argv[1:]))


def main() -> None:
    exit_on_bad_input(lambda: refuse_unknown_keys("cache_targets", sys.argv[1:]))
    _main()


if __name__ == "__main__":
    main()
