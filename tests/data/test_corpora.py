"""Sources of text: what is taken, how it is split, what is refused."""

import os
from pathlib import Path

import pytest

from moesaic.data.corpora import Corpus, load_files, load_huggingface, load_packages, load_stdlib
from moesaic.errors import InputError


def write(folder: Path, **files: bytes) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    return folder


def many(folder: Path, count: int = 40) -> Path:
    return write(folder, **{f"f{i}.txt": f"text number {i}\n".encode() for i in range(count)})


def names(corpus: Corpus) -> tuple[set[str], set[str]]:
    return {d.name for d in corpus.train}, {d.name for d in corpus.validation}


def test_standard_library() -> None:
    corpus = load_stdlib(0.06)
    facts = corpus.facts()
    train, validation = names(corpus)
    assert 5e6 < facts["train_bytes"] < 12e6
    assert 2e5 < facts["validation_bytes"] < 1.5e6
    assert not train & validation
    everything = train | validation
    assert "json/decoder.py" in everything
    assert not [name for name in everything if {"test", "tests", "site-packages", "idlelib"} & set(name.split("/"))]
    texts = [d.text for d in (*corpus.train, *corpus.validation)]
    assert len(set(texts)) == len(texts)
    assert not any(b"\r\n" in text for text in texts)
    assert ("decimal.py" in train) == ("_pydecimal.py" in train)
    assert [d.name for d in corpus.train] == sorted(d.name for d in corpus.train)
    assert load_stdlib(0.06).facts() == facts


@pytest.mark.slow
def test_installed_packages_hold_torch() -> None:
    corpus = load_packages(0.06)
    assert corpus.facts()["train_bytes"] > 2e7
    assert any(name.startswith("torch/") for name in names(corpus)[0])


def test_a_file_stays_on_its_side_whatever_else_is_there(tmp_path: Path) -> None:
    few = load_files(str(many(tmp_path / "few", 30)), 0.2)
    more = load_files(str(many(tmp_path / "more", 60)), 0.2)
    assert names(few)[0] <= names(more)[0]
    assert names(few)[1] <= names(more)[1]
    assert 3 <= len(few.validation) <= 12


def test_every_split_has_something_even_of_two_files(tmp_path: Path) -> None:
    corpus = load_files(str(many(tmp_path, 2)), 0.01)
    assert [len(corpus.train), len(corpus.validation)] == [1, 1]
    corpus = load_files(str(many(tmp_path, 2)), 0.99)
    assert [len(corpus.train), len(corpus.validation)] == [1, 1]


def test_one_file_gives_its_tail_to_validation(tmp_path: Path) -> None:
    text = "".join(f"line {i} é\n" for i in range(1000)).encode()
    (tmp_path / "one.txt").write_bytes(text)
    corpus = load_files(str(tmp_path / "one.txt"), 0.1)
    [head], [tail] = corpus.train, corpus.validation
    assert head.text + tail.text == text
    assert head.text.endswith(b"\n")
    assert len(tail.text) == pytest.approx(0.1 * len(text), rel=0.05)
    (tmp_path / "line.txt").write_bytes("é".encode() * 100)  # no line end to cut at
    corpus = load_files(str(tmp_path / "line.txt"), 0.105)
    corpus.train[0].text.decode()
    corpus.validation[0].text.decode()


def test_globs_hidden_files_duplicates_and_line_ends(tmp_path: Path) -> None:
    folder = many(tmp_path)
    write(folder, **{"skip.md": b"other kind\n", ".hidden.txt": b"secret\n", "copy.txt": b"text number 3\n"})
    write(folder, **{"crlf.txt": b"two\r\nlines\r\n", "sub__deep.txt": b"deep down\n"})
    by_folder = load_files(str(folder), 0.1)
    everything = set.union(*names(by_folder))
    assert "skip.md" in everything
    assert "sub/deep.txt" in everything
    assert ".hidden.txt" not in everything
    assert len({"copy.txt", "f3.txt"} & everything) == 1
    [crlf] = [d for d in (*by_folder.train, *by_folder.validation) if d.name == "crlf.txt"]
    assert crlf.text == b"two\nlines\n"
    by_glob = load_files(str(folder / "**" / "*.txt"), 0.1)
    assert set.union(*names(by_glob)) == everything - {"skip.md"}


def test_content_hash_follows_every_byte(tmp_path: Path) -> None:
    before = load_files(str(many(tmp_path)), 0.1).facts()["content_hash"]
    (tmp_path / "f7.txt").write_bytes(b"text number 8.\n")
    assert load_files(str(tmp_path), 0.1).facts()["content_hash"] != before


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        ({}, "missing", r"missing': no such file or folder"),
        ({}, "*.txt", r"\*.txt': no such file or folder"),
        ({"a.txt": b"", "b.txt": b""}, "", r"all 2 files are empty"),
        ({"a.bin": b"\0\1\2", "b.bin": b"\xff\xfe"}, "", r"binary data \(.*a.bin\); must be UTF-8 text"),
        ({"a.bin": b"\0\1\2"}, "a.bin", r"binary data \(.*a.bin\)"),
        ({"a.txt": b"x"}, "a.txt", r"a.txt: 1 bytes are too few to cut a validation split from"),
    ],
    ids=["missing", "glob without match", "empty", "binary folder", "binary file", "tiny"],
)
def test_unusable_files_are_refused(tmp_path: Path, files: dict[str, bytes], path: str, message: str) -> None:
    write(tmp_path, **files)
    with pytest.raises(InputError, match=message):
        load_files(str(tmp_path / path), 0.1)


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    write(many(tmp_path), **{"image.png": b"\x89PNG\0\0", "none.txt": b"", "copy.txt": b"text number 3\n"})
    (tmp_path / "gone.txt").symlink_to("/proc/self/mem")  # may not be read by anyone
    (tmp_path / "broken.txt").symlink_to("nowhere")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    for path in (tmp_path, tmp_path / "**" / "*"):
        corpus = load_files(str(path), 0.1)
        assert "image.png" not in set.union(*names(corpus))
        counts = {"binary": 1, "duplicates": 1, "empty": 1, "links to nowhere": 2, "unreadable": 1}
        assert corpus.facts()["left_out"] == counts


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    folder, elsewhere = many(tmp_path / "text", 5), many(tmp_path / "elsewhere", 12)
    write(elsewhere, sub__deep=b"far away\n")
    (folder / "a_link").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    (elsewhere / "sub" / "back").symlink_to(folder)
    (folder / "own").mkdir()
    (folder / "own" / "x").write_bytes(b"mine\n")
    (folder / "a_own").symlink_to(folder / "own")
    by_folder = load_files(str(folder), 0.2)
    found = set.union(*names(by_folder))
    assert {"a_link/sub/deep", "own/x"} <= found
    assert not [name for name in found if name.startswith(("loop", "a_own")) or "back" in name]
    for pattern in ("**/*", "**", "**/**/*"):
        by_glob = load_files(f"{folder}/{pattern}", 0.2)
        assert by_glob.facts()["content_hash"] == by_folder.facts()["content_hash"], pattern
    assert set.union(*names(load_files(f"{folder}/**/sub/*", 0.2))) == {"deep", "deep (tail)"}


def test_a_relative_glob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(many(tmp_path))
    by_folder = load_files(".", 0.2).facts()["content_hash"]
    assert load_files("**/*.txt", 0.2).facts()["content_hash"] == by_folder
    assert load_files("*.txt", 0.2).facts()["content_hash"] == by_folder


def test_missing_datasets_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'moesaic\[datasets\]'"):
        load_huggingface("some/dataset", 0.1)


def test_huggingface_rows_become_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    def load_dataset(name: str, split: str) -> dict[str, list[str]]:
        if name != "good":
            raise ValueError("no such data set")
        assert split == "train"
        return {"text": [f"row {i % 50}" for i in range(200)] + [""]}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))  # type: ignore[arg-type]
    corpus = load_huggingface("good", 0.2)
    assert len(corpus.train) + len(corpus.validation) == 50
    texts = [{document.text for document in split} for split in (corpus.train, corpus.validation)]
    assert not texts[0] & texts[1], "a row that stands twice is in one split"
    assert corpus.left_out == {"duplicates": 150, "empty": 1}
    with pytest.raises(InputError, match=r"data.path='bad': no data set with a column `text`"):
        load_huggingface("bad", 0.2)


def test_a_name_that_is_no_utf_8(tmp_path: Path) -> None:
    write(tmp_path, a=b"one\n", b=b"two\n")
    (tmp_path / os.fsdecode(b"\xff.py")).write_bytes(b"three\n")
    corpus = load_files(str(tmp_path), 0.4)
    assert set.union(*names(corpus)) == {"a", "b", "\ufffd.py"}
    corpus.facts()
