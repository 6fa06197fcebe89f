"""Write the token ids of text of any size: moesaic tokenize SOURCE DIRECTORY [key=value ...]"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from moesaic.checkpoints import load_checkpoint
from moesaic.cli.common import launch, plain
from moesaic.config import from_mapping
from moesaic.data import DataConfig, Tokenizer, tokenizer_from_dict
from moesaic.data.sharding import write_shards
from moesaic.errors import InputError
from moesaic.overrides import command_line, override

__all__ = ["main", "tokenize"]

EVERY_SECONDS = 10
"""Between two lines about the progress, where there is no terminal for a bar."""


def tokenize(config: dict[str, Any], console: Console) -> None:
    """Write what is missing of a folder of token ids, and say what is in it.

    Raises:
        InputError: bad configuration, text or folder.
    """
    if not isinstance(config["directory"], str):
        raise InputError(f"directory={config['directory']!r}: it is needed (directory=ids)")
    most = max(64, os.cpu_count() or 1)
    workers = (os.cpu_count() or 1) if config["workers"] is None else config["workers"]
    for key, value, limit in (("workers", workers, most), ("shard_bytes", config["shard_bytes"], 2**40)):
        if type(value) is not int or not 1 <= value <= limit:
            raise InputError(f"{key}={value!r}: must be an integer from 1 to {limit}")
    data = from_mapping(DataConfig, {"source": "files", **config["data"]}, "data")
    tokenizer = None if config["checkpoint"] is None else _tokenizer_of(config["checkpoint"])
    directory, began = Path(config["directory"]), time.monotonic()
    with _progress(console) as tell:
        found = write_shards(data, directory, tokenizer, workers=workers, shard_bytes=config["shard_bytes"], tell=tell)
    size = sum(found[split]["bytes"] for split in ("train", "validation"))
    tokens = [found[split]["tokens"] for split in ("train", "validation")]
    files = sum(len(found[split]["shards"]) for split in ("train", "validation"))
    console.print(
        f"written   {directory}: {tokens[0]:,} tokens for training and {tokens[1]:,} for validation in {files} files; "
        f"{size / sum(tokens):.2f} bytes of text per token; {time.monotonic() - began:.0f} s",
        markup=False,
    )
    training = command_line("train", "data=memmap", override("data.path", str(directory)))
    console.print(f"next\n  {training}", markup=False)


def _tokenizer_of(path: Any) -> Tokenizer:
    if not isinstance(path, str):
        raise InputError(f"checkpoint={path!r}: must be the path of a checkpoint, or null")
    stored = load_checkpoint(path)["hyper_parameters"]["tokenizer"]
    if stored is None:
        raise InputError(f"checkpoint={path!r}: it has no tokenizer; must be one that was trained on text")
    return tokenizer_from_dict(stored)


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A function that shows how much of what is done: a bar, or a line every few seconds without a terminal."""
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    tasks: dict[str, Any] = {}
    told = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def tell(what: str, done: int, total: int) -> None:
            nonlocal told
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)
            if not console.is_terminal and time.monotonic() - told > EVERY_SECONDS:
                told = time.monotonic()
                console.print(f"{what}: {done:,} of {total:,}")

        yield tell


def main(arguments: Sequence[str]) -> None:
    def task(config: DictConfig) -> None:
        console = Console(emoji=False, soft_wrap=True, highlight=False)
        try:
            tokenize(plain(config), console)
        except KeyboardInterrupt:
            console.print("interrupted; the same command continues after the last complete file")
            raise

    launch("tokenize", arguments, task)
