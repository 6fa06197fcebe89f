"""Where text comes from: the Python standard library, installed packages, your files, a Hugging Face data set."""

import dataclasses
import glob
import hashlib
import os
import platform
import sysconfig
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from moesaic.errors import InputError

__all__ = [
    "END_OF_SPLIT",
    "LEFT_OUT_FOLDERS",
    "SMALLEST",
    "TAIL",
    "Corpus",
    "Document",
    "expanded",
    "facts_of",
    "find_files",
    "heading_of",
    "load_files",
    "load_huggingface",
    "load_packages",
    "load_stdlib",
    "nothing_usable",
    "place_to_cut",
    "read_text",
    "relative_name",
    "split_documents",
    "too_short_to_cut",
    "validation_names",
]

LEFT_OUT_FOLDERS = frozenset(
    {"test", "tests", "idlelib", "idle_test", "tkinter", "turtledemo", "lib2to3", "distutils", "ensurepip"}
    | {"encodings", "pydoc_data", "site-packages", "__pycache__"}
)
"""Tests, generated tables, and parts of the standard library that not every installation has."""

SMALLEST = 64
"""Bytes below which a source file is left out: an __init__.py says little."""


@dataclasses.dataclass(frozen=True)
class Document:
    """One text; `name` is its path relative to the source, with forward slashes."""

    name: str
    text: bytes


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents of two splits that share no file."""

    source: str
    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    """How many files or rows are in no split, by the reason."""

    def facts(self) -> dict[str, Any]:
        """What identifies this corpus; compare bits per byte only between equal content hashes."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation):
            for document in split:
                digest.update(heading_of(document.name, len(document.text)))
                digest.update(document.text)
            digest.update(END_OF_SPLIT)
        sizes = [[len(document.text) for document in split] for split in (self.train, self.validation)]
        return facts_of(self.source, sizes[0], sizes[1], self.left_out, digest.hexdigest())


END_OF_SPLIT = b"\1"


def heading_of(name: str, size: int) -> bytes:
    """What stands before the text of a document in what the content hash is of."""
    return f"{name}\0{size}\0".encode()


def facts_of(
    source: str, train: Sequence[int], validation: Sequence[int], left_out: Mapping[str, int], content_hash: str
) -> dict[str, Any]:
    """The facts of a corpus whose documents have these sizes in bytes."""
    return {
        "source": source,
        "python": platform.python_version(),
        "train_files": len(train),
        "train_bytes": sum(train),
        "validation_files": len(validation),
        "validation_bytes": sum(validation),
        "left_out": dict(sorted(left_out.items())),
        "content_hash": content_hash,
    }


def load_stdlib(validation_fraction: float) -> Corpus:
    """The source of the standard library of the running Python."""
    return _python_sources("stdlib", Path(sysconfig.get_paths()["stdlib"]), validation_fraction)


def load_packages(validation_fraction: float) -> Corpus:
    """The Python sources of all packages installed for the running Python."""
    return _python_sources("packages", Path(sysconfig.get_paths()["purelib"]), validation_fraction)


def load_files(path: str, validation_fraction: float) -> Corpus:
    """A folder (all text files in it), a glob, or one file, whose tail is then the validation split.

    Linked folders are followed, each folder once; a folder and the glob FOLDER/**/* are the same files.

    Raises:
        InputError: nothing there, only empty or unreadable files, or binary data.
    """
    left_out: Counter[str] = Counter()
    root, paths = find_files(path, left_out)
    documents: list[Document] = []
    unusable: dict[str, Path] = {}
    for file in paths:
        text = read_text(file)
        if isinstance(text, str):
            left_out[text] += 1
            unusable.setdefault(text, file)
        else:
            documents.append(Document(relative_name(file, root), text))
    if not documents:
        raise nothing_usable(path, len(paths), unusable)
    return split_documents(f"files: {path}", documents, validation_fraction, left_out)


def find_files(path: str, left_out: Counter[str]) -> tuple[Path, list[Path]]:
    """The folder and the files, in order, that a folder, a glob or one file stands for.

    Args:
        left_out: gets the number of folders that cannot be read.

    Raises:
        InputError: no file there.
    """
    given = expanded(path)
    if given.is_dir():
        root = given
        found = [p for folder in _folders(root, left_out) for p in _visible(folder)]
    elif given.is_file():
        root, found = given.parent, [given]
    else:
        found = [Path(match) for match in set(_matches(str(given), left_out))]
        root = Path(os.path.commonpath([p.parent for p in found if p.is_file()] or [Path()]))
        found = [p for p in found if p.is_relative_to(root) and not _hidden(p.relative_to(root))]
    paths = [p for p in found if p.is_file()]
    if broken := sum(p.is_symlink() and not p.exists() for p in found):
        left_out["links to nowhere"] = broken
    if not paths and left_out["unreadable"]:
        raise InputError(f"data.path={path!r}: unreadable; must be a folder you may look into")
    if not paths:
        raise InputError(f"data.path={path!r}: no such file or folder, or no file in it")
    return root, sorted(paths)


def nothing_usable(path: str, found: int, unusable: Mapping[str, Path]) -> InputError:
    """Why no text is in `found` files; `unusable` has the first one by each reason."""
    for reason, must in (("unreadable", "a file you may read"), ("binary", "UTF-8 text without NUL bytes")):
        if reason in unusable:
            return InputError(f"data.path={path!r}: {reason} data ({unusable[reason]}); must be {must}")
    return InputError(f"data.path={path!r}: all {found} files are empty")


def load_huggingface(name: str, validation_fraction: float) -> Corpus:
    """The column "text" of the split "train" of a data set on the Hugging Face hub.

    Raises:
        InputError: the `datasets` package is missing, or there is no such data set or column.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError("data.source='huggingface': it needs pip install 'moesaic[datasets]'") from error
    try:
        rows = datasets.load_dataset(name, split="train")
        texts = list(rows["text"])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"data.path={name!r}: no data set with a column `text` ({error})") from error
    documents, left_out = [], Counter[str]()
    for i, text in enumerate(texts):
        if not text or not isinstance(text, str):
            left_out["empty"] += 1
        else:
            documents.append(Document(f"row {i:09d}", text.encode(errors="replace")))
    if not documents:
        raise InputError(f"data.path={name!r}: all {len(texts)} rows are empty; must have text")
    return split_documents(f"huggingface: {name}", documents, validation_fraction, left_out)


def _python_sources(source: str, root: Path, validation_fraction: float) -> Corpus:
    documents, left_out = [], Counter[str]()
    found = [p for folder in _folders(root, left_out, LEFT_OUT_FOLDERS) for p in folder.glob("*.py") if p.is_file()]
    for path in sorted(found, key=lambda p: relative_name(p, root)):
        folders = path.relative_to(root).parts[:-1]
        generated = path.name.startswith("_sysconfigdata") or any(f.startswith("config-") for f in folders)
        if generated or LEFT_OUT_FOLDERS.intersection(folders):
            continue
        text = read_text(path)
        if isinstance(text, str):
            left_out[text] += 1
        elif len(text) < SMALLEST:
            left_out[f"smaller than {SMALLEST} bytes"] += 1
        else:
            documents.append(Document(relative_name(path, root), text))
    if not documents:
        raise InputError(f"data.source={source!r}: no Python sources under {root}")
    return split_documents(source, documents, validation_fraction, left_out)


def split_documents(source: str, documents: list[Document], fraction: float, left_out: Counter[str]) -> Corpus:
    """Each document falls by a hash of its own name, whatever else is there; a lone one is cut at a line end.

    Of equal texts only the first one stays, so that none is in both splits.
    """
    given, documents = len(documents), list(_without_duplicates(documents))
    left_out = left_out + Counter(duplicates=given - len(documents))
    if len(documents) == 1:
        head, tail = _cut(documents[0], fraction)
        return Corpus(source, (head,), (tail,), left_out)
    validation = validation_names([document.name for document in documents], fraction)
    return Corpus(
        source,
        tuple(document for document in documents if document.name not in validation),
        tuple(document for document in documents if document.name in validation),
        left_out,
    )


def validation_names(names: Sequence[str], fraction: float) -> set[str]:
    """Choose those of at least two documents that are for validation; neither split is empty."""
    places = {name: _place(name) for name in names}
    validation = {name for name, place in places.items() if place < fraction}
    if not validation:  # so few documents that none fell there
        validation = {min(places, key=lambda name: places[name])}
    elif len(validation) == len(places):
        validation.remove(max(places, key=lambda name: places[name]))
    return validation


def _place(name: str) -> float:
    """A number in [0, 1) from a path; twins such as decimal.py and _pydecimal.py get the same one."""
    path = PurePosixPath(name)
    base = path.name.removeprefix("_py").lstrip("_") or path.name
    digest = hashlib.sha256(f"moesaic:{path.with_name(base)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _cut(document: Document, fraction: float) -> tuple[Document, Document]:
    text = document.text
    cut = place_to_cut(text, round(len(text) * (1 - fraction)))
    if cut in (0, len(text)):
        raise too_short_to_cut(document.name, len(text))
    return Document(document.name, text[:cut]), Document(f"{document.name}{TAIL}", text[cut:])


TAIL = " (tail)"
"""What the name of the validation text of a lone file ends in."""


def place_to_cut(text: bytes, wanted: int) -> int:
    """The last line end before `wanted`, or `wanted` if there is none; not inside a UTF-8 sequence."""
    cut = text.rfind(b"\n", 0, wanted) + 1 or wanted
    while cut < len(text) and text[cut] & 0xC0 == 0x80:
        cut += 1
    return cut


def too_short_to_cut(name: str, size: int) -> InputError:
    return InputError(f"{name}: {size} bytes are too few to cut a validation split from")


def _without_duplicates(documents: Iterable[Document]) -> Iterator[Document]:
    seen: set[bytes] = set()
    for document in documents:
        if document.text not in seen:
            seen.add(document.text)
            yield document


def read_text(path: Path) -> bytes | str:
    """The file with LF line ends, or why it is left out."""
    try:
        text = path.read_bytes().replace(b"\r\n", b"\n")
    except OSError:
        return "unreadable"
    if b"\0" in text:
        return "binary"
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return "binary"
    return text or "empty"


def _folders(root: Path, left_out: Counter[str], skipped: frozenset[str] = frozenset()) -> Iterator[Path]:
    """`root` and all folders below it that are not hidden, links followed, each one once.

    A folder that is there itself and by a link has its own name.
    """
    seen, waiting, links = set(), [root], deque[Path]()
    while waiting or links:
        folder = waiting.pop() if waiting else links.popleft()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        try:
            inside = [p for p in _visible(folder) if p.name not in skipped and p.is_dir()]
        except OSError:
            left_out["unreadable"] += 1
            continue
        yield folder
        for each in inside:
            (links if each.is_symlink() else waiting).append(each)


def _visible(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if not _hidden(Path(p.name)))


def _matches(pattern: str, left_out: Counter[str]) -> Iterator[str]:
    """As glob.glob, but ** follows links as `_folders` does, so it ends in a folder that holds a link to itself."""
    while (twice := f"**{os.sep}**{os.sep}") in pattern:
        pattern = pattern.replace(twice, twice[3:])
    first, stars, rest = pattern.partition(f"{os.sep}**{os.sep}")
    if pattern.startswith(f"**{os.sep}"):
        first, stars, rest = ".", "**", pattern[3:]
    elif not stars and (pattern == "**" or pattern.endswith(f"{os.sep}**")):
        first, stars, rest = pattern[:-2].rstrip(os.sep) or ("." if pattern == "**" else os.sep), "**", "*"
    if not stars:
        yield from glob.glob(pattern)
        return
    for top in glob.glob(first or os.sep):
        for folder in _folders(Path(top), left_out) if Path(top).is_dir() else ():
            yield from _matches(f"{glob.escape(str(folder))}{os.sep}{rest}", left_out)


def expanded(path: str) -> Path:
    """The path with ~ and ~name as the home folder; unlike Path.expanduser, the name of nobody stays."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in relative.parts)


def relative_name(path: Path, root: Path) -> str:
    """Its name; of bytes that are no UTF-8 what stands for them."""
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
    return os.fsencode(name).decode(errors="replace")
