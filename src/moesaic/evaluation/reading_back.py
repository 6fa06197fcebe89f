"""How well text in a picture was read: edits from what a model said to what stands there."""

from collections.abc import Sequence

from moesaic.errors import InputError

__all__ = ["character_error_rate", "edit_distance"]


def edit_distance(said: str, right: str) -> int:
    """The fewest insertions, deletions and replacements that make one text of the other (Levenshtein)."""
    before = list(range(len(right) + 1))
    for i, one in enumerate(said, start=1):
        row = [i]
        for j, other in enumerate(right, start=1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (one != other)))
        before = row
    return before[-1]


def character_error_rate(said: Sequence[str], right: Sequence[str]) -> float:
    """Edits over characters, of all texts together; more than 1 where too much was said.

    Args:
        said: what a model read in each picture.
        right: what stands there.

    Raises:
        InputError: another number of texts, or no character to read.
    """
    if len(said) != len(right):
        raise InputError(f"said: {len(said)} texts; must be {len(right)}, as many as were to be read")
    characters = sum(map(len, right))
    if not characters:
        raise InputError("right: no characters; must have some to read")
    return sum(map(edit_distance, said, right)) / characters
