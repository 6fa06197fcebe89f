"""Edits between texts, by hand and against their definition."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.errors import InputError
from moesaic.evaluation.reading_back import character_error_rate, edit_distance

WORDS = st.text("ab", max_size=5)


def test_by_hand() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3
    assert edit_distance("flaw", "lawn") == 2
    assert character_error_rate(["abcd", ""], ["abxd", "12"]) == (1 + 2) / 6
    assert character_error_rate(["aaaa"], ["b"]) == 4


def definition(one: str, other: str) -> int:
    if not one or not other:
        return len(one) + len(other)
    return min(
        definition(one[1:], other) + 1,
        definition(one, other[1:]) + 1,
        definition(one[1:], other[1:]) + (one[0] != other[0]),
    )


@given(WORDS, WORDS)
def test_it_is_the_fewest_edits(one: str, other: str) -> None:
    assert edit_distance(one, other) == edit_distance(other, one) == definition(one, other)


def test_what_has_no_rate() -> None:
    with pytest.raises(InputError, match="said: 1 texts; must be 2"):
        character_error_rate(["a"], ["a", "b"])
    with pytest.raises(InputError, match="no characters"):
        character_error_rate([""], [""])
