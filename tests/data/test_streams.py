"""Corpora as cached token streams."""

import errno
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesaic.config import from_mapping
from moesaic.data import BPETokenizer, ByteTokenizer, DataConfig, load_data
from moesaic.data.tokenizers import END_OF_TEXT
from moesaic.errors import InputError


def caches(folder: Path) -> list[Path]:
    """What is in the cache beside `folder`, without locks."""
    return [path for path in (folder.parent / "cache").iterdir() if path.suffix != ".lock"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    for i in range(30):
        (tmp_path / "text" / f"{i}.py").write_text(f"def f{i}(x):\n    return x * {i}\n" * 5)
    return tmp_path / "text"


def config(folder: Path, **changes: Any) -> DataConfig:
    return DataConfig(
        **{
            "source": "files",
            "path": str(folder),
            "vocab_size": 280,
            "cache_dir": str(folder.parent / "cache"),
            **changes,
        }
    )


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_stream_is_the_documents_between_markers(folder: Path, tokenizer: str) -> None:
    data = load_data(config(folder, tokenizer=tokenizer))
    assert data.tokenizer is not None
    end = data.tokenizer.end_of_text
    for stream in (data.train, data.validation):
        ids = np.array(stream.tokens)
        assert ids[0] == ids[-1] == end
        assert len(data.tokenizer.decode(ids.tolist())) == stream.num_bytes
    texts = np.split(np.array(data.train.tokens), np.flatnonzero(data.train.tokens == end))[1:-1]
    decoded = {data.tokenizer.decode(ids.tolist()) for ids in texts}
    assert decoded <= {path.read_bytes() for path in folder.iterdir()}
    assert len(decoded) == data.facts["train_files"]


def test_stream_knows_the_names_of_its_documents(folder: Path) -> None:
    for _ in range(2):  # built, and from the cache
        data = load_data(config(folder))
        assert data.tokenizer is not None
        for stream in (data.train, data.validation):
            ids = np.array(stream.tokens)
            texts = np.split(ids, np.flatnonzero(ids == data.tokenizer.end_of_text))[1:-1]
            assert stream.documents is not None
            for name, text in zip(stream.documents, texts, strict=True):
                assert data.tokenizer.decode(text.tolist()) == (folder / name).read_bytes()
    [cache] = caches(folder)
    assert load_data(DataConfig(source="memmap", path=str(cache))).validation.documents is None


def test_baselines_are_what_the_compressors_say(folder: Path) -> None:
    import gzip
    import lzma

    data = load_data(config(folder))
    assert data.tokenizer is not None
    text = data.tokenizer.decode(np.array(data.validation.tokens).tolist())
    baselines = data.facts["baselines"]
    assert baselines["gzip -9"] == pytest.approx(8 * len(gzip.compress(text, 9)) / len(text))
    assert baselines["xz -9e"] == pytest.approx(
        8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    )
    assert 3 < baselines["byte unigram"] < 8


def test_second_time_comes_from_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_data(config(folder))
    monkeypatch.setattr(BPETokenizer, "train", lambda *arguments: pytest.fail("built again"))
    second = load_data(config(folder))
    np.testing.assert_array_equal(first.train.tokens, second.train.tokens)
    assert first.facts == second.facts


def test_changed_text_or_tokenizer_is_another_cache(folder: Path) -> None:
    load_data(config(folder))
    load_data(config(folder, vocab_size=270))
    (folder / "0.py").write_text("something else entirely\n" * 9)
    load_data(config(folder))
    assert len(caches(folder)) == 3


@pytest.mark.parametrize("damage", ["truncate", "remove", "garbage"])
def test_damaged_cache_is_built_again(folder: Path, damage: str) -> None:
    good = load_data(config(folder))
    tokens = np.array(good.train.tokens)
    [cache] = caches(folder)
    if damage == "truncate":
        (cache / "train.bin").write_bytes((cache / "train.bin").read_bytes()[:-10])
    elif damage == "remove":
        (cache / "validation.bin").unlink()
    else:
        (cache / "manifest.json").write_text("{")
    np.testing.assert_array_equal(load_data(config(folder)).train.tokens, tokens)


def test_two_builders_at_once_do_not_break_each_other(folder: Path) -> None:
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(load_data(config(folder)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert len(caches(folder)) == 1


def test_full_disk_names_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(
        InputError, match=r"data.cache_dir='.*cache': cannot be written \(No space left on device\); must be a folder"
    ):
        load_data(config(folder))
    assert caches(folder) == []


def test_what_a_killed_process_left_is_removed(folder: Path) -> None:
    load_data(config(folder))
    [cache] = caches(folder)
    cache.rename(cache.with_name(f".{cache.name}.partial"))
    cache.with_name(f".{cache.name}-a1b2c3d4").mkdir()
    load_data(config(folder))
    assert caches(folder) == [cache]


def test_modes_are_by_the_umask(folder: Path) -> None:
    before = os.umask(0o022)
    try:
        load_data(config(folder))
    finally:
        os.umask(before)
    [cache] = caches(folder)
    assert cache.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in cache.iterdir()} == {0o644}


def test_a_file_as_cache_is_named(folder: Path) -> None:
    (folder.parent / "cache").write_text("")
    with pytest.raises(InputError, match=r"data.cache_dir='.*cache': cannot be written \(.*\); must be a folder"):
        load_data(config(folder))


def test_a_home_folder_is_found_in_quoted_paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    found = [
        load_data(config(folder, path=path, cache_dir="~/cache", tokenizer="bytes")).facts["content_hash"]
        for path in (str(folder), "~/text", "~/text/*.py", "~/text/**/*.py")
    ]
    assert len(set(found)) == 1
    assert len(caches(folder)) == 1


def test_a_given_tokenizer_is_used(folder: Path) -> None:
    other = load_data(config(folder, vocab_size=265)).tokenizer
    assert other is not None
    data = load_data(config(folder, vocab_size=280), other)
    assert data.vocab_size == 265
    assert data.tokenizer is not None
    assert data.tokenizer.to_dict() == other.to_dict()


def memmap(folder: Path, ids: list[int], **manifest: Any) -> DataConfig:
    folder.mkdir()
    for split in ("train", "validation"):
        np.array(ids, dtype=np.uint16).tofile(folder / f"{split}.bin")
    (folder / "manifest.json").write_text(json.dumps({"dtype": "uint16", "vocab_size": 100, **manifest}))
    return DataConfig(source="memmap", path=str(folder))


def test_memmap_of_ones_own(tmp_path: Path) -> None:
    data = load_data(memmap(tmp_path / "mine", list(range(100)), validation={"bytes": 321}))
    assert data.train.tokens.tolist() == list(range(100))
    assert (data.train.num_bytes, data.validation.num_bytes) == (None, 321)
    assert data.tokenizer is None
    assert data.vocab_size == 100


def test_memmap_of_a_cache_folder(folder: Path) -> None:
    cached = load_data(config(folder))
    [cache] = caches(folder)
    data = load_data(DataConfig(source="memmap", path=str(cache)))
    np.testing.assert_array_equal(data.train.tokens, cached.train.tokens)
    assert data.tokenizer is not None
    load_data(DataConfig(source="memmap", path=str(cache)), data.tokenizer)
    refused = (
        r"another tokenizer \(bpe of \d+ ids\) than the checkpoint's \(bytes of 257 ids\); must be made with that: "
    )
    with pytest.raises(InputError, match=refused + "moesaic tokenize TEXTS IDS checkpoint=FILE"):
        load_data(DataConfig(source="memmap", path=str(cache)), ByteTokenizer())


def test_how_a_tokenizer_is_spelled_does_not_matter(folder: Path) -> None:
    """What transformers writes has other spaces, other escapes, a decoder, and merges as pairs or as words."""
    cached = load_data(config(folder))
    assert isinstance(cached.tokenizer, BPETokenizer)
    content = json.loads(cached.tokenizer.to_dict()["json"])
    content["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    content["post_processor"] = {**content["decoder"], "trim_offsets": False}
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    back = BPETokenizer(json.dumps(content, indent=2, ensure_ascii=False))
    [cache] = caches(folder)
    load_data(DataConfig(source="memmap", path=str(cache)), back)
    load_data(config(folder), back)
    assert caches(folder) == [cache], "nothing was tokenized again"
    beginning = {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    markers = {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [0], "tokens": [END_OF_TEXT]}}
    begins = {"type": "TemplateProcessing", "single": beginning, "pair": beginning, "special_tokens": markers}
    with_beginning = BPETokenizer(json.dumps({**content, "post_processor": begins}))
    with pytest.raises(InputError, match="of another tokenizer"):
        load_data(DataConfig(source="memmap", path=str(cache)), with_beginning)
    text = f"a{END_OF_TEXT}b".encode()
    assert with_beginning.encode(text).tolist() == [0, *back.encode(text).tolist()], "it begins once"
    first, second = content["model"]["merges"][:2]
    content["model"]["merges"][:2] = [second, first]
    with pytest.raises(InputError, match="of another tokenizer"):
        load_data(DataConfig(source="memmap", path=str(cache)), BPETokenizer(json.dumps(content)))


def test_memmap_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train.bin: token id 100 at position 2; the vocabulary has ids 0 to 99"):
        load_data(memmap(tmp_path / "a", [1, 2, 100]))
    with pytest.raises(InputError, match=r"train.bin: 3 tokens, but the manifest says 5: truncated\?"):
        load_data(memmap(tmp_path / "b", [1, 2, 3], train={"tokens": 5}))
    with pytest.raises(InputError, match=r"manifest\.json: dtype: found 'int8' \(str\).*; must be uint16 \| uint32"):
        load_data(memmap(tmp_path / "c", [1], dtype="int8"))
    odd = memmap(tmp_path / "d", [1, 2])
    (tmp_path / "d" / "train.bin").write_bytes(b"abc")
    with pytest.raises(InputError, match=r"train.bin: 3 bytes are not whole uint16 ids"):
        load_data(odd)
    shutil.rmtree(tmp_path / "d")
    with pytest.raises(InputError, match=r"it has no manifest.json"):
        load_data(odd)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": 100}, r"data.vocab_size=100: a byte-level BPE needs at least 257 entries"),
        ({"validation_fraction": 1.5}, r"data.validation_fraction=1.5: must be 0 < value < 1"),
        ({"source": "files"}, r"data.path=None: source=files needs one"),
        ({"source": "stdlib", "path": "x"}, r"data.path='x': source=stdlib takes none"),
        ({"source": "web"}, r"data.source: found 'web' \(str\); must be stdlib \| packages"),
    ],
)
def test_bad_config_names_its_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_mapping(DataConfig, values, "data")
