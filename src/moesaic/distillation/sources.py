"""Where a student's targets come from: a teacher, a cache, or a cache that a teacher fills up."""

import hashlib
import json
from typing import Any, Protocol

import numpy as np
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
    """Targets of the N = B * L tokens of a batch {"tokens": (B, L), "labels": (B, L), "starts": (B,)}."""

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
        return self.cache.targets(batch["starts"], batch["tokens"], batch["labels"])


class CacheThrough:
    """A cache in which the teacher fills in what is missing.

    What comes out has always been through the cache's precision, so a window's targets are the same when it was just
    computed and when it is read again. The teacher runs outside of autocast: what is kept does not depend on the
    precision of the student that asked first. `cache.close()` at the end writes what did not fill a shard.

    With `state_dict` in its checkpoint a run that was killed computes and counts what it did the first time, in the
    same batches, whatever the cache got since: it stays bit-equal.

    Attributes:
        hits, misses: windows so far that were there, and that the teacher computed.
    """

    def __init__(self, cache: TargetCache, teacher: FrozenTeacher, identity: CacheIdentity) -> None:
        self.cache = cache
        self.teacher = teacher
        self.identity = identity
        self.hits = 0
        self.misses = 0
        self._known = self._in_cache()

    def _in_cache(self) -> Tensor:
        """(num_windows,) bool."""
        return torch.tensor([window in self.cache for window in range(self.cache.num_windows)])

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes; all windows that it speaks of are on disk afterwards."""
        self.cache.flush()
        return {"known": self._known.clone(), "hits": self.hits, "misses": self.misses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["known"]) == self.cache.num_windows:
            self._known = state["known"] & self._in_cache()  # the folder may have been deleted since
        self.hits, self.misses = state["hits"], state["misses"]

    def targets(self, batch: Batch) -> StoredTargets:
        self.fill(batch)
        return self.cache.targets(batch["starts"], batch["tokens"], batch["labels"])

    def fill(self, batch: Batch) -> None:
        """Compute and add the windows of a batch that the cache does not hold."""
        windows = self.cache.windows(batch["starts"])
        missing = [i for i, window in enumerate(windows) if not self._known[window]]
        self.misses += len(missing)
        self.hits += len(windows) - len(missing)
        if not missing:
            return
        chosen = {name: batch[name][missing] for name in ("tokens", "labels", "starts")}
        with torch.autocast(chosen["tokens"].device.type, enabled=False):
            hidden, weight = self.teacher.targets(chosen)
        rows = hidden.unflatten(0, chosen["tokens"].shape)
        for i, place in enumerate(missing):
            one = slice(i, i + 1)
            generator = self.identity.generator(windows[place])
            targets = kept_targets(HeadTargets(rows[i], weight), chosen["labels"][i], self.identity.form, generator)
            self.cache.add(chosen["starts"][one], chosen["tokens"][one], targets)
        self._known[windows] = True


def cache_identity(decoder: Decoder, data: Data, *, seq_len: int, form: TargetFormat, seed: int = 0) -> CacheIdentity:
    """What identifies this teacher's targets on the training split."""
    return CacheIdentity(teacher=weights_hash(decoder), **data_settings(data, seq_len), form=form, seed=seed)


def data_settings(data: Data, seq_len: int) -> dict[str, Any]:
    """The part of a cache's settings that the data say; what `TargetCache.open` needs to know to refuse other data."""
    return {
        "tokenizer": None if data.tokenizer is None else tokenizer_hash(data.tokenizer),
        "content_hash": data.facts.get("content_hash") or _hash_of_stream(data),
        "num_tokens": len(data.train.tokens),
        "seq_len": seq_len,
        "vocab_size": data.vocab_size,
    }


def _hash_of_stream(data: Data) -> str:
    """Of a memory map of somebody else's, whose manifest does not say what it was made from."""
    digest = hashlib.sha256()
    for start in range(0, len(data.train.tokens), 1 << 24):
        digest.update(np.ascontiguousarray(data.train.tokens[start : start + (1 << 24)]).tobytes())
    return digest.hexdigest()


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(json.dumps(tokenizer.to_dict(), sort_keys=True).encode()).hexdigest()


def weights_hash(model: nn.Module) -> str:
    """sha256 over names, dtypes, shapes and bytes of all parameters and buffers, whatever their order and device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
