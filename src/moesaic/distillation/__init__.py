"""Targets of a teacher: from the teacher itself, or made once and kept on disk. Needs the [train] extra."""

from moesaic.distillation.cache import CacheIdentity, Forecast, TargetCache, forecast, stream_keys, window_keys
from moesaic.distillation.sources import (
    CachedTargets,
    CacheThrough,
    FrozenTeacher,
    TargetSource,
    cache_identity,
    data_settings,
    tokenizer_hash,
    weights_hash,
)
from moesaic.distillation.sparsify import StoredTargets, TargetFormat, kept_targets, sampled_targets, top_k_targets

__all__ = [
    "CacheIdentity",
    "CacheThrough",
    "CachedTargets",
    "Forecast",
    "FrozenTeacher",
    "StoredTargets",
    "TargetCache",
    "TargetFormat",
    "TargetSource",
    "cache_identity",
    "data_settings",
    "forecast",
    "kept_targets",
    "sampled_targets",
    "stream_keys",
    "tokenizer_hash",
    "top_k_targets",
    "weights_hash",
    "window_keys",
]
