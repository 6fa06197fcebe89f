"""A teacher's targets on disk: safetensors shards, and a manifest that says what they are and which are complete.

A row is one window of the training stream on the fixed grid, and window w starts at token w * seq_len: nothing depends
on batches, steps or epochs. A shard holds any set of windows, so that windows can be added in the order of training.

A shard becomes visible by its entry in manifest.json, which is written after the shard is on disk; both are written
beside their place and renamed. So a process that is killed leaves a cache of all listed shards, and what else lies in
the folder is removed by the next writer.

Tensors of a shard with R windows of L tokens: `crc` (R,) u32 of the windows' tokens, `entropy` and `label_log_prob`
(R, L) f16, and
- top_k: `ids` (R, L, k) u16 or, for more than 65536 entries, u32; `log_probs` (R, L, k) f16;
- sampled: `ids` and `weights` f16, both (M,), of all tokens one after the other; `distinct` (R, L) u8, how many of
  them a token has; `offsets` (R + 1,) i64, where those of a window begin;
- dense: `logits` (R, L, V) f16, each token's largest at 0.
"""

import dataclasses
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from moesaic.distillation.sparsify import IGNORE_INDEX, StoredTargets, TargetFormat
from moesaic.errors import InputError
from moesaic.losses.targets import DenseTargets, SampledTargets, TopKTargets

__all__ = ["CacheIdentity", "Forecast", "TargetCache", "forecast"]

VERSION = 1
MANIFEST = "manifest.json"
LOCK = ".lock"
MAX_F16 = 65504.0

Array = npt.NDArray[Any]

KINDS: dict[str, type] = {"top_k": TopKTargets, "sampled": SampledTargets, "dense": DenseTargets}

MISMATCH = {
    "teacher": "is stale: made by a teacher with other weights",
    "tokenizer": "was made with another tokeniser",
    "content_hash": "was made from other data",
    "num_tokens": "was made from a training split of another length",
    "seq_len": "has windows of another length",
    "vocab_size": "has another vocabulary",
    "kind": "holds targets of another kind",
    "temperature": "was made at another temperature",
    "k": "was made with another k",
    "num_samples": "was made with another number of samples",
    "exponent": "was made with another exponent of the sampling",
    "seed": "was sampled with another seed",
}
"""What differs in a cache, by the key in its manifest."""


@dataclasses.dataclass(frozen=True)
class CacheIdentity:
    """All that targets depend on. Two caches of one identity hold the same targets."""

    teacher: str
    """Hash of its weights, see `weights_hash`."""
    tokenizer: str | None
    """Hash of the tokeniser; None if the data have none."""
    content_hash: str
    """Of the data."""
    num_tokens: int
    """Of the training stream."""
    seq_len: int
    vocab_size: int
    form: TargetFormat
    seed: int = 0
    """Of the draws of sampled targets."""

    def __post_init__(self) -> None:
        if self.num_windows < 1:
            raise InputError(
                f"seq_len={self.seq_len}: the training split has {self.num_tokens} tokens; one window needs "
                f"{self.seq_len + 1}"
            )
        if self.form.kind == "top_k" and self.form.k > self.vocab_size:
            raise InputError(f"k={self.form.k}: the vocabulary has {self.vocab_size} entries")

    @property
    def num_windows(self) -> int:
        return (self.num_tokens - 1) // self.seq_len

    def settings(self) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("form", "seed")}
        seed = {"seed": self.seed} if self.form.kind == "sampled" else {}
        return {**own, **self.form.settings(), **seed}

    def generator(self, window: int) -> torch.Generator:
        """Of the draws of one window, whenever it is made: so a resumed cache equals an uninterrupted one."""
        digest = hashlib.sha256(f"{self.seed} {window}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a complete cache takes on disk."""

    windows: int
    bytes_per_token: float
    total_bytes: int

    def require_room(self, directory: Path) -> None:
        """Raise InputError unless what is not there yet fits on the disk of `directory`, which may not exist yet."""
        there = sum(file.stat().st_size for file in directory.glob("*")) if directory.is_dir() else 0
        place = directory.absolute()
        while not place.exists():
            place = place.parent
        free, needed = shutil.disk_usage(place).free, self.total_bytes - there
        if needed > free:
            raise InputError(
                f"directory={str(directory)!r}: {free / 1e6:,.1f} MB free, but the targets need {needed / 1e6:,.1f} "
                "MB; choose another disk, or a smaller k or num_samples"
            )


def forecast(identity: CacheIdentity, windows_per_shard: int, ids_per_token: float | None = None) -> Forecast:
    """The size of a complete cache, before anything is computed.

    Args:
        ids_per_token: of kind sampled, the mean number of distinct ids; None takes num_samples, an upper bound.
    """
    form, tokens = identity.form, identity.num_windows * identity.seq_len
    id_bytes = 2 + _id_dtype(identity.vocab_size).itemsize
    if form.kind == "top_k":
        per_token, tensors = float(form.k * id_bytes), 5
    elif form.kind == "sampled":
        per_token, tensors = (form.num_samples if ids_per_token is None else ids_per_token) * id_bytes + 1, 7
    else:
        per_token, tensors = 2 * identity.vocab_size, 2
    per_token += 0 if form.kind == "dense" else 4
    per_window = 12 if form.kind == "sampled" else 4
    shards = -(-identity.num_windows // windows_per_shard)
    per_shard = 66 * tensors + 205  # a line of the header for each tensor, and the entry in the manifest
    total = per_token * tokens + per_window * identity.num_windows + per_shard * shards + 550
    return Forecast(identity.num_windows, total / tokens, round(total))


class TargetCache:
    """Targets by window; made by `open` to read, or by `create` to write as well.

    Attributes:
        settings: what the manifest says of the targets, see `CacheIdentity`.
        num_windows: of the whole stream; `len` is how many of them are here.
    """

    def __init__(self, directory: Path, manifest: Mapping[str, Any]) -> None:
        self.directory = directory
        self.settings: dict[str, Any] = manifest["settings"]
        self.seq_len: int = self.settings["seq_len"]
        self.num_windows = (self.settings["num_tokens"] - 1) // self.seq_len
        self._shards: list[dict[str, Any]] = []
        self._shard_of = np.full(self.num_windows, -1, dtype=np.int32)
        self._place_of = np.zeros(self.num_windows, dtype=np.int32)
        for shard in manifest["shards"]:
            self._list(shard)
        self._buffer: dict[int, dict[str, Array]] = {}
        self._lock: TextIO | None = None
        self._windows_per_shard = 0
        self._open_shard = functools.lru_cache(maxsize=64)(self._map_shard)

    @classmethod
    def open(cls, directory: str | Path, expect: Mapping[str, Any] | None = None) -> "TargetCache":
        """A cache to read from.

        Args:
            expect: what it must have been made with, by the names in `CacheIdentity.settings`; what is left out does
                not matter, and a temperature does not matter to dense targets.

        Raises:
            InputError: no cache, another version, one that does not fit `expect`, or a missing or truncated shard.
        """
        directory = Path(directory)
        manifest = _read_manifest(directory)
        _require(directory, manifest["settings"], expect or {})
        try:
            cache = cls(directory, manifest)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise InputError(f"{directory / MANIFEST}: damaged ({type(error).__name__}: {error})") from error
        for shard in cache._shards:
            path = directory / shard["file"]
            size = path.stat().st_size if path.is_file() else None
            if size != shard["bytes"]:
                found = "missing" if size is None else f"truncated: {size} bytes"
                raise InputError(f"{path}: {found}, the manifest says {shard['bytes']} bytes; make the cache anew")
        return cache

    @classmethod
    def create(cls, directory: str | Path, identity: CacheIdentity, windows_per_shard: int = 256) -> "TargetCache":
        """A cache to add to: new, or the one that is there, if it has this identity.

        One process at a time can hold it, until `close`.

        Raises:
            InputError: as `open`; a folder of something else, one that another process adds to, or that cannot be
                written.
        """
        if windows_per_shard < 1:
            raise InputError(f"windows_per_shard={windows_per_shard}: allowed are numbers >= 1")
        directory = Path(directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            found = sorted(file.name for file in directory.iterdir() if file.name not in (LOCK, f"{MANIFEST}.partial"))
            if found and MANIFEST not in found:
                raise InputError(
                    f"directory={str(directory)!r}: no cache, it holds {found[0]} and no {MANIFEST}; choose a new one"
                )
            lock = (directory / LOCK).open("w")
        except OSError as error:
            raise InputError(f"directory={str(directory)!r}: cannot be written ({error.strerror})") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not (directory / MANIFEST).exists():
                _write_manifest(directory, identity.settings(), [])
            cache = cls.open(directory, identity.settings())
            listed = {shard["file"] for shard in cache._shards}
            for file in directory.glob("*.safetensors*"):
                if file.name not in listed:  # of a process that was killed
                    file.unlink()
        except BlockingIOError as error:
            lock.close()
            raise InputError(f"directory={str(directory)!r}: another process is adding to this cache") from error
        except BaseException:
            lock.close()
            raise
        cache._lock, cache._windows_per_shard = lock, windows_per_shard
        return cache

    def __len__(self) -> int:
        return int((self._shard_of >= 0).sum()) + len(self._buffer)

    def __contains__(self, window: int) -> bool:
        return window in self._buffer or (0 <= window < self.num_windows and bool(self._shard_of[window] >= 0))

    @property
    def stored_bytes(self) -> int:
        """Of all listed shards."""
        return sum(shard["bytes"] for shard in self._shards)

    def windows(self, starts: Tensor) -> list[int]:
        """Numbers of the windows that begin at `starts` (B,).

        Raises:
            InputError: a start that is not on the grid, or beyond the stream.
        """
        windows = []
        for start in starts.tolist():
            window, rest = divmod(start, self.seq_len)
            if rest or not 0 <= window < self.num_windows:
                raise InputError(
                    f"{self.directory}: a window starts at token {start}; targets are kept for windows that start at "
                    f"multiples of seq_len={self.seq_len} up to {(self.num_windows - 1) * self.seq_len} "
                    "(TrainingLoader(fixed_windows=True) makes those)"
                )
            windows.append(window)
        return windows

    def targets(self, starts: Tensor, tokens: Tensor, labels: Tensor) -> StoredTargets:
        """Targets of the B windows of a batch, as N = B * L tokens one after the other, fp32, on the tokens' device.

        Args:
            starts: (B,) int64.
            tokens: (B, L) int64, which must be those that the targets were made for.
            labels: (B, L) int64; -100 is ignored.

        Raises:
            InputError: names the window that is missing, whose tokens differ, or whose shard is damaged.
        """
        rows = [self._row(window, ids) for window, ids in zip(self.windows(starts), self._numpy(tokens), strict=True)]
        kind = self.settings["kind"]
        if kind == "dense":
            return DenseTargets(_cat(rows, "logits").to(tokens.device))
        entropy, label_log_prob = (_cat(rows, name).to(tokens.device) for name in ("entropy", "label_log_prob"))
        label_log_prob = label_log_prob.masked_fill(labels.flatten() == IGNORE_INDEX, 0)
        statistics = self.settings["temperature"], entropy, label_log_prob
        ids = _cat(rows, "ids").long()
        if kind == "top_k":
            log_probs = _cat(rows, "log_probs")
            # after rounding to fp16 the kept mass may exceed 1, which would leave a tail of negative mass
            log_probs -= log_probs.logsumexp(dim=-1, keepdim=True).clamp(min=0)
            return TopKTargets(ids.to(tokens.device), log_probs.to(tokens.device), *statistics)
        distinct = _cat(rows, "distinct").long()
        filled = torch.arange(int(distinct.max())) < distinct[:, None]
        padded_ids = torch.zeros(filled.shape, dtype=torch.int64).masked_scatter_(filled, ids)
        weights = torch.zeros(filled.shape, dtype=torch.float32).masked_scatter_(filled, _cat(rows, "weights"))
        return SampledTargets(padded_ids.to(tokens.device), weights.to(tokens.device), *statistics)

    def add(self, starts: Tensor, tokens: Tensor, targets: StoredTargets) -> None:
        """Keep the targets of B windows; a shard is written whenever enough windows have come together.

        Windows that are here already are left as they are. Until `flush`, up to a shard of windows is in memory only.

        Args:
            starts: (B,) int64.
            tokens: (B, L) int64.
            targets: of the N = B * L tokens.

        Raises:
            InputError: a cache that was opened to read, or a full disk.
        """
        if self._lock is None:
            raise InputError(f"{self.directory}: opened to read, nothing can be added")
        for i, (window, ids) in enumerate(zip(self.windows(starts), self._numpy(tokens), strict=True)):
            if window not in self:
                row = self._encode(_rows(targets, slice(i * self.seq_len, (i + 1) * self.seq_len)))
                self._buffer[window] = {"crc": np.array(_crc(ids), dtype=np.uint32), **row}
                if len(self._buffer) >= self._windows_per_shard:
                    self.flush()

    def flush(self) -> None:
        """Write what is in memory as a shard, whatever its size."""
        if not self._buffer:
            return
        windows, rows = list(self._buffer), list(self._buffer.values())
        tensors = {
            name: np.concatenate([row[name] for row in rows])
            if self._is_ragged(name)
            else np.stack([row[name] for row in rows])
            for name in rows[0]
        }
        if self.settings["kind"] == "sampled":
            tensors["offsets"] = np.cumsum([0, *(len(row["ids"]) for row in rows)], dtype=np.int64)
        content = save(tensors)
        name = f"shard-{len(self._shards):05d}.safetensors"
        try:
            _write(self.directory / name, content)
            shard = {
                "file": name,
                "windows": _runs(windows),
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
            _write_manifest(self.directory, self.settings, [*self._shards, shard])
        except OSError as error:
            reason = "no space left on the device" if error.errno == errno.ENOSPC else error.strerror
            raise InputError(
                f"{self.directory / name}: cannot be written ({reason}); the shards before it are intact"
            ) from error
        self._list(shard)
        self._buffer = {}

    def close(self) -> None:
        """Write what is in memory and let other processes add."""
        if self._lock is not None:
            self.flush()
            self.release()

    def release(self) -> None:
        """Let other processes add; what is in memory is lost."""
        if self._lock is not None:
            self._lock.close()
            self._lock, self._buffer = None, {}

    def verify(self) -> None:
        """Raise InputError that names the first shard whose content is not what was written."""
        for shard in self._shards:
            path = self.directory / shard["file"]
            try:
                with path.open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise InputError(f"{path}: cannot be read ({error.strerror})") from error
            if found != shard["sha256"]:
                raise InputError(
                    f"{path}: corrupt, its sha256 is {found[:12]} and the manifest says {shard['sha256'][:12]}; "
                    "make the cache anew"
                )

    # ---- rows

    def _encode(self, row: StoredTargets) -> dict[str, Array]:
        """The stored arrays of one window."""
        if not isinstance(row, KINDS[self.settings["kind"]]):
            raise InputError(f"{self.directory}: holds {self.settings['kind']} targets, not {type(row).__name__}")
        if isinstance(row, DenseTargets):
            return {"logits": _f16(row.logits - row.logits.amax(dim=-1, keepdim=True))}
        statistics = {"entropy": _f16(row.entropy), "label_log_prob": _f16(row.label_log_prob)}
        ids = row.ids.numpy().astype(_id_dtype(self.settings["vocab_size"]))
        if isinstance(row, TopKTargets):
            return {"ids": ids, "log_probs": _f16(row.log_probs), **statistics}
        kept = (row.weights != 0).numpy()
        distinct = kept.sum(axis=1).astype(np.uint8)
        return {"ids": ids[kept], "weights": _f16(row.weights)[kept], "distinct": distinct, **statistics}

    def _is_ragged(self, name: str) -> bool:
        return self.settings["kind"] == "sampled" and name in ("ids", "weights")

    def _row(self, window: int, ids: Array) -> dict[str, Array]:
        if window in self._buffer:
            row = self._buffer[window]
        elif window in self:
            row = self._read(window)
        else:
            raise InputError(
                f"{self.directory}: window {window} is missing; the cache holds {len(self)} of {self.num_windows}, "
                "scripts/cache_targets.py adds the rest"
            )
        if int(row["crc"]) != _crc(ids):
            raise InputError(
                f"{self.directory}: window {window} holds the targets of other tokens than those of the batch"
            )
        return row

    def _read(self, window: int) -> dict[str, Array]:
        path = self.directory / self._shards[self._shard_of[window]]["file"]
        place = int(self._place_of[window])
        try:
            file, offsets = self._open_shard(int(self._shard_of[window]))
            row = {}
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if self._is_ragged(name):
                    row[name] = file.get_slice(name)[int(offsets[place]) : int(offsets[place + 1])]
                elif name != "offsets":
                    row[name] = file.get_slice(name)[place : place + 1][0]
        except (SafetensorError, OSError, KeyError, IndexError) as error:
            raise InputError(f"{path}: damaged, window {window} cannot be read ({error})") from error
        return row

    def _map_shard(self, index: int) -> tuple[Any, Array]:
        file = safe_open(self.directory / self._shards[index]["file"], framework="np")
        return file, file.get_tensor("offsets") if self.settings["kind"] == "sampled" else np.zeros(0)

    def _list(self, shard: dict[str, Any]) -> None:
        windows = np.concatenate([np.arange(first, end) for first, end in shard["windows"]])
        self._shard_of[windows] = len(self._shards)
        self._place_of[windows] = np.arange(len(windows))
        self._shards.append(shard)

    def _numpy(self, tokens: Tensor) -> Array:
        if tokens.ndim != 2 or tokens.size(1) != self.seq_len:
            raise InputError(
                f"{self.directory}: tokens of shape {list(tokens.shape)}; its windows have seq_len={self.seq_len}"
            )
        return tokens.cpu().numpy().astype("<u4")


# ---- encoding


def _id_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def _dtypes(settings: Mapping[str, Any]) -> dict[str, str]:
    ids = _id_dtype(settings["vocab_size"]).name
    own = {
        "top_k": {"ids": ids, "log_probs": "float16"},
        "sampled": {"ids": ids, "weights": "float16", "distinct": "uint8", "offsets": "int64"},
        "dense": {"logits": "float16"},
    }[settings["kind"]]
    statistics = {} if settings["kind"] == "dense" else {"entropy": "float16", "label_log_prob": "float16"}
    return {"crc": "uint32", **own, **statistics}


def _rows(targets: StoredTargets, rows: slice) -> StoredTargets:
    values: list[Any] = [v[rows].detach().cpu() if isinstance(v, Tensor) else v for v in targets]
    return type(targets)(*values)


def _f16(x: Tensor) -> Array:
    return x.float().clamp(-MAX_F16, MAX_F16).half().numpy()


def _crc(ids: Array) -> int:
    return zlib.crc32(ids.tobytes())


def _cat(rows: Sequence[Mapping[str, Array]], name: str) -> Tensor:
    joined = np.concatenate([row[name] for row in rows])
    return torch.from_numpy(joined.astype(np.float32 if joined.dtype == np.float16 else np.int64))


def _runs(windows: Sequence[int]) -> list[list[int]]:
    """[first, end) of each stretch of consecutive numbers, in order."""
    runs: list[list[int]] = []
    for window in windows:
        if runs and runs[-1][1] == window:
            runs[-1][1] += 1
        else:
            runs.append([window, window + 1])
    return runs


# ---- files


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{directory}: no cache of targets, it has no {MANIFEST} ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error})") from error
    if not isinstance(manifest, dict) or not {"version", "settings", "shards"} <= manifest.keys():
        raise InputError(f"{path}: not the manifest of a cache of targets")
    if manifest["version"] != VERSION:
        raise InputError(f"{path}: version {manifest['version']!r}; allowed is {VERSION}, make the cache anew")
    return manifest


def _write_manifest(directory: Path, settings: Mapping[str, Any], shards: Sequence[Mapping[str, Any]]) -> None:
    manifest = {"version": VERSION, "settings": settings, "dtypes": _dtypes(settings), "shards": shards}
    _write(directory / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def _require(directory: Path, settings: Mapping[str, Any], expect: Mapping[str, Any]) -> None:
    """Raise InputError that names everything in which a cache differs from `expect`."""
    differing = []
    for key, wanted in expect.items():
        meaning = MISMATCH[key]
        if key in settings and settings[key] != wanted:
            differing.append(f"{meaning} ({key}={_short(settings[key])} in its {MANIFEST}, {_short(wanted)} here)")
    if differing:
        raise InputError(f"{directory}: this cache " + "; it ".join(differing))


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _write(path: Path, content: bytes) -> None:
    """On disk under its name complete, or not at all."""
    temporary = path.with_name(f"{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name as well
    finally:
        os.close(folder)
