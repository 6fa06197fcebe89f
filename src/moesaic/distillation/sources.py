"""Where a student's targets come from: a teacher, a cache, or a cache that a teacher fills up."""

import hashlib
import json
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moesaic.data import Data, Tokenizer
from moesaic.distillation.cache import CacheIdentity, TargetCache
from moesaic.distillation.sparsify import StoredTargets, TargetFormat, kept_targets
from moesaic.losses.targets import HeadTargets, Targets
from moesaic.models import Decoder

__all__ = [
    "CacheThrough",
    "CachedTargets",
    "FrozenTeacher",
    "TargetSource",
    "cache_identity",
    "data_settings",
    "tokenizer_hash",
    "weights_hash",
]

Batch = dict[str, Tensor]


class TargetSource(Protocol):
    """Targets of the N = B * L tokens of a batch {"tokens": (B, L), "labels": (B, L)}."""

    def targets(self, batch: Batch) -> Targets: ...


class FrozenTeacher:
    """A teacher that only looks on: evaluation mode, no gradients, no counts, nothing of it ever changes.

    It follows its batch to another device. Under autocast its layers run in the autocast dtype, as the student's do.

    Args:
        decoder: it is put into evaluation mode, and its parameters out of reach of gradients.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder.eval().requires_grad_(False)

    @torch.no_grad()
    def targets(self, batch: Batch) -> HeadTargets:
        decoder = self.decoder.to(batch["tokens"].device)
        hidden, _ = decoder.hidden_states(batch["tokens"])
        return HeadTargets(hidden.flatten(0, 1), decoder.head.weight)


class CachedTargets:
    """A cache that holds every window of the training stream; a window that it does not hold is an InputError."""

    def __init__(self, cache: TargetCache) -> None:
        self.cache = cache

    def targets(self, batch: Batch) -> StoredTargets:
        return self.cache.targets(batch["tokens"], batch["labels"])


class CacheThrough:
    """A cache in which the teacher fills in what is missing.

    What comes out has always been through the cache's precision, so a window's targets are the same when it was just
    computed and when it is read again. The teacher runs outside of autocast: what is kept does not depend on the
    precision of the student that asked first. `cache.close()` at the end writes what did not fill a shard.

    With `state_dict` in its checkpoint a run that was killed computes and counts what it did the first time, in the
    same batches, whatever the cache got since: it stays bit-equal.

    Attributes:
        hits, misses: windows so far that were there, and that the teacher computed; one that comes twice in a batch
            is computed once.
    """

    def __init__(self, cache: TargetCache, teacher: FrozenTeacher, identity: CacheIdentity) -> None:
        self.cache = cache
        self.teacher = teacher
        self.identity = identity
        self.hits = 0
        self.misses = 0
        self._known = set(cache)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes; all windows that it speaks of (keys, int64) are on disk afterwards."""
        self.cache.flush()
        known = torch.tensor(sorted(self._known), dtype=torch.int64)
        return {"known": known, "hits": self.hits, "misses": self.misses}

    def load_state_dict(self, state: dict[str, Any], same_run: bool = True) -> None:
        """Go on counting.

        Args:
            same_run: also forget what the cache got since then: the run that is continued computes it again. Another
                run, which only starts from a checkpoint, takes what is there.
        """
        if same_run:
            self._known &= set(state["known"].tolist())  # not all of it: the folder may have been deleted since
        self.hits, self.misses = state["hits"], state["misses"]

    def targets(self, batch: Batch) -> StoredTargets:
        self.fill(batch)
        return self.cache.targets(batch["tokens"], batch["labels"])

    def fill(self, batch: Batch) -> None:
        """Compute and add the windows of a batch that the cache does not hold."""
        keys = self.cache.keys_of(batch["tokens"], batch["labels"])
        missing = {key: i for i, key in enumerate(keys) if key not in self._known}
        self.misses += len(missing)
        self.hits += len(keys) - len(missing)
        if not missing:
            return
        tokens, labels = (batch[name][list(missing.values())] for name in ("tokens", "labels"))
        labels = torch.cat([tokens[:, 1:], labels[:, -1:]], dim=1)  # what this batch ignores, another one may not
        with torch.autocast(tokens.device.type, enabled=False):
            hidden, weight = self.teacher.targets({"tokens": tokens})
        rows = hidden.unflatten(0, tokens.shape)
        for i, key in enumerate(missing):
            one, generator = slice(i, i + 1), self.identity.generator(key)
            targets = kept_targets(HeadTargets(rows[i], weight), labels[i], self.identity.form, generator)
            self.cache.add(tokens[one], labels[one], targets)
        self._known.update(missing)


def cache_identity(decoder: Decoder, data: Data, *, seq_len: int, form: TargetFormat, seed: int = 0) -> CacheIdentity:
    """What identifies this teacher's targets of windows of `data`."""
    return CacheIdentity(teacher=weights_hash(decoder), **data_settings(data, seq_len), form=form, seed=seed)


def data_settings(data: Data, seq_len: int) -> dict[str, Any]:
    """The part of a cache's settings that the data say; which windows a cache must hold, `stream_keys` says."""
    return {
        "tokenizer": None if data.tokenizer is None else tokenizer_hash(data.tokenizer),
        "seq_len": seq_len,
        "vocab_size": data.vocab_size,
    }


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(json.dumps(tokenizer.to_dict(), sort_keys=True).encode()).hexdigest()


def weights_hash(model: nn.Module) -> str:
    """sha256 over names, dtypes, shapes and bytes of all parameters and buffers, whatever their order and device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
