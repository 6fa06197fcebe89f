"""A corpus as two streams of token ids on disk, made once and memory-mapped afterwards; or a task."""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import lzma
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moesaic.config import from_mapping, require, to_mapping
from moesaic.data.corpora import Corpus, Document, expanded, load_files, load_huggingface, load_packages, load_stdlib
from moesaic.data.images import PICTURES, TRAIN, PictureKeys, Place
from moesaic.data.pinned import load_pinned
from moesaic.data.shards import ShardedIds, Tokens
from moesaic.data.tasks import TASKS, Task
from moesaic.data.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    Ids,
    Tokenizer,
    same_ids,
    same_meaning,
    tokenizer_from_dict,
)
from moesaic.errors import CannotWrite, InputError, reason
from moesaic.files import sync, write_atomically, write_json
from moesaic.reading import read_json, reading, require_finite

__all__ = [
    "BEGUN",
    "MANIFEST",
    "Data",
    "DataConfig",
    "TokenStream",
    "baselines_of",
    "dtype_for",
    "load_data",
    "manifest_hash",
    "seal",
    "sealed_manifest",
    "shard_name",
]

VERSION = 1
"""Part of every cache key; raise it when the layout or the meaning of a cache folder changes."""

MANIFEST = "manifest.json"
BEGUN = "begun.json"
"""What a folder is made from that moesaic tokenize has not finished."""
SEAL = "sha256"
"""Key of the manifest with the hash of each file, and under the manifest's own name that of its other keys."""

WORTH_A_STAMP = 1 << 28
"""Bytes of a memory map that are not read again at each start where nothing has changed since they were checked."""


TEXTS = ("stdlib", "packages", "pinned", "files", "huggingface")
"""Sources that are read as documents here."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """A source of text, and how it becomes tokens; or a task, which is made of tokens and has its own keys."""

    source: Literal[
        "stdlib",
        "packages",
        "pinned",
        "files",
        "huggingface",
        "memmap",
        "associative_recall",
        "selective_copying",
        "induction",
        "biographies",
        "glyphs",
        "sheets",
        "code_lines",
        "image_folder",
        "image_dataset",
    ] = "stdlib"
    path: str | None = None  # of files, huggingface, memmap, code_lines, image_folder and image_dataset
    tokenizer: Literal["bpe", "bytes"] = "bpe"
    vocab_size: int = dataclasses.field(default=2048, metadata={"most": 2**20})  # of bpe
    validation_fraction: float = 0.06
    cache_dir: str = ".cache"
    task: dict[str, Any] | None = None  # keys of the task or the pictures that `source` names; null: its defaults
    captions: dict[str, Any] | None = None  # source, path and task of pictures whose training texts are read as well

    def __post_init__(self) -> None:
        if self.vocab_size < 257:
            raise ValueError(f"vocab_size={self.vocab_size}: a byte-level BPE needs at least 257 entries")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction={self.validation_fraction}: must be 0 < value < 1")
        needs_path = self.source in ("files", "huggingface", "memmap", "image_folder", "image_dataset")
        if needs_path and not self.path:
            raise ValueError(f"path={self.path}: source={self.source} needs one (data.path=...)")
        if self.path and not needs_path and self.source != "code_lines":
            raise ValueError(f"path={self.path!r}: source={self.source} takes none; for your own text use source=files")
        keyed = (*TASKS, *PICTURES)
        if self.task is not None and self.source not in keyed:
            raise ValueError(f"task={self.task}: source={self.source} takes none; it is for {', '.join(keyed)}")
        if self.source in PICTURES and self.tokenizer != "bytes":
            raise ValueError(f"tokenizer={self.tokenizer}: must be bytes with source={self.source}")
        self.make_task()
        self.make_pictures()
        if self.captions is not None and self.source not in TEXTS:
            raise ValueError(f"captions: source={self.source} takes none; it is for {', '.join(TEXTS)}")
        self.caption_source()

    def make_task(self) -> Task | None:
        """The task, or None for text.

        Raises:
            InputError: an unknown key or impossible value in `task`.
        """
        return from_mapping(TASKS[self.source], self.task or {}, "data.task") if self.source in TASKS else None

    def make_pictures(self) -> PictureKeys | None:
        """The keys of a source of pictures, or None for text and tasks.

        Raises:
            InputError: an unknown key or impossible value in `task`.
        """
        return from_mapping(PICTURES[self.source], self.task or {}, "data.task") if self.source in PICTURES else None

    def caption_source(self) -> "DataConfig | None":
        """The pictures whose training texts are read as well, or None.

        Raises:
            InputError: an unknown key or impossible value in `captions`, or a source without pictures.
        """
        if self.captions is None:
            return None
        shared = {"tokenizer": "bytes", "validation_fraction": self.validation_fraction, "cache_dir": self.cache_dir}
        found = from_mapping(DataConfig, {**self.captions, **shared}, "data.captions")
        if found.source not in PICTURES:
            raise InputError(f"data.captions.source={found.source!r}: must be one of {', '.join(PICTURES)}")
        return found


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """A split: each document after an end-of-text id, and one more at the end."""

    tokens: Tokens
    """(n,) uint16 or uint32, memory-mapped."""
    num_bytes: int | None
    """Bytes of text in it; None if nobody said."""
    documents: tuple[str, ...] | None = None
    """Name of each document, in their order; None of a memory map."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Both splits, ready to train on; of a task both are empty, see `moesaic.data.tasks`."""

    train: TokenStream
    validation: TokenStream
    tokenizer: Tokenizer | None
    vocab_size: int
    facts: dict[str, Any]
    """What identifies the corpus, and under `baselines` the bits per byte of simple compressors on validation."""
    task: Task | None = None
    """In place of text: its loaders make the batches."""


def load_data(config: DataConfig, tokenizer: Tokenizer | None = None) -> Data:
    """The data of `config`, from the cache if they are there.

    Args:
        tokenizer: use this one (a checkpoint's) instead of what the config says.

    Raises:
        InputError: missing, empty, binary or damaged data, a memory map of another tokenizer, no disk space for the
            cache, or a source of pictures, which `moesaic.data.pictures` reads.
    """
    if config.source in PICTURES:
        raise InputError(f"data.source={config.source!r}: it has pictures, and this reads text; must be text or a task")
    if (task := config.make_task()) is not None:
        return _task_data(config.source, task)
    if config.source == "memmap":
        assert config.path is not None  # checked by the config
        data = _open_mapped(expanded(config.path), expanded(config.cache_dir))
        if tokenizer is not None and data.tokenizer is not None and not same_ids(data.tokenizer, tokenizer):
            raise InputError(
                f"data.path={config.path!r}: its ids are of another tokenizer ({_said(data.tokenizer)}) than the "
                f"checkpoint's ({_said(tokenizer)}); must be made with that: moesaic tokenize TEXTS IDS checkpoint=FILE"
            )
        return dataclasses.replace(data, facts={"content_hash": _sampled_hash(data), **data.facts})
    corpus = _load_corpus(config)
    facts = corpus.facts()
    method = "bytes" if config.tokenizer == "bytes" else f"bpe {config.vocab_size}"
    folder = _folder(config, facts, method)
    if tokenizer is not None and not _has_tokenizer(folder, tokenizer):
        text = json.dumps(tokenizer.to_dict(), sort_keys=True)
        folder = _folder(config, facts, hashlib.sha256(text.encode()).hexdigest())
    try:
        data = _open(folder)
        if SEAL not in (manifest := read_json(folder / MANIFEST)):  # an older version made it
            with contextlib.suppress(OSError):  # a cache that can only be read
                seal(folder, manifest)
    except InputError:  # not there, or damaged
        try:
            with _only_one(folder):
                _build(folder, corpus, facts, config, tokenizer)
        except OSError as error:
            file = f": {error.filename}" if error.filename else ""
            raise InputError(
                f"data.cache_dir={config.cache_dir!r}: cannot be written ({reason(error)}{file}); must be a "
                "folder to write to, with room for the tokens"
            ) from error
        data = _open(folder)
    # not from the cache: the corpus is at hand, and its names are part of the key
    train, validation = (
        dataclasses.replace(stream, documents=tuple(document.name for document in documents))
        for stream, documents in ((data.train, corpus.train), (data.validation, corpus.validation))
    )
    return dataclasses.replace(data, train=train, validation=validation, facts={**data.facts, **facts})


def _said(tokenizer: Tokenizer) -> str:
    return f"{tokenizer.to_dict()['kind']} of {tokenizer.vocab_size:,} ids"


def _sampled_hash(data: Data) -> str:
    """A hash of both streams: of up to 64 blocks of 1 MiB each, spread over a stream of any size."""
    digest, block = hashlib.sha256(), 1 << 20
    for stream in (data.train.tokens, data.validation.tokens):
        content = np.asarray(stream).view(np.uint8)
        digest.update(f"{len(content)}\0".encode())
        for start in np.unique(np.linspace(0, max(0, len(content) - block), 64).astype(np.int64)):
            digest.update(content[start : start + block].tobytes())
    return digest.hexdigest()


def _folder(config: DataConfig, facts: dict[str, Any], method: str) -> Path:
    key = hashlib.sha256(f"{VERSION} {facts['content_hash']} {method}".encode()).hexdigest()[:16]
    return expanded(config.cache_dir) / key


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Let one process at a time write a cache folder; the others wait for it."""
    import filelock  # comes with torch

    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_name(f".{folder.name}.lock"), mode=0o666):
        yield


def _has_tokenizer(folder: Path, tokenizer: Tokenizer) -> bool:
    """Whether the ids that are there already are those of `tokenizer`, which so often was trained on this very text."""
    try:
        stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        return same_meaning(stored, tokenizer.to_dict())
    except (OSError, ValueError, LookupError, TypeError, InputError):
        return False


def _task_data(name: str, task: Task) -> Data:
    keys = to_mapping(task)
    digest = hashlib.sha256(f"{VERSION} {name} {json.dumps(keys, sort_keys=True)}".encode()).hexdigest()[:16]
    nothing = TokenStream(np.zeros(0, dtype=np.uint16), None)
    return Data(nothing, nothing, None, task.vocab_size, {"source": name, "content_hash": digest, "task": keys}, task)


def _load_corpus(config: DataConfig) -> Corpus:
    corpus, captions = _load_texts(config), config.caption_source()
    if captions is None:
        return corpus
    pictures = captions.make_pictures()
    assert pictures is not None  # checked by the config
    samples = pictures.load(Place(captions.cache_dir, captions.path, captions.validation_fraction))
    lines = (text.text for i in range(samples.size(TRAIN)) for text in samples.sample(TRAIN, i).texts)
    return dataclasses.replace(corpus, train=(*corpus.train, Document("captions", "\n".join(lines).encode())))


def _load_texts(config: DataConfig) -> Corpus:
    fraction = config.validation_fraction
    if config.source == "stdlib":
        return load_stdlib(fraction)
    if config.source == "packages":
        return load_packages(fraction)
    if config.source == "pinned":
        return load_pinned(fraction)
    assert config.path is not None  # checked by the config
    if config.source == "files":
        return load_files(config.path, fraction)
    return load_huggingface(config.path, fraction)


def _build(
    folder: Path, corpus: Corpus, facts: dict[str, Any], config: DataConfig, tokenizer: Tokenizer | None
) -> None:
    """Write a cache folder beside its place and move it there, so that it is complete or absent.

    What a killed process left is removed. Nothing is done if another process was faster.
    """
    with contextlib.suppress(InputError):
        _open(folder)
        return
    if tokenizer is None and config.tokenizer == "bytes":
        tokenizer = ByteTokenizer()
    elif tokenizer is None:
        tokenizer = BPETokenizer.train((document.text for document in corpus.train), config.vocab_size)
    temporary = folder.with_name(f".{folder.name}.partial")
    for left in (temporary, *folder.parent.glob(f".{folder.name}-*")):  # the latter are of older versions
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir()
    try:
        manifest: dict[str, Any] = {
            "dtype": dtype_for(tokenizer),
            "vocab_size": tokenizer.vocab_size,
            "facts": {**facts, "baselines": _baselines(corpus)},
        }
        for name, documents in (("train", corpus.train), ("validation", corpus.validation)):
            stream = _encode(documents, tokenizer, manifest["dtype"])
            with (temporary / f"{name}.bin").open("wb") as file:
                file.write(stream.data)  # tofile hides why it fails
            sync(temporary / f"{name}.bin")
            manifest[name] = {"tokens": len(stream), "bytes": sum(len(document.text) for document in documents)}
        (temporary / "tokenizer.json").write_text(json.dumps(tokenizer.to_dict()), encoding="utf-8")
        seal(temporary, manifest)
        shutil.rmtree(folder, ignore_errors=True)  # damaged
        temporary.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _encode(documents: Sequence[Document], tokenizer: Tokenizer, dtype: str) -> Ids:
    marker = np.array([tokenizer.end_of_text], dtype=dtype)
    pieces = [marker]
    for first in range(0, len(documents), 128):  # in blocks: the tokenizer's own records are far larger than the ids
        block = [document.text for document in documents[first : first + 128]]
        for ids in tokenizer.encode_batch(block):
            pieces += [ids.astype(dtype), marker]
    return np.concatenate(pieces)


def dtype_for(tokenizer: Tokenizer) -> Literal["uint16", "uint32"]:
    """The smallest type of ids."""
    return "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"


def _baselines(corpus: Corpus) -> dict[str, float]:
    text = b"".join(document.text for document in corpus.validation)
    counts = np.zeros(256, dtype=np.int64)
    for document in corpus.train:
        counts += np.bincount(np.frombuffer(document.text, dtype=np.uint8), minlength=256)
    return baselines_of(counts, np.bincount(np.frombuffer(text, dtype=np.uint8), minlength=256), text)


def baselines_of(
    train: npt.NDArray[np.int64], validation: npt.NDArray[np.int64], text: bytes | None
) -> dict[str, float]:
    """Bits per byte of the validation text: two compressors, and byte frequencies learned on the training text.

    Args:
        train: (256,) how often each byte is in the training text.
        validation: (256,) the same of the validation text.
        text: the validation text; None for no compressors.
    """
    counts, size = 1.0 + train, int(validation.sum())
    baselines = {"byte unigram": -float((validation * np.log2(counts / counts.sum())).sum()) / size}
    if text is not None:
        baselines["gzip -9"] = 8 * len(gzip.compress(text, 9)) / size
        baselines["xz -9e"] = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / size
    return baselines


@dataclasses.dataclass(frozen=True)
class _Split:
    """What a manifest says of a stream."""

    tokens: int | None = None
    bytes: int | None = None
    shards: tuple[int, ...] | None = None  # tokens of each file, if there are several

    def __post_init__(self) -> None:
        for name in ("tokens", "bytes"):
            require(self, name, (getattr(self, name) or 0) >= 0, "a number >= 0, or null")
        if self.shards is not None:
            require(self, "shards", len(self.shards) > 0 and min(self.shards) > 0, "numbers of tokens above 0, or null")
            require(self, "tokens", self.tokens == sum(self.shards), f"{sum(self.shards)}, the sum of the shards")

    def files(self, split: str) -> dict[str, int | None]:
        """Name of each file, and how many tokens are in it if that is known."""
        if self.shards is None:
            return {f"{split}.bin": self.tokens}
        return {shard_name(split, i): tokens for i, tokens in enumerate(self.shards)}


def shard_name(split: str, number: int) -> str:
    """The file of a part of a stream."""
    return f"{split}-{number:05d}.bin"


@dataclasses.dataclass(frozen=True)
class _Manifest:
    """What is read of a manifest; it may say more."""

    dtype: Literal["uint16", "uint32"]
    vocab_size: int
    train: _Split | None = None
    validation: _Split | None = None
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    sha256: dict[str, str] | None = None

    def __post_init__(self) -> None:
        require(self, "vocab_size", self.vocab_size >= 1, "a number >= 1")
        baselines = self.facts.get("baselines", {})
        if not isinstance(baselines, dict) or not all(type(x) in (int, float) for x in baselines.values()):
            raise ValueError(f"facts.baselines={baselines!r}: must be numbers by name")
        for name in ("source", "content_hash"):
            if not isinstance(self.facts.get(name, ""), str):
                raise ValueError(f"facts.{name}={self.facts[name]!r}: must be a string")

    def splits(self) -> dict[str, _Split]:
        return {"train": self.train or _Split(), "validation": self.validation or _Split()}

    def files(self) -> list[str]:
        """Names of all files that may be beside it."""
        return [*(name for split, entry in self.splits().items() for name in entry.files(split)), "tokenizer.json"]


def seal(folder: Path, manifest: dict[str, Any], known: Mapping[str, str] = MappingProxyType({})) -> None:
    """Write the manifest of a folder, with the hashes of all that is in it; those in `known` are not computed."""
    names = [name for name in _manifest_of(manifest).files() if (folder / name).exists()]
    hashes = {name: known.get(name) or _file_hash(folder / name) for name in names}
    hashes[MANIFEST] = manifest_hash(manifest)
    write_atomically(folder / MANIFEST, json.dumps({**manifest, SEAL: hashes}, indent=2))


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_hash(manifest: Mapping[str, Any]) -> str:
    """The hash of all but the hashes."""
    rest = {key: value for key, value in manifest.items() if key != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _manifest_of(content: Mapping[str, Any]) -> _Manifest:
    names = [field.name for field in dataclasses.fields(_Manifest)]
    return from_mapping(_Manifest, {name: content[name] for name in names if name in content})


def _read_manifest(folder: Path) -> _Manifest:
    path = folder / MANIFEST
    if not path.exists():
        begun = (folder / BEGUN).exists()
        advice = "; the moesaic tokenize command that began it continues it" if begun else ""
        raise InputError(f"data.path={str(folder)!r}: it has no {MANIFEST}{advice}")
    with reading(path):
        content = read_json(path)
        require_finite(content, "")
        manifest = _manifest_of(content)
        if manifest.sha256 is not None and manifest.sha256.get(MANIFEST) != manifest_hash(content):
            raise InputError("damaged, it is not what was written")
    return manifest


def sealed_manifest(folder: Path) -> dict[str, Any]:
    """What the manifest of a folder holds, once it and all files are what was written.

    Raises:
        InputError: it names the file that is not.
    """
    _open(folder)
    manifest = read_json(folder / MANIFEST)
    if SEAL not in manifest:
        raise InputError(f"{folder / MANIFEST}: {SEAL}: missing; must hold the hash of each file")
    return manifest


def _require_unchanged(folder: Path, manifest: _Manifest) -> None:
    """Raise InputError that names the first file whose content is not that of its hash."""
    for name in manifest.files() if manifest.sha256 is not None else ():
        with reading(folder / name):
            if (folder / name).exists() and (manifest.sha256 or {}).get(name) != _file_hash(folder / name):
                raise InputError(f"damaged, its sha256 is not that in {MANIFEST}")


def _open_mapped(folder: Path, cache_dir: Path) -> Data:
    """A folder as `_open` has it; the cache remembers that all of a large one was read and found whole.

    What it remembers is sizes and times of the files, so that any change of one has all read again. The processes of
    one machine do not all read it: they wait for the first.
    """
    stamp = cache_dir / f"verified-{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]}.json"
    state = _state_of(folder)
    if sum(size for size, *_ in state.values()) < WORTH_A_STAMP:
        return _open(folder)
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # a cache that can only be read
            held.enter_context(_only_one(stamp))
        if _stored_state(stamp) == state:
            return _open(folder, verified=True)
        began, data = time.time(), _open(folder)
        settled = all(max(times) < (began - 2) * 1e9 for _, *times in state.values())  # later changes have other times
        if settled and _state_of(folder) == state:
            with contextlib.suppress(CannotWrite):
                write_json(stamp, state)
        return data


def _state_of(folder: Path) -> dict[str, list[int]]:
    """Size and times of every file of a folder."""
    with reading(folder):
        found = {path.name: path.stat() for path in sorted(folder.iterdir())} if folder.is_dir() else {}
    return {name: [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in found.items()}


def _stored_state(stamp: Path) -> Any:
    try:
        return json.loads(stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _open(folder: Path, verified: bool = False) -> Data:
    """A folder of train.bin, validation.bin, manifest.json and, optionally, tokenizer.json.

    The manifest needs "dtype" and "vocab_size"; "train" and "validation" may give {"bytes": n}, for bits per byte, and
    {"shards": [tokens, ...], "tokens": their sum} for a stream in several files, train-00000.bin and so on.
    Where it has hashes, all files are read once and compared: about a second for 1 GB. Those of a cache always have.

    Args:
        verified: take the content of the files as good.
    """
    manifest = _read_manifest(folder)
    if not verified:
        _require_unchanged(folder, manifest)
    train, validation = (
        TokenStream(_map(folder, entry.files(split), manifest, verified), entry.bytes)
        for split, entry in manifest.splits().items()
    )
    tokenizer = None
    if (path := folder / "tokenizer.json").exists():
        with reading(path):
            tokenizer = tokenizer_from_dict(read_json(path))
            if tokenizer.vocab_size != manifest.vocab_size:
                raise InputError(f"{path}: {tokenizer.vocab_size} entries, but the manifest says {manifest.vocab_size}")
    facts = {"source": f"memmap: {folder}", **manifest.facts}
    return Data(train, validation, tokenizer, manifest.vocab_size, facts)


def _map(folder: Path, files: Mapping[str, int | None], manifest: _Manifest, verified: bool) -> Tokens:
    """A stream, memory-mapped."""
    found = []
    for name, expected in files.items():
        tokens = _map_file(folder / name, expected, manifest.dtype)
        if not verified:
            _require_in_vocabulary(folder / name, tokens, manifest.vocab_size)
        found.append(tokens)
    return found[0] if len(found) == 1 else ShardedIds(found)


def _map_file(path: Path, expected: int | None, dtype: str) -> Ids:
    size = path.stat().st_size if path.is_file() else 0
    if size == 0 or size % np.dtype(dtype).itemsize:
        raise InputError(f"{path}: {'missing or empty' if size == 0 else f'{size} bytes are not whole {dtype} ids'}")
    tokens: Ids = np.memmap(path, dtype=dtype, mode="r")
    if expected is not None and len(tokens) != expected:
        raise InputError(f"{path}: {len(tokens)} tokens, but the manifest says {expected}: truncated?")
    return tokens


def _require_in_vocabulary(path: Path, tokens: Ids, vocab_size: int) -> None:
    block = 1 << 24
    for start in range(0, len(tokens), block):
        part = tokens[start : start + block]
        if int(part.max()) >= vocab_size:
            at = int(np.argmax(part >= vocab_size))
            raise InputError(
                f"{path}: token id {part[at]} at position {start + at}; the vocabulary has ids 0 to {vocab_size - 1}"
            )
