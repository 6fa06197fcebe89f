"""Markdown as a reader reads it: paragraphs of prose, without code, tables and markup."""

import re

__all__ = ["paragraphs", "sentences", "words"]

_FENCE = re.compile(r"^ *(```|~~~).*?^ *\1[^\n]*$", re.DOTALL | re.MULTILINE)
_INDENTED = re.compile(r"(?:(?<=\n\n)|\A)(?:(?: {4}|\t)[^\n]*\n?|\n(?= {4}|\t))+")
_TABLE_ROW = re.compile(r"^ *\|.*\|? *$", re.MULTILINE)
_BLOCK_START = re.compile(r"\n(?= *(?:[-*+]|\d+\.) +\S|#|>|:::|!!!)")


def prose(markdown: str, tables: bool = False) -> str:
    """What is left of a page without code blocks, pictures, addresses and, unless asked for, tables."""
    text = _INDENTED.sub("\n", _FENCE.sub("\n", markdown))
    text = re.sub(r"<!--.*?-->|<[^>]+>", "", text, flags=re.DOTALL)
    text = re.sub(r"^(?::::|!!!|\?\?\?).*$", "", text, flags=re.MULTILINE)
    if tables:
        text = re.sub(r"^[ |:-]*$", "", text, flags=re.MULTILINE).replace("|", " ")
    else:
        text = _TABLE_ROW.sub("\n", text)
    text = re.sub(r"!\[([^\]]*)\]\([^)]*\)", r"\1.", text)  # a picture's description is read too
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"`[^`]*`", "code", text)


def paragraphs(markdown: str) -> list[str]:
    """Headings, list items and paragraphs, each on one line."""
    blocks = re.split(r"\n\s*\n", _BLOCK_START.sub("\n\n", prose(markdown)))
    lines = [line for block in blocks for line in (block.split("\n", 1) if block.startswith("#") else [block])]
    return [" ".join(line.split()) for line in lines if line.strip()]


def sentences(markdown: str) -> list[str]:
    """The sentences of a page's prose; a colon does not end one."""
    found = []
    for paragraph in paragraphs(markdown):
        found += re.split(r"(?<=[.?!])[\"'”)*_]*\s+(?=[\"'“(*_]*[A-Z0-9]|code)", paragraph)
    return [sentence for sentence in found if words(sentence)]


def words(text: str) -> list[str]:
    """The words of a plain text; a number with its sign or unit is one, punctuation alone is none."""
    return [word for word in text.split() if re.search(r"\w", word)]
