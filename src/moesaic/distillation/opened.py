"""The targets of a run from a trained teacher or a cache, opened and checked before anything is written."""

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from moesaic.config import require_same
from moesaic.data import Data, DataConfig, Tokenizer
from moesaic.distillation import (
    CachedTargets,
    CacheIdentity,
    CacheThrough,
    FrozenTeacher,
    TargetCache,
    TargetFormat,
    data_settings,
    stream_keys,
    weights_hash,
)
from moesaic.distillation.config import DistillationConfig
from moesaic.distillation.teachers import load_teacher, require_teacher, teacher_tokenizer
from moesaic.errors import InputError, naming
from moesaic.models import Decoder
from moesaic.reading import read_json

__all__ = ["OpenedTargets", "open_targets", "require_paths", "require_same_teacher", "students_tokenizer"]


@dataclasses.dataclass(frozen=True)
class OpenedTargets:
    source: FrozenTeacher | CachedTargets | CacheThrough
    decoder: Decoder | None
    """The teacher, if it is at hand."""
    teacher_hash: str
    """See `weights_hash`."""
    description: str

    def close(self) -> None:
        """Write what a cache-through still has in memory, and let other processes add to the cache."""
        if isinstance(self.source, CacheThrough):
            self.source.cache.close()


def require_paths(config: DistillationConfig) -> None:
    """Raise InputError if the teacher or, where nobody could fill a new one, the cache is not there: costs nothing."""
    if config.teacher is not None:
        with naming("distillation.teacher"):
            require_teacher(config.teacher)
    elif config.cache is not None:
        with naming("distillation.cache"):
            TargetCache.open(config.cache)


def students_tokenizer(config: DistillationConfig, data: DataConfig) -> Tokenizer | None:
    """See `teacher_tokenizer`; None too where no trained teacher is at hand."""
    if config.teacher is None:
        return None
    with naming("distillation.teacher"):
        return teacher_tokenizer(config.teacher, data)


def open_targets(config: DistillationConfig, data: Data, *, vocab_size: int, seq_len: int) -> OpenedTargets:
    """Teacher and cache, of source frozen or cached. Random state is left as it was.

    A cache without a teacher must hold every window of the training split, and all shards are read once to see that
    they are what was written.

    Args:
        vocab_size: of the student.

    Raises:
        InputError: names distillation.teacher or distillation.cache: missing, another vocabulary or tokenizer, stale,
            without targets of (all of) these data, corrupt, or targets that cannot serve the divergence.
    """
    decoder, teacher_hash = None, ""
    if config.teacher is not None:
        # the student begins as without a teacher
        with naming("distillation.teacher"), torch.random.fork_rng(devices=[]):
            decoder = load_teacher(config.teacher, data.tokenizer, vocab_size)
        teacher_hash = weights_hash(decoder)
        if config.source == "frozen":
            return OpenedTargets(FrozenTeacher(decoder), decoder, teacher_hash, f"frozen: {config.teacher}")
    if vocab_size != data.vocab_size:
        raise InputError(
            f"model.vocab_size={vocab_size}: cached targets have the vocabulary of the data, {data.vocab_size}; "
            "must be null"
        )
    if data.task is not None:
        raise InputError("distillation.cache: a recall task never draws a sequence twice; must be one of frozen, joint")
    with naming("distillation.cache"):
        return _open_cache(config, data, seq_len, decoder, teacher_hash)


def _open_cache(
    config: DistillationConfig, data: Data, seq_len: int, decoder: Decoder | None, teacher_hash: str
) -> OpenedTargets:
    assert config.cache is not None  # checked by the config
    settings = data_settings(data, seq_len)
    expected = settings | {"temperature": config.temperature}
    if decoder is not None:
        expected["teacher"] = teacher_hash
    if decoder is None or (Path(config.cache) / "manifest.json").exists():
        cache = TargetCache.open(config.cache, expected)
        cache.verify()
        identity = cache.identity
    else:
        identity = CacheIdentity(teacher_hash, **settings, form=TargetFormat(temperature=config.temperature))
    form = identity.form
    if form.kind != "dense" and config.divergence != "forward_kl":
        raise InputError(
            f"{config.cache}: holds {form.kind} targets, which serve divergence=forward_kl only, not "
            f"{config.divergence}; a cache of kind=dense serves every divergence"
        )
    kept = ", ".join(f"{key} {value}" for key, value in form.settings().items())
    windows = np.unique(stream_keys(data.train.tokens, seq_len))
    if decoder is None:
        _require_all(cache, windows)
        return OpenedTargets(CachedTargets(cache), None, identity.teacher, f"cached: {config.cache} ({kept}), complete")
    writable = TargetCache.create(config.cache, identity, data=data.facts.get("content_hash"))
    held = int(writable.holds(windows).sum())
    there = f"{held:,} of {len(windows):,} windows are there, the rest is computed by {config.teacher}"
    return OpenedTargets(
        CacheThrough(writable, FrozenTeacher(decoder), identity),
        decoder,
        teacher_hash,
        f"cached: {config.cache} ({kept}), {there}",
    )


def _require_all(cache: TargetCache, windows: npt.NDArray[np.int64]) -> None:
    """Raise InputError unless the cache holds the windows with these keys (W,)."""
    held = int(cache.holds(windows).sum())
    if held == len(windows):
        return
    found = f"{cache.directory}: it holds {held} of {len(windows)} windows of the training split"
    adds = "moesaic cache-targets adds the rest, or, while training, distillation.teacher=<its teacher>"
    if held == 0 and len(cache):
        raise InputError(f"{found}, and {len(cache)} others: other data? If they are meant, {adds}")
    raise InputError(f"{found}; {adds}")


def require_same_teacher(opened: OpenedTargets, environment: Path) -> None:
    """Raise InputError if the run whose environment.json this is began with another teacher.

    A missing or damaged file says nothing.
    """
    try:
        stored = read_json(environment)["teacher"]["hash"]
    except (InputError, KeyError, TypeError):
        return
    changed = "the teacher's weights have changed since this run began; a resumed run needs the same teacher"
    require_same(f"distillation: {changed} ({environment})", {"teacher": stored}, {"teacher": opened.teacher_hash})
