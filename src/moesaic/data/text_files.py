"""Text files read a piece at a time, so that neither a corpus nor a file of it has to fit into memory."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from moesaic.data.corpora import TAIL, place_to_cut, too_short_to_cut
from moesaic.errors import InputError

__all__ = ["Piece", "TextFile", "cut", "scan"]

PIECE_BYTES = 1 << 18
"""Bytes of a file that are read and encoded at once; a tokenizer's own records take up to 200 times as much."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Part of a file that is encoded by itself, to the same ids as within the whole text.

    It ends behind a line feed that has visible characters on both sides. Byte-level BPE never joins such a line feed
    with the line that follows.
    """

    path: str
    begin: int
    """Bytes in the file before it."""
    end: int
    size: int
    """Bytes of its text, with LF line ends."""
    ends_document: bool

    def text(self) -> bytes:
        """Its text, with LF line ends.

        Raises:
            InputError: the file is no longer what `scan` has seen.
        """
        try:
            text = _text(self.path, self.begin, self.end)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read any more ({error.strerror})") from error
        if len(text) != self.size:
            raise InputError(f"{self.path}: has changed while it was read; must stay as it is. Start again")
        return text


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file of text, or a part of one."""

    path: str
    name: str
    digest: str
    """SHA-256 of its text, with LF line ends."""
    places: tuple[tuple[int, int, int], ...]
    """Begin and end in the file and bytes of text of each piece."""

    @property
    def size(self) -> int:
        """Bytes of its text."""
        return sum(size for _, _, size in self.places)

    def pieces(self) -> Iterator[Piece]:
        for i, place in enumerate(self.places, start=1):
            yield Piece(self.path, *place, ends_document=i == len(self.places))


def scan(path: str, name: str, piece_bytes: int = PIECE_BYTES) -> TextFile | str:
    """Read a file once; returns it, or why it is left out."""
    digest, places, begin, held = hashlib.sha256(), list[tuple[int, int, int]](), 0, b""
    try:
        with Path(path).open("rb") as file:
            while True:
                block = file.read(piece_bytes)
                held += block
                end = _last_place_between(held) if block else len(held)
                text = held[:end].replace(b"\r\n", b"\n")
                if b"\0" in text:
                    return "binary"
                text.decode("utf-8")
                if text:
                    digest.update(text)
                    places.append((begin, begin + end, len(text)))
                begin, held = begin + end, held[end:]
                if not block:
                    return TextFile(path, name, digest.hexdigest(), tuple(places)) if places else "empty"
    except OSError:
        return "unreadable"
    except UnicodeDecodeError:
        return "binary"


def cut(file: TextFile, fraction: float) -> tuple[TextFile, TextFile]:
    """A lone file as text to train on and its last part, as `load_files` cuts it.

    Raises:
        InputError: too little text for that.
    """
    wanted, before, at = round(file.size * (1 - fraction)), 0, 0
    while at < len(file.places) - 1 and before + file.places[at][2] < wanted:
        before += file.places[at][2]
        at += 1
    begin, end, size = file.places[at]
    text = _text(file.path, begin, end)
    kept = place_to_cut(text, wanted - before)
    if at and b"\n" not in text[: wanted - before]:
        kept = 0  # the line feed that ends the piece before is the last one
    if before + kept in (0, file.size):
        raise too_short_to_cut(file.name, file.size)
    middle = begin + _bytes_in_file(_raw(file.path, begin, end), text[:kept])
    head = [*file.places[:at], (begin, middle, kept)]
    tail = [(middle, end, size - kept), *file.places[at + 1 :]]
    name = f"{file.name}{TAIL}"
    return _part(file, file.name, head), _part(file, name, tail)


def _part(file: TextFile, name: str, places: Sequence[tuple[int, int, int]]) -> TextFile:
    return TextFile(file.path, name, f"{file.digest} {name}", tuple(place for place in places if place[2]))


def _bytes_in_file(raw: bytes, text: bytes) -> int:
    """How many bytes of a file `text` was, which is the beginning of `raw` with LF line ends."""
    lines = text.count(b"\n")
    begun = len(text) - text.rfind(b"\n") - 1  # bytes of a line that `text` ends within
    return sum(map(len, raw.split(b"\n")[:lines])) + lines + begun


def _raw(path: str, begin: int, end: int) -> bytes:
    with Path(path).open("rb") as file:
        file.seek(begin)
        return file.read(end - begin)


def _text(path: str, begin: int, end: int) -> bytes:
    return _raw(path, begin, end).replace(b"\r\n", b"\n")


def _last_place_between(raw: bytes) -> int:
    """The last place where a piece may end, 0 if there is none: behind a line feed between two visible characters."""
    at = len(raw)
    while (at := raw.rfind(b"\n", 0, at)) > 0:
        before = raw[max(0, at - 6) : at].removesuffix(b"\r").decode("utf-8", errors="ignore")
        after = raw[at + 1 : at + 5].decode("utf-8", errors="ignore")
        if before and after and not before[-1].isspace() and not after[0].isspace():
            return at + 1
    return 0
