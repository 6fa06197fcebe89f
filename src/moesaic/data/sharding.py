"""Text of any size to a folder of token ids, in files that are written in parallel: what moesaic tokenize does.

The folder is what `data.source=memmap` reads. While it is unfinished it has begun.json, which says what it is made
from, and done.jsonl, a line per finished file. So a killed process is continued, to equal bytes.
"""

import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moesaic.config import require_same
from moesaic.data.corpora import (
    END_OF_SPLIT,
    facts_of,
    find_files,
    heading_of,
    nothing_usable,
    relative_name,
    validation_names,
)
from moesaic.data.streams import (
    BEGUN,
    MANIFEST,
    VERSION,
    DataConfig,
    baselines_of,
    dtype_for,
    seal,
    sealed_manifest,
    shard_name,
)
from moesaic.data.text_files import PIECE_BYTES, Piece, TextFile, cut, scan
from moesaic.data.tokenizers import BPETokenizer, ByteTokenizer, Tokenizer, tokenizer_from_dict
from moesaic.errors import InputError
from moesaic.files import LOCK, append, atomic, is_locked, lock, write_json
from moesaic.reading import read_json, reading

__all__ = ["write_shards"]

DONE = "done.jsonl"
TOKENIZER = "tokenizer.json"

TRAINED_ON = 1 << 28
"""Bytes of text that a BPE learns from at most, evenly spread over the training split."""

COMPRESSED = 1 << 23
"""Bytes of validation text up to which it is compressed for comparison, in ten seconds."""

Tell = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much it is in total."""


class Split(NamedTuple):
    train: list[TextFile]
    validation: list[TextFile]


def write_shards(
    config: DataConfig,
    directory: Path,
    tokenizer: Tokenizer | None = None,
    *,
    workers: int = 1,
    shard_bytes: int = 1 << 26,
    tell: Tell = lambda what, done, total: None,
) -> dict[str, Any]:
    """Write the ids of the text of `config` into a folder, or what is missing of them; returns its manifest.

    The ids, the split and the hash of the content are those of `load_data` with source files. A file of text is read
    a piece at a time. A BPE learns from at most 256 MiB.

    Args:
        config: its source is files.
        tokenizer: use this one instead of what the config says.
        workers: processes; one for each `shard_bytes` of text at most.
        shard_bytes: bytes of text in a file of ids.

    Raises:
        InputError: unusable text, a folder with something else, or one that another process writes to.
        CannotWrite: no room, or no right to write there.
    """
    if config.source != "files" or config.path is None:
        raise InputError(f"data.source={config.source!r}: must be files, text to read")
    left_out: Counter[str] = Counter()
    root, paths = find_files(config.path, left_out)
    if (place := directory.resolve()).is_relative_to(root.resolve()):  # what this command wrote is no text
        paths = [path for path in paths if not path.resolve().is_relative_to(place)]
    busy = f"{directory}: another process is writing to it"
    _require_ours(directory)
    if is_locked(directory):
        raise InputError(busy)
    size = sum(path.stat().st_size for path in paths if path.exists())
    with _processes(min(workers, 1 + size // shard_bytes)) as pool:
        split, left_out = _split(config, root, paths, left_out, pool, tell)
        _make(directory)
        with lock(directory, busy):
            begun = _begin(directory, config, split, tokenizer, shard_bytes)
            if (directory / MANIFEST).exists():
                return sealed_manifest(directory)
            tokenizer = _tokenizer_in(directory, config, split.train, tokenizer, tell)
            done = _write_missing(directory, split, tokenizer, shard_bytes, pool, tell)
            return _finish(directory, config, split, left_out, tokenizer, done, begun)


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"directory={str(directory)!r}: cannot be written ({error.strerror})") from error


def _require_ours(directory: Path) -> None:
    found = sorted(path.name for path in directory.iterdir() if path.name != LOCK) if directory.is_dir() else []
    if found and not {BEGUN, MANIFEST} & set(found):
        key = f"directory={str(directory)!r}"
        raise InputError(f"{key}: it has {found[0]}; must be new, empty or begun by this command")


def _split(
    config: DataConfig, root: Path, paths: Sequence[Path], left_out: Counter[str], pool: Executor | None, tell: Tell
) -> tuple[Split, Counter[str]]:
    """Read all files once: which are text, and in which split each is."""
    assert config.path is not None
    files: dict[str, TextFile] = {}
    unusable: dict[str, Path] = {}
    names = [relative_name(path, root) for path in paths]
    given = map(str, paths), names
    found = map(scan, *given) if pool is None else pool.map(scan, *given, chunksize=16)
    for number, (path, file) in enumerate(zip(paths, found, strict=True), start=1):
        if isinstance(file, str):
            left_out[file] += 1
            unusable.setdefault(file, path)
        elif files.setdefault(file.digest, file) is not file:
            left_out["duplicates"] += 1
        tell("files read", number, len(paths))
    if not files:
        raise nothing_usable(config.path, len(paths), unusable)
    if len(files) == 1:
        [file] = files.values()
        head, tail = cut(file, config.validation_fraction)
        return Split([head], [tail]), left_out
    chosen = validation_names([file.name for file in files.values()], config.validation_fraction)
    return Split(
        [file for file in files.values() if file.name not in chosen],
        [file for file in files.values() if file.name in chosen],
    ), left_out


def _begin(
    directory: Path, config: DataConfig, split: Split, tokenizer: Tokenizer | None, shard_bytes: int
) -> dict[str, Any]:
    """Say what the folder is made from, or refuse one that is made from something else."""
    text = hashlib.sha256()
    for name, files in split._asdict().items():
        for file in files:
            text.update(f"{name}\0{file.name}\0{file.size}\0{file.digest}\0".encode())
    given = None if tokenizer is None else json.dumps(tokenizer.to_dict(), sort_keys=True)
    begun = {
        "version": VERSION,
        "text": text.hexdigest(),
        "tokenizer": config.tokenizer if given is None else hashlib.sha256(given.encode()).hexdigest(),
        "vocab_size": config.vocab_size if given is None and config.tokenizer == "bpe" else None,
        "shard_bytes": shard_bytes,
    }
    for path, key in ((directory / MANIFEST, "made_from"), (directory / BEGUN, None)):
        if path.exists():
            stored = read_json(path)
            there = stored.get(key) if key else stored
            if not isinstance(there, dict):
                raise InputError(f"{path}: not written by this command; must be in another directory")
            require_same(f"{path}: made from something else; choose another directory", there, begun)
            return begun
    write_json(directory / BEGUN, begun)
    return begun


def _tokenizer_in(
    directory: Path, config: DataConfig, train: Sequence[TextFile], tokenizer: Tokenizer | None, tell: Tell
) -> Tokenizer:
    """The tokenizer of the folder, which is there afterwards."""
    path = directory / TOKENIZER
    if path.exists():
        with reading(path):
            return tokenizer_from_dict(read_json(path))
    if tokenizer is None and config.tokenizer == "bytes":
        tokenizer = ByteTokenizer()
    elif tokenizer is None:
        pieces = [piece for file in train for piece in file.pieces()]
        every = -(-sum(piece.size for piece in pieces) // TRAINED_ON)
        chosen = pieces[::every]
        tell("pieces of text that the BPE learns from", 0, len(chosen))
        tokenizer = BPETokenizer.train(_texts(chosen, tell), config.vocab_size)
    write_json(path, tokenizer.to_dict())
    return tokenizer


def _texts(pieces: Sequence[Piece], tell: Tell) -> Iterator[bytes]:
    for number, piece in enumerate(pieces, start=1):
        yield piece.text()
        tell("pieces of text that the BPE learns from", number, len(pieces))


def _write_missing(
    directory: Path, split: Split, tokenizer: Tokenizer, shard_bytes: int, pool: Executor | None, tell: Tell
) -> dict[str, dict[str, Any]]:
    """Write the files of ids that are not there; returns what is known of each, and of the content as a whole."""
    shards = {
        shard_name(name, number): pieces
        for name, files in split._asdict().items()
        for number, pieces in enumerate(_shards_of(files, shard_bytes))
    }
    sizes = {name: sum(piece.size for piece in pieces) for name, pieces in shards.items()}
    itemsize = np.dtype(dtype_for(tokenizer)).itemsize
    done = _read_done(directory / DONE)
    for name in shards:
        path = directory / name
        if name in done and not (path.is_file() and path.stat().st_size == done[name]["tokens"] * itemsize):
            del done[name]
    written = sum(sizes[name] for name in done if name in sizes)
    tell("bytes of text", written, sum(sizes.values()))
    calls: dict[str, Sequence[Any]] = {} if CONTENT in done else {CONTENT: (_content_hash, split)}
    for name, pieces in shards.items():
        if name not in done:
            first = name.endswith(shard_name("", 0))
            calls[name] = (_write_shard, str(directory / name), pieces, str(directory / TOKENIZER), first)
    for name, found in _results(pool, calls):
        row = {"file": name, **found}
        append(directory / DONE, f"{json.dumps({**row, 'digest': _digest(row)})}\n")
        done[name] = found
        written += sizes.get(name, 0)
        tell("bytes of text", written, sum(sizes.values()))
    return done


CONTENT = "content"
"""Name in done.jsonl of what is no file."""


def _shards_of(files: Sequence[TextFile], shard_bytes: int) -> Iterator[list[Piece]]:
    """The pieces of a split in order, those of one file of ids together."""
    shard, size = list[Piece](), 0
    for file in files:
        for piece in file.pieces():
            shard.append(piece)
            size += piece.size
            if size >= shard_bytes:
                yield shard
                shard, size = [], 0
    if shard:
        yield shard


def _read_done(path: Path) -> dict[str, dict[str, Any]]:
    """What the lines say; one that a kill has cut short, or that is damaged, says nothing."""
    found = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            row = json.loads(line)
            if row.pop("digest") == _digest(row):
                found[row.pop("file")] = row
    return found


def _digest(row: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]


def _content_hash(split: Split) -> dict[str, Any]:
    """The content hash of `Corpus.facts`."""
    digest = hashlib.sha256()
    for files in split:
        for file in files:
            digest.update(heading_of(file.name, file.size))
            for piece in file.pieces():
                digest.update(piece.text())
        digest.update(END_OF_SPLIT)
    return {"sha256": digest.hexdigest()}


@functools.lru_cache(maxsize=1)
def _stored_tokenizer(path: str) -> Tokenizer:
    return tokenizer_from_dict(read_json(Path(path)))


def _write_shard(path: str, pieces: Sequence[Piece], tokenizer_path: str, first: bool) -> dict[str, Any]:
    """Write a file of ids.

    Args:
        first: whether it begins a stream, so that a marker stands before its first document.

    Returns:
        its tokens, bytes of text and hash, and how often each byte is in the text.
    """
    tokenizer = _stored_tokenizer(tokenizer_path)
    dtype = dtype_for(tokenizer)
    marker = np.array([tokenizer.end_of_text], dtype=dtype)
    tokens, digest, counts = 0, hashlib.sha256(), np.zeros(256, dtype=np.int64)
    with atomic(Path(path)) as partial, partial.open("wb") as file:
        for ids, text in _encoded(pieces, tokenizer, [marker] if first else []):
            content = np.concatenate([each.astype(dtype) for each in ids]).tobytes()
            file.write(content)
            digest.update(content)
            tokens += len(content) // marker.itemsize
            counts += np.bincount(np.frombuffer(text, dtype=np.uint8), minlength=256)
    size = sum(piece.size for piece in pieces)
    return {"tokens": tokens, "bytes": size, "sha256": digest.hexdigest(), "counts": counts.tolist()}


def _encoded(pieces: Sequence[Piece], tokenizer: Tokenizer, before: list[Any]) -> Iterator[tuple[list[Any], bytes]]:
    """Ids and text of some pieces at a time, after `before`; a marker follows each document."""
    marker = np.array([tokenizer.end_of_text])
    at = 0
    while at < len(pieces):
        last, size = at, 0
        while last < len(pieces) and (size == 0 or size + pieces[last].size <= PIECE_BYTES):
            size += pieces[last].size
            last += 1
        texts = [piece.text() for piece in pieces[at:last]]
        ids = before
        for piece, each in zip(pieces[at:last], tokenizer.encode_batch(texts), strict=True):
            ids += [each, marker] if piece.ends_document else [each]
        yield ids, b"".join(texts)
        at, before = last, []


def _finish(
    directory: Path,
    config: DataConfig,
    split: Split,
    left_out: Mapping[str, int],
    tokenizer: Tokenizer,
    done: Mapping[str, Mapping[str, Any]],
    begun: Mapping[str, Any],
) -> dict[str, Any]:
    """Write the manifest, with which the folder is whole."""
    numbers = {name: sum(file.startswith(f"{name}-") for file in done) for name in ("train", "validation")}
    names = {name: [shard_name(name, i) for i in range(number)] for name, number in numbers.items()}
    counts = {
        name: np.array([done[file]["counts"] for file in files], dtype=np.int64).sum(axis=0)
        for name, files in names.items()
    }
    validation = [piece for file in split.validation for piece in file.pieces()]
    small = sum(piece.size for piece in validation) <= COMPRESSED
    text = b"".join(piece.text() for piece in validation) if small else None
    sizes = [[file.size for file in files] for files in split]
    facts = facts_of(f"files: {config.path}", sizes[0], sizes[1], left_out, done[CONTENT]["sha256"])
    manifest: dict[str, Any] = {
        "dtype": dtype_for(tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "facts": {**facts, "baselines": baselines_of(counts["train"], counts["validation"], text)},
        "made_from": begun,
    }
    for name, files in names.items():
        shards = [done[file]["tokens"] for file in files]
        manifest[name] = {"tokens": sum(shards), "bytes": sum(done[file]["bytes"] for file in files), "shards": shards}
    seal(directory, manifest, {file: done[file]["sha256"] for files in names.values() for file in files})
    for name in (BEGUN, DONE):
        (directory / name).unlink(missing_ok=True)
    return sealed_manifest(directory)


@contextlib.contextmanager
def _processes(count: int) -> Iterator[Executor | None]:
    """So many processes, which end with this one and with the block, however that ends; None for one."""
    if count == 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")  # a fork would inherit the lock of the folder
    lifeline, end = context.Pipe(duplex=False)
    with ProcessPoolExecutor(count, context, _begin_process, (lifeline,)) as pool, contextlib.closing(end):
        try:
            yield pool
        except BrokenProcessPool as error:
            raise InputError(
                f"workers={count}: one of these processes was killed, maybe for want of memory; must be fewer then. "
                "The same command continues"
            ) from error


def _begin_process(lifeline: Connection) -> None:
    """Become a process of the pool."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its parent hears Ctrl-C
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()


def _end_with(lifeline: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv()
    os._exit(1)


def _results(pool: Executor | None, calls: Mapping[str, Sequence[Any]]) -> Iterator[tuple[str, Any]]:
    """What each call (a function and its arguments) returns, as they end."""
    if pool is None:
        for name, (function, *arguments) in calls.items():
            yield name, function(*arguments)
        return
    waiting = {pool.submit(*call): name for name, call in calls.items()}
    for future in as_completed(waiting):
        yield waiting[future], future.result()
