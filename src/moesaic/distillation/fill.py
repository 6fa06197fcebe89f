"""A teacher's targets for a whole training split, computed once into a cache."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moesaic.config import LARGEST_SEED, from_mapping
from moesaic.data import DataConfig, load_data
from moesaic.data.loaders import Batch, windows_at
from moesaic.data.shards import Tokens
from moesaic.devices import require_accelerator
from moesaic.distillation.cache import CacheIdentity, TargetCache, forecast, stream_keys, window_keys
from moesaic.distillation.sources import CacheThrough, FrozenTeacher, cache_identity
from moesaic.distillation.sparsify import TargetFormat, kept_targets
from moesaic.distillation.teachers import load_teacher, require_teacher, teacher_tokenizer
from moesaic.errors import InputError
from moesaic.losses.targets import HeadTargets, SampledTargets

__all__ = ["fill_cache"]

Starts = npt.NDArray[np.int64]

FORMAT_KEYS = ("kind", "temperature", "k", "tail", "num_samples", "exponent")


def fill_cache(config: dict[str, Any], console: Console) -> dict[str, Any]:
    """Fill a cache, from where it stands; returns what it holds, as a plain mapping.

    Raises:
        InputError: bad configuration, teacher, data or directory; all of it before anything is computed.
    """
    _require_settings(config)
    batch_size, windows_per_shard = config["batch_size"], config["windows_per_shard"]
    form = from_mapping(TargetFormat, {key: config[key] for key in FORMAT_KEYS})
    require_accelerator("accelerator", config["accelerator"])
    require_teacher(config["teacher"])
    data_config = from_mapping(DataConfig, config["data"], "data")
    tokenizer = teacher_tokenizer(config["teacher"], data_config)
    data = load_data(data_config, tokenizer)
    decoder = load_teacher(config["teacher"], data.tokenizer, data.vocab_size)
    identity = cache_identity(decoder, data, seq_len=config["seq_len"], form=form, seed=config["seed"])
    device = torch.device("cuda" if config["accelerator"] == "gpu" else "cpu")
    teacher = FrozenTeacher(decoder.to(device))
    tokens = data.train.tokens

    directory = Path(config["directory"])
    keys, windows = np.unique(stream_keys(tokens, identity.seq_len), return_index=True)
    if (directory / "manifest.json").exists():
        windows = windows[~TargetCache.open(directory, identity.settings()).holds(keys)]
    missing, there = np.sort(windows) * identity.seq_len, len(keys) - len(windows)
    settings = ", ".join(f"{key} {value}" for key, value in form.settings().items())
    console.print(
        f"teacher   {config['teacher']}, {sum(p.numel() for p in decoder.parameters()):,} parameters", markup=False
    )
    console.print(f"targets   {settings}; {len(keys):,} windows of {identity.seq_len} tokens")
    if there:
        console.print(f"resumed   {there:,} of {len(keys):,} windows are there already")
    if len(missing):
        ids_per_token = _distinct_ids(teacher, tokens, missing, identity) if form.kind == "sampled" else None
        expected = forecast(identity, len(missing), windows_per_shard, ids_per_token)
        about = "" if ids_per_token is None else f", at about {ids_per_token:.1f} distinct ids per token"
        console.print(
            f"forecast  {expected.total_bytes / 1e6:,.1f} MB for {len(missing):,} windows, "
            f"{expected.bytes_per_token:.1f} bytes per token{about}"
        )
        expected.require_room(directory)
    cache = TargetCache.create(directory, identity, windows_per_shard, data.facts.get("content_hash"))
    try:
        before, started = len(cache), time.monotonic()
        through = CacheThrough(cache, teacher, identity)
        for batch in _missing_batches(tokens, missing, there, identity.seq_len, batch_size, console):
            through.fill({name: value.to(device) for name, value in batch.items()})
        cache.close()
    finally:
        cache.release()
    return {
        "windows": len(cache),
        "new windows": len(cache) - before,
        "seconds": time.monotonic() - started,
        "bytes": cache.stored_bytes,
        "tokenizer": "of the data" if tokenizer is None else "of the teacher",
    }


def _require_settings(config: Mapping[str, Any]) -> None:
    """Refuse what is missing, and numbers that cannot be."""
    for key, example in (("teacher", "RUN/checkpoints/last.ckpt"), ("directory", "targets")):
        if not isinstance(config[key], str):
            raise InputError(f"{key}={config[key]!r}: it is needed ({key}={example})")
    for key in ("seq_len", "batch_size", "windows_per_shard"):
        if type(config[key]) is not int or config[key] < 1:
            raise InputError(f"{key}={config[key]!r}: must be an integer >= 1")
    if type(config["seed"]) is not int or not 0 <= config["seed"] <= LARGEST_SEED:
        raise InputError(f"seed={config['seed']!r}: must be an integer from 0 to {LARGEST_SEED}")
    batch_size, windows_per_shard = config["batch_size"], config["windows_per_shard"]
    if windows_per_shard % batch_size:
        # else a resumed run would batch windows in another way, and differ in the last bit
        raise InputError(f"windows_per_shard={windows_per_shard}: must be a multiple of batch_size={batch_size}")


def _distinct_ids(teacher: FrozenTeacher, tokens: Tokens, starts: Starts, identity: CacheIdentity) -> float:
    """Mean number of distinct ids of a token, on a few of the windows that begin at `starts`."""
    count = min(len(starts), max(4, 4096 // identity.seq_len))
    found = []
    for place in np.linspace(0, len(starts) - 1, count).round().astype(np.int64):
        batch = windows_at(tokens, starts[[place]], identity.seq_len)
        [key] = window_keys(batch["tokens"], batch["labels"])
        batch = {name: value.to(teacher.decoder.head.weight.device) for name, value in batch.items()}
        hidden, weight = teacher.targets(batch)
        labels = batch["labels"].flatten()
        sampled = kept_targets(HeadTargets(hidden, weight), labels, identity.form, identity.generator(key))
        assert isinstance(sampled, SampledTargets)
        found.append((sampled.weights != 0).sum(dim=1).float().mean().item())
    return sum(found) / len(found)


def _missing_batches(
    tokens: Tokens, missing: Starts, there: int, seq_len: int, batch_size: int, console: Console
) -> Iterator[Batch]:
    """The windows that begin at `missing`, with a progress bar, or a line every few seconds without a terminal.

    A process that is killed has written full shards, which are whole batches: so the next one, which finds fewer
    windows missing, computes each beside the same others.
    """
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    total, started, told = there + len(missing), time.monotonic(), time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("windows", total=total, completed=there)
        for first in range(0, len(missing), batch_size):
            starts = missing[first : first + batch_size]
            yield windows_at(tokens, starts, seq_len)
            done, now = first + len(starts), time.monotonic()
            bar.update(task, completed=there + done)
            if not console.is_terminal and (now - told > 15 or done == len(missing)):
                told = now
                left = (now - started) / done * (len(missing) - done)
                console.print(f"window {there + done:,}/{total:,}  {left:.0f} s left", highlight=False)
