"""Bytes to token ids and back: plain bytes, or a byte-level BPE trained on the corpus."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moesaic.errors import InputError
from moesaic.interrupts import answering_signals

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "Tokenizer",
    "meaning_of_ids",
    "same_ids",
    "same_meaning",
    "token_bytes",
    "token_strings",
    "tokenizer_from_dict",
]

END_OF_TEXT = "<|endoftext|>"

Ids = npt.NDArray[np.unsignedinteger[Any]]


class Tokenizer(Protocol):
    """Lossless on UTF-8 text: decode(encode(text)) == text."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def end_of_text(self) -> int:
        """The id that stands between documents; it decodes to nothing."""
        ...

    def encode(self, text: bytes) -> Ids: ...

    def encode_batch(self, texts: Sequence[bytes]) -> list[Ids]: ...

    def decode(self, ids: Iterable[int]) -> bytes:
        """Raises InputError for an id outside the vocabulary."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for `tokenizer_from_dict`."""
        ...


class ByteTokenizer:
    """Ids 0 to 255 are bytes, 256 is the end of text."""

    vocab_size = 257
    end_of_text = 256

    def encode(self, text: bytes) -> Ids:
        return np.frombuffer(text, dtype=np.uint8).astype(np.uint16)

    def encode_batch(self, texts: Sequence[bytes]) -> list[Ids]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> bytes:
        return bytes(i for i in _checked(ids, self.vocab_size) if i != self.end_of_text)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "bytes"}


class BPETokenizer:
    """Byte-level BPE of the `tokenizers` package; every byte has a token, id 0 is the end of text."""

    end_of_text = 0

    def __init__(self, json: str) -> None:
        import tokenizers

        self._json = json
        try:
            self._inner = tokenizers.Tokenizer.from_str(json)
        except BaseException as error:  # its own errors have no class but Exception, a panic of Rust not even that
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise InputError(f"tokenizer of kind bpe: damaged ({error})") from error
        self.vocab_size: int = self._inner.get_vocab_size()
        self._dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32
        spelled = {i: token for token, i in self._inner.get_vocab().items()}
        if set(spelled) != set(range(self.vocab_size)):
            raise InputError("tokenizer of kind bpe: damaged, its ids have gaps")
        self._bytes = [_token_bytes(spelled[i]) for i in range(self.vocab_size)]
        self._bytes[self.end_of_text] = b""

    @classmethod
    def train(cls, texts: Iterable[bytes], vocab_size: int) -> "BPETokenizer":
        """Merges learned from `texts` until there are vocab_size entries (fewer if the texts do not have more).

        Words of more than 10,000 bytes, such as DNA in one line, are cut: the time of a word grows with its square.
        """
        import tokenizers
        from tokenizers import models, pre_tokenizers, trainers

        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        pieces = (piece for text in texts for piece in _cut_words(text.decode()))
        answering_signals(lambda: inner.train_from_iterator(pieces, trainer))
        return cls(inner.to_str())

    def encode(self, text: bytes) -> Ids:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[bytes]) -> list[Ids]:
        # the marker written out in a text is text: only the stream puts real markers between documents
        pieces = [text.decode("utf-8", errors="strict").split(END_OF_TEXT) for text in texts]
        first = iter(self._inner.encode_batch([split[0] for split in pieces]))
        others = [piece for split in pieces for piece in split[1:]]
        rest = iter(self._inner.encode_batch(others, add_special_tokens=False))
        marker = self._encode_marker()
        encoded: list[Ids] = []
        for split in pieces:
            ids: list[int] = []
            for i in range(len(split)):
                ids += [*marker, *next(rest).ids] if i else next(first).ids
            encoded.append(np.array(ids, dtype=self._dtype))
        return encoded

    def _encode_marker(self) -> list[int]:
        """The end-of-text marker as ordinary text, character by character."""
        return [i for character in END_OF_TEXT for i in self._inner.encode(character, add_special_tokens=False).ids]

    def decode(self, ids: Iterable[int]) -> bytes:
        return b"".join(self._bytes[i] for i in _checked(ids, self.vocab_size))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "bpe", "json": self._json}


def meaning_of_ids(tokenizer: dict[str, Any]) -> Any:
    """What two tokenizers of equal ids share, from their `to_dict`, however their files are spelled.

    How ids become text is left out, and so is what only moves offsets.

    Raises:
        InputError: a damaged one.
    """
    if tokenizer["kind"] != "bpe":
        return tokenizer
    import tokenizers

    try:
        content = json.loads(tokenizer["json"])
        content |= {"decoder": None, "post_processor": _that_adds_ids(content.get("post_processor"))}
        return json.loads(tokenizers.Tokenizer.from_str(json.dumps(content)).to_str())
    except Exception as error:  # its own errors have no class but Exception
        raise InputError(f"its tokenizer.json is damaged ({error})") from error


def _that_adds_ids(processor: Any) -> Any:
    """A post-processor without the steps that move offsets alone; None if there are no others."""
    steps = processor["processors"] if processor and processor["type"] == "Sequence" else [processor]
    kept = [step for step in steps if step and step["type"] != "ByteLevel"]
    return {"type": "Sequence", "processors": kept} if kept else None


def same_ids(first: Tokenizer | None, second: Tokenizer | None) -> bool:
    """Whether ids mean the same to both; None is like None alone."""
    if first is None or second is None:
        return first is second
    return same_meaning(first.to_dict(), second.to_dict())


def same_meaning(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """`same_ids` of what `to_dict` gives. Raises InputError as `meaning_of_ids`."""
    return first == second or meaning_of_ids(first) == meaning_of_ids(second)


LONGEST_WORD = 10_000
"""Bytes."""

_LONG_RUN = re.compile(
    "|".join(f"{one}{{{LONGEST_WORD // 4},}}" for one in (r"[^\W\d_]", r"\d", r"(?:[^\w\s]|_)", r"\s"))
)
"""What byte-level BPE takes as one word: letters, digits, other signs or white space, of up to four bytes each."""


def _cut_words(text: str) -> Iterator[str]:
    """The text in pieces that end within words of more than LONGEST_WORD bytes, and nowhere else."""
    begin = 0
    for run in _LONG_RUN.finditer(text):
        word = run.group()
        if len(word.encode()) <= LONGEST_WORD:
            continue
        length = LONGEST_WORD // max(len(character.encode()) for character in set(word))
        for end in range(run.start() + length, run.end(), length):
            yield text[begin:end]
            begin = end
    yield text[begin:]


def tokenizer_from_dict(stored: dict[str, Any]) -> Tokenizer:
    """The tokenizer whose `to_dict` gave `stored`; InputError for what none gives."""
    if not isinstance(stored, dict):
        raise InputError(f"tokenizer: found a {type(stored).__name__}; must be a mapping with its kind")
    if stored.get("kind") == "bytes":
        return ByteTokenizer()
    if stored.get("kind") == "bpe" and isinstance(stored.get("json"), str):
        return BPETokenizer(stored["json"])
    raise InputError(f"tokenizer of kind {stored.get('kind')!r}: must be one of bytes, bpe")


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins: byte-level BPE files spell each byte as one character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


def _token_bytes(token: str) -> bytes:
    if any(character not in BYTE_OF_CHARACTER for character in token):
        return token.encode()  # a special token
    return bytes(BYTE_OF_CHARACTER[character] for character in token)


def _checked(ids: Iterable[int], vocab_size: int) -> Iterable[int]:
    for i in ids:
        if not 0 <= i < vocab_size:
            raise InputError(f"token id {i}: the vocabulary has ids 0 to {vocab_size - 1}")
        yield int(i)


def token_strings(tokenizer: Tokenizer | None) -> list[bytes] | None:
    """The bytes of each token; None without a tokenizer."""
    return None if tokenizer is None else [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]


def token_bytes(tokenizer: Tokenizer) -> list[int]:
    """Length of each token in bytes; the end-of-text marker counts none."""
    lengths = [len(tokenizer.decode([i])) for i in range(tokenizer.vocab_size)]
    lengths[tokenizer.end_of_text] = 0
    return lengths
