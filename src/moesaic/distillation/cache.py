"""A teacher's targets on disk: safetensors shards, and a manifest that says what they are and which are complete.

A row is one window, and its key is a hash of its L + 1 ids: the tokens, and the last label. All else that a row says
follows from them and the teacher, so nothing depends on where a window stands, nor on batches, steps or epochs. New
data are added to old ones, and what both have in common is kept once. A shard holds any set of windows, in the order
in which they were added.

Windows are cut on a fixed grid (window w of a stream starts at token w * seq_len). So text that comes after the old
text leaves all old windows as they were, and text in the middle moves those behind it, which are then other windows.

A shard becomes visible by its entry in manifest.json, which is written after the shard is on disk; both are written
beside their place and renamed. So a process that is killed leaves a cache of all listed shards, and what else lies in
the folder is removed by the next writer.

Tensors of a shard with R windows of L tokens: `keys` (R,) i64, `entropy` and `label_log_prob` (R, L) f16, and
- top_k: `ids` (R, L, k) u16 or, for more than 65536 entries, u32; `log_probs` (R, L, k) f16;
- sampled: `ids` and `weights` f16, both (M,), of all tokens one after the other; `distinct` (R, L) u8, how many of
  them a token has; `offsets` (R + 1,) i64, where those of a window begin;
- dense: `logits` (R, L, V) f16, each token's largest at 0; no `entropy` and no `label_log_prob`.

A key is 64 bits of BLAKE2b: among a million windows two share one with a probability of 3e-8.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from moesaic.config import from_mapping
from moesaic.data.shards import Tokens
from moesaic.distillation.sparsify import IGNORE_INDEX, StoredTargets, TargetFormat
from moesaic.errors import InputError, reason
from moesaic.files import LOCK, atomic, lock, write_atomically
from moesaic.losses.targets import DenseTargets, SampledTargets, TopKTargets
from moesaic.reading import read_json, reading, require_finite

__all__ = ["CacheIdentity", "Forecast", "TargetCache", "forecast", "stream_keys", "window_keys"]

VERSION = 2
MANIFEST = "manifest.json"
MAX_F16 = 65504.0

Array = npt.NDArray[Any]

KINDS: dict[str, type] = {"top_k": TopKTargets, "sampled": SampledTargets, "dense": DenseTargets}

MISMATCH = {
    "teacher": "is stale: made by a teacher with other weights",
    "tokenizer": "was made with another tokenizer",
    "seq_len": "has windows of another length",
    "vocab_size": "has another vocabulary",
    "kind": "holds targets of another kind",
    "temperature": "was made at another temperature",
    "k": "was made with another k",
    "tail": "was made with another tail",
    "num_samples": "was made with another number of samples",
    "exponent": "was made with another exponent of the sampling",
    "seed": "was sampled with another seed",
}
"""What differs in a cache, by the key in its manifest."""


@dataclasses.dataclass(frozen=True)
class CacheIdentity:
    """All that a window's targets depend on. Caches of one identity may differ in the windows that they hold."""

    teacher: str
    """Hash of its weights, see `weights_hash`."""
    tokenizer: str | None
    """Hash of the tokenizer; None if the data have none."""
    seq_len: int
    vocab_size: int
    form: TargetFormat
    seed: int = 0
    """Seed of the draws of sampled targets."""

    def __post_init__(self) -> None:
        for name in ("seq_len", "vocab_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: must be a number >= 1")
        if self.form.kind == "top_k" and self.form.k > self.vocab_size:
            raise InputError(f"k={self.form.k}: the vocabulary has {self.vocab_size} entries")

    def settings(self) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("form", "seed")}
        seed = {"seed": self.seed} if self.form.kind == "sampled" else {}
        return {**own, **self.form.settings(), **seed}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "CacheIdentity":
        """What has these `settings`; InputError names one that is missing, unknown or impossible."""
        of_form = [field.name for field in dataclasses.fields(TargetFormat)]
        form = {name: settings[name] for name in of_form if name in settings}
        own = {name: value for name, value in settings.items() if name not in form}
        identity = from_mapping(cls, {**own, "form": form}, "settings")
        for name in ("kind", *identity.settings()):
            if name not in settings:
                raise InputError(f"settings.{name}: missing")
        return identity

    def generator(self, key: int) -> torch.Generator:
        """Generator of the draws for the window with this key, the same whenever and in whatever data it comes up."""
        digest = hashlib.sha256(f"{self.seed} {key}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What some windows take on disk."""

    windows: int
    bytes_per_token: float
    total_bytes: int

    def require_room(self, directory: Path) -> None:
        """Raise InputError unless they fit on the disk of `directory`, which may not exist yet."""
        place = directory.absolute()
        while not place.exists():
            place = place.parent
        free, needed = shutil.disk_usage(place).free, self.total_bytes
        if needed > free:
            raise InputError(
                f"directory={str(directory)!r}: {free / 1e6:,.1f} MB free, but the targets need {needed / 1e6:,.1f} "
                "MB; choose another disk, or a smaller k or num_samples"
            )


def forecast(
    identity: CacheIdentity, windows: int, windows_per_shard: int, ids_per_token: float | None = None
) -> Forecast:
    """The size of what is to be added, before anything is computed.

    Args:
        windows: how many, >= 1.
        ids_per_token: of kind sampled, the mean number of distinct ids; None takes num_samples, an upper bound.
    """
    form, tokens = identity.form, windows * identity.seq_len
    id_bytes = 2 + _id_dtype(identity.vocab_size).itemsize
    if form.kind == "top_k":
        per_token, tensors = float(form.k * id_bytes), 5
    elif form.kind == "sampled":
        per_token, tensors = (form.num_samples if ids_per_token is None else ids_per_token) * id_bytes + 1, 7
    else:
        per_token, tensors = 2 * identity.vocab_size, 2
    per_token += 0 if form.kind == "dense" else 4
    per_window = 16 if form.kind == "sampled" else 8
    shards = -(-windows // windows_per_shard)
    per_shard = 66 * tensors + 170  # a line of the header for each tensor, and the entry in the manifest
    total = per_token * tokens + per_window * windows + per_shard * shards + 450
    return Forecast(windows, total / tokens, round(total))


def window_keys(tokens: Tensor, labels: Tensor) -> list[int]:
    """The keys of B windows, by which a cache knows them.

    Args:
        tokens: (B, L) int64.
        labels: (B, L) int64, the tokens one further; -100 is ignored, but for the last one.

    Raises:
        InputError: names the sequence whose labels are others: a cache speaks of next tokens only.
    """
    tokens, labels = tokens.cpu(), labels.cpu()
    following, last = labels[:, :-1], labels[:, -1]
    other = (following != tokens[:, 1:]) & (following != IGNORE_INDEX)
    for i in (other.any(dim=1) | (last == IGNORE_INDEX)).nonzero().flatten().tolist():
        if not other[i].any():
            raise InputError(f"sequence {i} of the batch: its last label is ignored; cached targets need the id there")
        at = int(other[i].nonzero()[0])
        raise InputError(
            f"sequence {i} of the batch: label {int(labels[i, at])} at position {at}, where the next token is "
            f"{int(tokens[i, at + 1])}; cached targets are those of next tokens"
        )
    return [_key(row.tobytes()) for row in torch.cat([tokens, labels[:, -1:]], dim=1).numpy().astype("<u4")]


def stream_keys(tokens: Tokens, seq_len: int) -> npt.NDArray[np.int64]:
    """The keys (W,) of the windows on the fixed grid of a stream (n,), W = (n - 1) // seq_len.

    Raises:
        InputError: a stream shorter than one window.
    """
    count = (len(tokens) - 1) // seq_len
    if count < 1:
        raise InputError(
            f"seq_len={seq_len}: the training split has {len(tokens)} tokens; one window needs {seq_len + 1}"
        )
    keys = np.empty(count, dtype=np.int64)
    block = max(1, 2**20 // seq_len)  # a stream may be larger than memory
    for first in range(0, count, block):
        end = min(first + block, count)
        ids = memoryview(np.asarray(tokens[first * seq_len : end * seq_len + 1]).astype("<u4").tobytes())
        starts = range(0, 4 * seq_len * (end - first), 4 * seq_len)
        keys[first:end] = [_key(ids[start : start + 4 * (seq_len + 1)]) for start in starts]
    return keys


def _key(ids: bytes | memoryview) -> int:
    return int.from_bytes(hashlib.blake2b(ids, digest_size=8).digest(), "little", signed=True)


class TargetCache:
    """Targets by the key of their window; made by `open` to read, or by `create` to write as well.

    `len` is how many windows it holds, and `in` takes a key.

    Attributes:
        identity: what the manifest says of the targets, and `settings` the same as it is written there.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        self.directory = directory
        self.settings = settings
        self.identity = CacheIdentity.from_settings(self.settings)
        self.seq_len = self.identity.seq_len
        self._shards: list[dict[str, Any]] = []
        self._place_of: dict[int, tuple[int, int]] = {}
        """Key -> shard and row in it."""
        self._buffer: dict[int, dict[str, Array]] = {}
        self._lock: contextlib.ExitStack | None = None
        self._windows_per_shard = 0
        self._data: str | None = None
        self._open_shard = functools.lru_cache(maxsize=64)(self._map_shard)

    @classmethod
    def open(cls, directory: str | Path, expect: Mapping[str, Any] | None = None) -> "TargetCache":
        """A cache to read from.

        Args:
            expect: what it must have been made with, by the names in `CacheIdentity.settings`; what is left out does
                not matter, and a temperature does not matter to dense targets.

        Raises:
            InputError: no cache, another version, a damaged manifest, one that does not fit `expect`, or a missing,
                truncated or unreadable shard.
        """
        directory = Path(directory)
        manifest = _read_manifest(directory)
        _require(directory, manifest["settings"], expect or {})
        cache = cls(directory, manifest["settings"])
        for shard in manifest["shards"]:
            path = directory / shard["file"]
            size = path.stat().st_size if path.is_file() else None
            if size != shard["bytes"]:
                found = "missing" if size is None else f"truncated: {size} bytes"
                raise InputError(f"{path}: {found}, the manifest says {shard['bytes']} bytes; make the cache anew")
            try:
                with safe_open(path, framework="np") as file:
                    keys = file.get_tensor("keys").tolist()
            except Exception as error:  # of safetensors, of the file, or keys that are no numbers
                raise InputError(f"{path}: damaged, it cannot be read ({error}); make the cache anew") from error
            if len(keys) != shard["windows"]:
                raise InputError(f"{path}: {len(keys)} windows, the manifest says {shard['windows']}")
            cache._list(shard, keys)
        return cache

    @classmethod
    def create(
        cls, directory: str | Path, identity: CacheIdentity, windows_per_shard: int = 256, data: str | None = None
    ) -> "TargetCache":
        """A cache to add to: new, or the one that is there, if it has this identity.

        One process at a time can hold it, until `close`.

        Args:
            data: content hash of the data whose windows are added; the manifest keeps it with each shard.

        Raises:
            InputError: as `open`; a folder of something else, one that another process adds to, or that cannot be
                written.
        """
        if windows_per_shard < 1:
            raise InputError(f"windows_per_shard={windows_per_shard}: must be a number >= 1")
        directory = Path(directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            found = sorted(file.name for file in directory.iterdir() if file.name not in (LOCK, f".{MANIFEST}.partial"))
            if found and MANIFEST not in found:
                raise InputError(
                    f"directory={str(directory)!r}: no cache, it holds {found[0]} and no {MANIFEST}; choose a new one"
                )
        except OSError as error:
            raise InputError(f"directory={str(directory)!r}: cannot be written ({reason(error)})") from error
        with contextlib.ExitStack() as held:
            held.enter_context(
                lock(directory, f"directory={str(directory)!r}: another process is adding to this cache")
            )
            if not (directory / MANIFEST).exists():
                _write_manifest(directory, identity.settings(), [])
            cache = cls.open(directory, identity.settings())
            listed = {shard["file"] for shard in cache._shards}
            for file in directory.glob("*.safetensors*"):
                if file.name not in listed:  # of a process that was killed
                    file.unlink()
            cache._lock = held.pop_all()
        cache._windows_per_shard, cache._data = windows_per_shard, data
        return cache

    def __len__(self) -> int:
        return len(self._place_of) + len(self._buffer)

    def __contains__(self, key: int) -> bool:
        return key in self._place_of or key in self._buffer

    def __iter__(self) -> Iterator[int]:
        """The keys of all windows that it holds."""
        return itertools.chain(self._place_of, self._buffer)

    def holds(self, keys: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """(W,), which of the windows with these keys (W,) are here."""
        return np.fromiter((key in self for key in keys.tolist()), dtype=np.bool_, count=len(keys))

    @property
    def stored_bytes(self) -> int:
        """Bytes of all listed shards."""
        return sum(shard["bytes"] for shard in self._shards)

    def keys_of(self, tokens: Tensor, labels: Tensor) -> list[int]:
        """`window_keys`, of windows that have the length of those here."""
        if tokens.ndim != 2 or tokens.size(1) != self.seq_len:
            raise InputError(
                f"{self.directory}: tokens of shape {list(tokens.shape)}; its windows have seq_len={self.seq_len}"
            )
        return window_keys(tokens, labels)

    def targets(self, tokens: Tensor, labels: Tensor) -> StoredTargets:
        """Targets of the B windows of a batch, as N = B * L tokens one after the other, fp32, on the tokens' device.

        Args:
            tokens: (B, L) int64.
            labels: (B, L) int64, the tokens one further; -100 is ignored, but for the last one.

        Raises:
            InputError: names the sequence of the batch that is missing or has other labels, or the damaged shard.
        """
        rows = []
        for i, key in enumerate(self.keys_of(tokens, labels)):
            if key not in self:
                begins = ", ".join(map(str, tokens[i, :4].tolist()))
                raise InputError(
                    f"{self.directory}: no targets for sequence {i} of the batch (it begins with {begins}): none of "
                    f"the {len(self)} windows of the cache has these tokens; other data, or windows cut elsewhere "
                    "(TrainingLoader(fixed_windows=True) cuts them as moesaic cache-targets does)?"
                )
            rows.append(self._buffer[key] if key in self._buffer else self._read(key))
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
            surplus = log_probs.logsumexp(dim=-1, keepdim=True)
            log_probs -= surplus if self.identity.form.tail == "none" else surplus.clamp(min=0)
            return TopKTargets(ids.to(tokens.device), log_probs.to(tokens.device), *statistics)
        distinct = _cat(rows, "distinct").long()
        filled = torch.arange(int(distinct.max())) < distinct[:, None]
        padded_ids = torch.zeros(filled.shape, dtype=torch.int64).masked_scatter_(filled, ids)
        weights = torch.zeros(filled.shape, dtype=torch.float32).masked_scatter_(filled, _cat(rows, "weights"))
        return SampledTargets(padded_ids.to(tokens.device), weights.to(tokens.device), *statistics)

    def add(self, tokens: Tensor, labels: Tensor, targets: StoredTargets) -> None:
        """Keep the targets of B windows; a shard is written whenever enough windows have come together.

        Windows that are here already are left as they are. Until `flush`, up to a shard of windows is in memory only.

        Args:
            tokens: (B, L) int64.
            labels: (B, L) int64, the tokens one further.
            targets: of the N = B * L tokens.

        Raises:
            InputError: a cache that was opened to read, other labels, or a full disk.
        """
        if self._lock is None:
            raise InputError(f"{self.directory}: opened to read, nothing can be added")
        for i, key in enumerate(self.keys_of(tokens, labels)):
            if key not in self:
                self._buffer[key] = self._encode(_rows(targets, slice(i * self.seq_len, (i + 1) * self.seq_len)))
                if len(self._buffer) >= self._windows_per_shard:
                    self.flush()

    def flush(self) -> None:
        """Write what is in memory as a shard, whatever its size."""
        if not self._buffer:
            return
        keys, rows = list(self._buffer), list(self._buffer.values())
        tensors = {
            name: np.concatenate([row[name] for row in rows])
            if self._is_ragged(name)
            else np.stack([row[name] for row in rows])
            for name in rows[0]
        }
        tensors["keys"] = np.array(keys, dtype=np.int64)
        if self.settings["kind"] == "sampled":
            tensors["offsets"] = np.cumsum([0, *(len(row["ids"]) for row in rows)], dtype=np.int64)
        content = save(tensors)
        name = f"shard-{len(self._shards):05d}.safetensors"
        try:
            with atomic(self.directory / name) as partial:
                partial.write_bytes(content)
            shard = {
                "file": name,
                "windows": len(keys),
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
                "data": self._data,
            }
            _write_manifest(self.directory, self.settings, [*self._shards, shard])
        except OSError as error:
            why = "no space left on the device" if error.errno == errno.ENOSPC else reason(error)
            raise InputError(
                f"{self.directory / name}: cannot be written ({why}); the shards before it are intact"
            ) from error
        self._list(shard, keys)
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
                raise InputError(f"{path}: cannot be read ({reason(error)})") from error
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

    def _read(self, key: int) -> dict[str, Array]:
        shard, place = self._place_of[key]
        try:
            file, offsets = self._open_shard(shard)
            row = {}
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if self._is_ragged(name):
                    row[name] = file.get_slice(name)[int(offsets[place]) : int(offsets[place + 1])]
                elif name not in ("keys", "offsets"):
                    row[name] = file.get_slice(name)[place : place + 1][0]
        except (SafetensorError, OSError, KeyError, IndexError) as error:
            path = self.directory / self._shards[shard]["file"]
            raise InputError(f"{path}: damaged, row {place} cannot be read ({error})") from error
        return row

    def _map_shard(self, index: int) -> tuple[Any, Array]:
        file = safe_open(self.directory / self._shards[index]["file"], framework="np")
        return file, file.get_tensor("offsets") if self.settings["kind"] == "sampled" else np.zeros(0)

    def _list(self, shard: dict[str, Any], keys: Sequence[int]) -> None:
        self._place_of |= {key: (len(self._shards), place) for place, key in enumerate(keys)}
        self._shards.append(shard)


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
    return {"keys": "int64", **own, **statistics}


def _rows(targets: StoredTargets, rows: slice) -> StoredTargets:
    values: list[Any] = [v[rows].detach().cpu() if isinstance(v, Tensor) else v for v in targets]
    return type(targets)(*values)


def _f16(x: Tensor) -> Array:
    return x.float().clamp(-MAX_F16, MAX_F16).half().numpy()


def _cat(rows: Sequence[Mapping[str, Array]], name: str) -> Tensor:
    joined = np.concatenate([row[name] for row in rows])
    return torch.from_numpy(joined.astype(np.float32 if joined.dtype == np.float16 else np.int64))


# ---- files


@dataclasses.dataclass(frozen=True)
class _Shard:
    """An entry of the manifest."""

    file: str
    windows: int
    bytes: int
    sha256: str
    data: str | None


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not path.is_file():
        raise InputError(f"{directory}: no cache of targets, it has no {MANIFEST}")
    manifest = read_json(path)
    if not {"version", "settings", "shards"} <= manifest.keys():
        raise InputError(f"{path}: not the manifest of a cache of targets")
    if manifest["version"] != VERSION:
        raise InputError(f"{path}: version {manifest['version']!r}; must be {VERSION}, make the cache anew")
    with reading(path):
        for i, shard in enumerate(manifest["shards"]):
            from_mapping(_Shard, shard, f"shards[{i}]")
            if shard["file"] != f"shard-{i:05d}.safetensors":
                raise InputError(f"shards[{i}].file={shard['file']!r}: must be shard-{i:05d}.safetensors")
        require_finite(manifest["settings"], "settings")
        CacheIdentity.from_settings(manifest["settings"])
    return manifest


def _write_manifest(directory: Path, settings: Mapping[str, Any], shards: Sequence[Mapping[str, Any]]) -> None:
    manifest = {"version": VERSION, "settings": settings, "dtypes": _dtypes(settings), "shards": shards}
    write_atomically(directory / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _require(directory: Path, settings: Mapping[str, Any], expect: Mapping[str, Any]) -> None:
    """Raise InputError that names everything in which a cache differs from `expect`."""
    differing = []
    settings, expect = (
        {"tail": "bucket", **given} if given.get("kind") == "top_k" else given for given in (settings, expect)
    )
    for key, wanted in expect.items():
        meaning = MISMATCH[key]
        if key in settings and settings[key] != wanted:
            differing.append(f"{meaning} ({key}={_short(settings[key])} in its {MANIFEST}, {_short(wanted)} here)")
    if differing:
        raise InputError(f"{directory}: this cache " + "; it ".join(differing))


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)
