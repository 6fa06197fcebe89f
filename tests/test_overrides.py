"""Values by dotted key, and the text that asks for them."""

import math
from typing import Any

import pytest

from moesaic import imports
from moesaic.config import flatten, require_same
from moesaic.errors import InputError
from moesaic.overrides import apply_overrides, merge, parse_overrides

CONFIG: dict[str, Any] = {"a": {"b": 1, "c": {"d": 2}}, "e": None, "f": {}}


def test_values_are_set_in_a_copy() -> None:
    value = [1]
    changed = apply_overrides(CONFIG, {"a.b": value, "a.c.d": 3}, "here")
    assert changed == {**CONFIG, "a": {"b": [1], "c": {"d": 3}}}
    value.append(2)
    assert changed["a"]["b"] == [1]
    assert CONFIG["a"]["b"] == 1


def test_a_section_that_is_null_is_made() -> None:
    assert apply_overrides(CONFIG, {"e.x.y": 1, "e.z": 2}, "here")["e"] == {"x": {"y": 1}, "z": 2}


@pytest.mark.parametrize("key", ["a.x", "x", "a.b.c", "a.c.e.f", "f.x"])
def test_a_key_that_is_not_there_is_refused(key: str) -> None:
    with pytest.raises(InputError, match=rf"^here\.{key}: the run config has no such key"):
        apply_overrides(CONFIG, {key: 1}, "here")


def test_a_value_takes_no_keys_after_an_override_put_it_there() -> None:
    with pytest.raises(InputError, match=r"here\.a\.b: "):
        apply_overrides(CONFIG, {"a": 1, "a.b": 2}, "here")


def test_merging_is_by_key() -> None:
    assert merge(CONFIG, {"a": {"c": {"d": 4}}, "e": {"x": 1}, "f": 3}) == {
        "a": {"b": 1, "c": {"d": 4}},
        "e": {"x": 1},
        "f": 3,
    }


def test_text_is_read_as_hydra_reads_it() -> None:
    words = ["a=1", "b.c=1e-2", "d=null", "e=true", "f=text", "g=[1,2]", "h={x: 0.5}", "i='1'"]
    assert parse_overrides(words) == {
        **{"a": 1, "b.c": 0.01, "d": None, "e": True, "f": "text", "g": [1, 2], "h": {"x": 0.5}, "i": "1"}
    }


@pytest.mark.parametrize("word", ["a", "=1", "+a=1", "~a", "a=1,2", "a=nan", "a={x: inf}", "a=[1", "a=range(1,3)"])
def test_other_text_is_refused_and_named(word: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_overrides([word])
    assert str(caught.value).startswith(f"{word}: must be")


def test_a_key_stands_once() -> None:
    with pytest.raises(InputError, match="a stands twice"):
        parse_overrides(["a=1", "a=2"])


def test_what_differs_is_listed() -> None:
    wanted = {**CONFIG, "a": {"b": 1.5, "c": {"d": 2}}, "g": True}
    with pytest.raises(InputError, match=r"^there: a\.b: 1 there, 1\.5 now; g: '\(absent\)' there, True now$"):
        require_same("there", CONFIG, wanted)
    require_same("there", CONFIG, wanted, ("a.b", "g"))
    require_same("there", {"a": (1, 2)}, {"a": [1, 2]})


def test_a_name_is_imported_by_path() -> None:
    assert imports.resolve("math.pi", "key") == math.pi
    assert imports.resolve("moesaic.config:flatten", "key") is flatten
    for path in ("math.pie", "moesaic.nothing.here", "flatten", "", "math:"):
        with pytest.raises(InputError, match=r"^key='.*(cannot be imported|must be package.module.name)"):
            imports.resolve(path, "key")
