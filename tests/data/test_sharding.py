"""Text of any size as token ids in several files: the same as in memory, whatever happens in between."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.data import BPETokenizer, DataConfig, load_data, streams
from moesaic.data.loaders import EvaluationLoader, TrainingLoader
from moesaic.data.sharding import write_shards
from moesaic.data.shards import ShardedIds
from moesaic.data.text_files import scan
from moesaic.errors import InputError
from moesaic.files import lock


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    (folder / "inside").mkdir(parents=True)
    for i in range(40):
        lines = "".join(f"def f{j}(x):\r\n    return 'é' * {i * j}\r\n\r\n" for j in range(i + 3))
        (folder / "inside" / f"{i}.py").write_text(lines, newline="")
    shutil.copy(folder / "inside" / "7.py", folder / "again.py")
    (folder / "picture.png").write_bytes(b"\0\1")
    (folder / "latin.txt").write_bytes(b"\xe9\n")
    (folder / "empty.txt").touch()
    return folder


def config(text: Path, **changes: Any) -> DataConfig:
    given = {"source": "files", "path": str(text), "vocab_size": 290, "cache_dir": str(text.parent / "cache")}
    return DataConfig(**{**given, **changes})


def opened(directory: Path) -> Any:
    return load_data(DataConfig(source="memmap", path=str(directory), cache_dir=str(directory.parent / "cache")))


@pytest.mark.slow_but_for("bytes")
@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
def test_the_ids_are_those_of_the_same_text_in_memory(text: Path, tokenizer: str) -> None:
    found = write_shards(config(text, tokenizer=tokenizer), text.parent / "ids", shard_bytes=900)
    expected, data = load_data(config(text, tokenizer=tokenizer)), opened(text.parent / "ids")
    assert data.facts == expected.facts
    assert data.facts["left_out"] == {"binary": 2, "duplicates": 1, "empty": 1}
    assert data.tokenizer.to_dict() == expected.tokenizer.to_dict()
    for split in ("train", "validation"):
        there, here = getattr(expected, split), getattr(data, split)
        np.testing.assert_array_equal(here.tokens, there.tokens)
        assert here.num_bytes == there.num_bytes == found[split]["bytes"]
    assert isinstance(data.train.tokens, ShardedIds)
    assert batches(data.train.tokens) == batches(expected.train.tokens)


def batches(tokens: Any) -> list[Any]:
    """What loaders make of a stream, as plain lists."""
    training = TrainingLoader(tokens, seq_len=100, batch_size=2, num_batches=30, seed=1)
    evaluation = EvaluationLoader(tokens, seq_len=333, batch_size=2)
    return [{name: value.tolist() for name, value in batch.items()} for batch in (*training, *evaluation)]


@pytest.mark.parametrize("line", ["a line of text é\n", "a line of text\r\n", "no line end at all, é"])
@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.93])
def test_a_lone_file_is_cut_as_in_memory(tmp_path: Path, line: str, fraction: float) -> None:
    (tmp_path / "one.txt").write_text("".join(f"{i} {line}" for i in range(4000)), newline="")
    wanted = config(tmp_path / "one.txt", validation_fraction=fraction, tokenizer="bytes")
    write_shards(wanted, tmp_path / "ids", shard_bytes=9000)
    expected, data = load_data(wanted), opened(tmp_path / "ids")
    assert data.facts == expected.facts
    np.testing.assert_array_equal(data.train.tokens, expected.train.tokens)
    np.testing.assert_array_equal(data.validation.tokens, expected.validation.tokens)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["\n", "\r\n", "\r", " ", "\t", "\u3000", "\x1c", "x", "é", "'s", "7", "—", ". "])))
def test_pieces_of_a_file_have_the_ids_of_the_whole(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    text = "".join(["begin", *parts, "\nend"])
    path = tmp_path_factory.mktemp("pieces") / "a.txt"
    path.write_text(text, newline="")
    file = scan(str(path), "a", piece_bytes=5)
    assert not isinstance(file, str)
    pieces = list(file.pieces())
    whole = path.read_bytes().replace(b"\r\n", b"\n")
    assert b"".join(piece.text() for piece in pieces) == whole
    ids = [TOKENIZER.encode(piece.text()) for piece in pieces]
    assert np.concatenate(ids).tolist() == TOKENIZER.encode(whole).tolist()
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]


TOKENIZER = BPETokenizer.train([b"x\n\n x\n  7's\r\n x's. x\n\tx\n" * 9, "é—é\n \n—\n".encode() * 9], 300)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != ".lock"}


@pytest.mark.slow
def test_what_a_process_left_is_kept_and_continued(text: Path) -> None:
    whole, directory = text.parent / "whole", text.parent / "ids"
    write_shards(config(text), whole, shard_bytes=900)

    def stop(what: str, done: int, total: int) -> None:
        if what == "bytes of text" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(config(text), directory, shard_bytes=900, tell=stop)
    with pytest.raises(InputError, match=r"no manifest.json; the moesaic tokenize command that began it continues it"):
        opened(directory)
    with (directory / "done.jsonl").open("a") as file:
        file.write('{"file": "train-000')  # of a kill in the middle of a line
    (directory / ".train-00001.bin.partial").write_bytes(b"half")
    kept = {path.name: path.stat().st_mtime_ns for path in directory.glob("*.bin")}
    told: list[tuple[str, int, int]] = []
    write_shards(config(text), directory, shard_bytes=900, tell=lambda *each: told.append(each))
    assert len(kept) > 3
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in directory.glob("*.bin")}.items()
    assert 0.5 < next(done / total for what, done, total in told if what == "bytes of text") < 1
    (directory / ".train-00001.bin.partial").unlink()
    assert contents(directory) == contents(whole)
    before = contents(whole)
    assert write_shards(config(text), whole, shard_bytes=900) == json.loads(before["manifest.json"])
    assert contents(whole) == before


@pytest.mark.slow_but_for("changes0-vocab_size: 290 there, 280 now-begun")
@pytest.mark.parametrize("state", ["begun", "finished"])
@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"vocab_size": 280}, "vocab_size: 290 there, 280 now"),
        ({"tokenizer": "bytes"}, "tokenizer: 'bpe' there, 'bytes' now"),
        ({"validation_fraction": 0.5}, "text: "),
    ],
)
def test_a_folder_of_something_else_is_refused(text: Path, state: str, changes: dict[str, Any], key: str) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if state == "begun" and what == "bytes of text" and done:
            raise KeyboardInterrupt

    directory = text.parent / "ids"
    with pytest.raises(KeyboardInterrupt) if state == "begun" else contextlib.nullcontext():
        write_shards(config(text), directory, shard_bytes=900, tell=stop)
    before = contents(directory)
    with pytest.raises(InputError, match=rf"made from something else; choose another directory: .*{key}"):
        write_shards(config(text, **changes), directory, shard_bytes=900)
    with pytest.raises(InputError, match=r"shard_bytes: 900 there, 901 now"):
        write_shards(config(text), directory, shard_bytes=901)
    (text / "more.txt").write_text("more\n")
    with pytest.raises(InputError, match=r"made from something else.* text: "):
        write_shards(config(text), directory, shard_bytes=900)
    assert contents(directory) == before


def test_one_process_at_a_time(text: Path) -> None:
    (text.parent / "ids").mkdir()
    with lock(text.parent / "ids", "busy"), pytest.raises(InputError, match=r"ids: another process is writing to it"):
        write_shards(config(text), text.parent / "ids")


def test_what_is_no_place_for_ids(text: Path) -> None:
    with pytest.raises(InputError, match=r"directory='.*inside': it has 0.py; must be new, empty or begun by this"):
        write_shards(config(text / "again.py"), text / "inside")
    (text / "ids").write_text("")
    with pytest.raises(InputError, match=r"directory='.*ids': cannot be written"):
        write_shards(config(text / "again.py"), text / "ids")
    load_data(config(text / "inside", cache_dir=str(text.parent / "cache")))
    [cache] = [path for path in (text.parent / "cache").iterdir() if path.suffix != ".lock"]
    with pytest.raises(InputError, match=r"manifest.json: not written by this command; must be in another directory"):
        write_shards(config(text), cache)


@pytest.mark.parametrize("path", ["", "**/*"])
def test_ids_within_the_text_are_no_text(text: Path, path: str) -> None:
    first = write_shards(config(text / path, tokenizer="bytes"), text / "ids")
    assert write_shards(config(text / path, tokenizer="bytes"), text / "ids") == first
    shutil.rmtree(text / "ids")
    expected = load_data(config(text / path, tokenizer="bytes")).facts["content_hash"]
    assert first["facts"]["content_hash"] == expected


def test_text_that_cannot_be_used(text: Path) -> None:
    with pytest.raises(InputError, match=r"no such file or folder"):
        write_shards(config(text / "none"), text.parent / "ids")
    with pytest.raises(InputError, match=r"binary data \(.*latin.txt\); must be UTF-8 text"):
        write_shards(config(text / "latin.txt"), text.parent / "ids")
    with pytest.raises(InputError, match=r"all 1 files are empty"):
        write_shards(config(text / "empty.txt"), text.parent / "ids")
    with pytest.raises(InputError, match=r"data.source='stdlib': must be files"):
        write_shards(DataConfig(), text.parent / "ids")
    assert not (text.parent / "ids").exists()


def test_text_that_changes_meanwhile_is_refused(text: Path) -> None:
    def change(what: str, done: int, total: int) -> None:
        if what == "bytes of text" and done == 0:
            (text / "inside" / "9.py").write_text("other\n")

    with pytest.raises(InputError, match=r"9.py: has changed while it was read"):
        write_shards(config(text, tokenizer="bytes"), text.parent / "ids", tell=change)


@pytest.mark.slow_but_for("tokenizer")
@pytest.mark.parametrize("damage", ["edit", "cut", "remove", "swap", "manifest", "tokenizer"])
def test_a_damaged_folder_is_refused_by_the_name_of_the_file(text: Path, damage: str) -> None:
    directory = text.parent / "ids"
    write_shards(config(text), directory, shard_bytes=900)
    one, other = directory / "train-00001.bin", directory / "train-00002.bin"
    name, message = "train-00001.bin", "damaged, its sha256 is not that in manifest.json"
    content = bytearray(one.read_bytes())
    if damage == "edit":
        content[10] ^= 1
        one.write_bytes(content)
    elif damage == "cut":
        one.write_bytes(content[:-2])
    elif damage == "remove":
        one.unlink()
        message = "missing or empty"
    elif damage == "swap":
        one.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif damage == "manifest":
        name, message = "manifest.json", "damaged, it is not what was written"
        path = directory / name
        path.write_text(path.read_text().replace('"uint16"', '"uint32"'))
    else:
        name = "tokenizer.json"
        (directory / name).write_text((directory / name).read_text().replace("290", "291") + " ")
    with pytest.raises(InputError, match=rf"{name}: {message}"):
        opened(directory)


def test_a_large_folder_is_read_once_until_it_changes(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = text.parent / "ids"
    write_shards(config(text, tokenizer="bytes"), directory, shard_bytes=900)
    monkeypatch.setattr(streams, "WORTH_A_STAMP", 1)
    stamps = text.parent / "cache"
    opened(directory)
    assert not list(stamps.glob("verified-*.json")), "just written: a change within the same tick would not be seen"
    past = time.time() - 60
    for path in directory.iterdir():
        os.utime(path, (past, past))
    with monkeypatch.context() as later:
        later.setattr(time, "time", lambda: past + 120)  # ctime is now
        opened(directory)
    assert len(list(stamps.glob("verified-*.json"))) == 1
    with monkeypatch.context() as reads_nothing:
        reads_nothing.setattr(hashlib, "file_digest", lambda *each: pytest.fail("read again"))
        opened(directory)
    for path in sorted(directory.glob("train-*.bin"))[:2]:
        content = bytearray(path.read_bytes())
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        os.utime(path, (past, past))
        with pytest.raises(InputError, match=rf"{path.name}: damaged"):
            opened(directory)
        path.write_bytes(content)
        opened(directory)


PEAK = """
import resource, sys
from pathlib import Path
from moesaic.data import BPETokenizer, DataConfig
from moesaic.data.sharding import write_shards
BPETokenizer.train([b"warm up"], 260).encode(b"warm up")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_shards(DataConfig("files", sys.argv[1], vocab_size=300, validation_fraction=0.5), Path(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
"""Prints by how many KiB (Linux) the memory of a process grows."""


@pytest.mark.slow
def test_memory_is_that_of_a_piece_and_not_of_the_text(tmp_path: Path) -> None:
    lines = "".join(f"{i} the quick brown fox, {i * i} times\n" for i in range(2000))
    with (tmp_path / "large.txt").open("w") as file:
        for i in range(100):
            file.write(f"{i}\n{lines}")
    assert (tmp_path / "large.txt").stat().st_size > 7e6
    command = [sys.executable, "-c", PEAK, str(tmp_path / "large.txt"), str(tmp_path / "ids")]
    grown = 1024 * int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown < 150e6, "the records of a tokenizer for all of the text take 200 times its size"


def test_slices_of_shards_are_those_of_the_whole() -> None:
    whole = np.arange(23, dtype=np.uint16)
    sharded = ShardedIds([whole[:5], whole[5:6], whole[6:20], whole[20:]])
    assert len(sharded) == 23
    for start in range(-3, 25):
        for stop in range(-3, 27):
            np.testing.assert_array_equal(sharded[start:stop], whole[start:stop])
    assert np.shares_memory(sharded[7:19], whole)
    assert not np.shares_memory(sharded[4:7], whole)
    np.testing.assert_array_equal(np.asarray(sharded), whole)
    assert sharded[2:9].dtype == sharded.dtype == np.uint16
    with pytest.raises(IndexError):
        sharded[::2]
