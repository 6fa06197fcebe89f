"""Plain mappings to strict dataclasses and back."""

import dataclasses
import typing
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.config import flatten, from_mapping, to_mapping
from moesaic.data.tasks import TASKS
from moesaic.errors import InputError
from moesaic.evaluation.copying import CopyingConfig
from moesaic.evaluation.needle import NeedleConfig
from moesaic.models import DecoderConfig
from moesaic.studies.config import StudyConfig
from moesaic.training.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int
    mode: Literal["fast", "slow"] = "fast"

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width={self.width}: must be a number >= 1")


@dataclasses.dataclass(frozen=True)
class Other:
    height: int
    width: int
    depth: int


@dataclasses.dataclass(frozen=True)
class Either:
    part: Inner | Other | None = None


@pytest.mark.parametrize("part", [None, Inner(3), Inner(3, "slow"), Other(1, 2, 3)])
def test_of_two_dataclasses_the_one_that_fits_is_made(part: Inner | Other | None) -> None:
    assert from_mapping(Either, to_mapping(Either(part))) == Either(part)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"width": 0}, r"part\.width=0: must be a number >= 1"),
        ({"width": 1, "mod": "fast"}, r"part\.mod: unknown key \(did you mean part\.mode\?\)"),
        ({"height": 1, "width": 2}, r"part\.depth: missing; it needs an integer"),
        (3, r"part: found 3 \(int\); must be a mapping or a mapping or null"),
    ],
)
def test_a_message_is_that_of_the_dataclass_that_was_meant(part: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_mapping(Either, {"part": part})


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    rate: float = 0.5
    steps: int = 10
    on: bool = False
    maybe: int | None = None
    optional: Inner | None = None
    several: tuple[Inner, ...] = ()
    listed: tuple[Inner, ...] | None = None
    betas: tuple[float, ...] = (0.9, 0.95)
    table: dict[str, int] = dataclasses.field(default_factory=dict)
    part: Literal["a", "b"] | dict[str, Any] = "a"
    number_or_text: int | str = 0
    size: Literal[1, 2] = 1
    anything: Any = None

    def __post_init__(self) -> None:
        if self.inner.width > 99:
            raise ValueError(f"inner.width={self.inner.width}: must be a number <= 99")
        if self.name == "taken":
            raise InputError("said in its own words")


def build(where: str = "run", **changes: Any) -> Outer:
    return from_mapping(Outer, {"name": "x", "inner": {"width": 3}, **changes}, where)


def test_defaults_and_nesting() -> None:
    assert build() == Outer(name="x", inner=Inner(3))
    assert build(inner={"width": 4, "mode": "slow"}).inner == Inner(4, "slow")
    assert build(optional={"width": 2}, several=[{"width": 1}, {"width": 2}]) == Outer(
        name="x", inner=Inner(3), optional=Inner(2), several=(Inner(1), Inner(2))
    )


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("rate", 2, 2.0),
        ("steps", 1e4, 10000),
        ("betas", [0, 1], (0.0, 1.0)),
        ("betas", (0.5,), (0.5,)),
        ("maybe", None, None),
        ("maybe", 3, 3),
        ("optional", None, None),
        ("table", {"a": 1}, {"a": 1}),
        ("part", "b", "b"),
        ("part", {"type": "x.Y"}, {"type": "x.Y"}),
        ("number_or_text", "many", "many"),
        ("number_or_text", 7, 7),
        ("size", 2, 2),
        ("listed", [{"width": 5}], (Inner(5),)),
        ("anything", [1, {"a": None}], [1, {"a": None}]),
    ],
)
def test_good_values(key: str, value: Any, expected: Any) -> None:
    found = getattr(build(**{key: value}), key)
    assert found == expected
    assert type(found) is type(expected)
    if isinstance(expected, tuple):
        assert [type(item) for item in found] == [type(item) for item in expected]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nmae": 1}, r"run\.nmae: unknown key \(did you mean run\.name\?\); must be one of name, inner, rate"),
        ({"zzzzzz": 1}, r"run\.zzzzzz: unknown key; must be one of name, inner, rate"),
        (
            {"inner": {"widht": 1}},
            r"run\.inner\.widht: unknown key \(did you mean run\.inner\.width\?\); must be one of width, mode",
        ),
        ({"inner": {}}, r"run\.inner\.width: missing; it needs an integer"),
        ({"inner": 3}, r"run\.inner: found 3 \(int\); must be a mapping of \['width', 'mode'\]"),
        ({"inner": None}, r"run\.inner: found None \(NoneType\)"),
        ({"inner": {"width": 0}}, r"run\.inner\.width=0: must be a number >= 1"),
        ({"inner": {"width": 100}}, r"run\.inner\.width=100: must be a number <= 99"),
        (
            {"inner": {"width": 1, "mode": "quick"}},
            r"run\.inner\.mode: found 'quick' \(str\); must be fast \| slow",
        ),
        ({"name": 3}, r"run\.name: found 3 \(int\); must be a string"),
        ({"name": "taken"}, r"^said in its own words$"),
        ({"rate": "1e-3"}, r"run\.rate: found '1e-3' \(str\); must be a number"),
        ({"rate": True}, r"run\.rate: found True \(bool\); must be a number"),
        ({"rate": None}, r"run\.rate: found None \(NoneType\); must be a number"),
        ({"steps": 1.5}, r"run\.steps: found 1\.5 \(float\); must be an integer"),
        ({"steps": True}, r"run\.steps: found True \(bool\); must be an integer"),
        ({"steps": float("inf")}, r"run\.steps: found inf \(float\); must be an integer"),
        ({"steps": float("nan")}, r"run\.steps: found nan \(float\); must be an integer"),
        ({"on": 1}, r"run\.on: found 1 \(int\); must be true or false"),
        ({"on": "yes"}, r"run\.on: found 'yes' \(str\); must be true or false"),
        ({"maybe": "3"}, r"run\.maybe: found '3' \(str\); must be an integer or null"),
        ({"optional": 3}, r"run\.optional: found 3 \(int\); must be a mapping or null"),
        ({"optional": {"width": "w"}}, r"run\.optional\.width: found 'w' \(str\); must be an integer"),
        (
            {"optional": {"with": 1}},
            r"run\.optional\.with: unknown key \(did you mean run\.optional\.width\?\)",
        ),
        ({"several": {"width": 1}}, r"run\.several: found .*; must be a list of a mapping"),
        ({"several": "abc"}, r"run\.several: found 'abc' \(str\); must be a list of a mapping"),
        (
            {"several": [{"width": 1}, {"width": "w"}]},
            r"run\.several\[1\]\.width: found 'w' \(str\); must be an integer",
        ),
        ({"several": [{"width": 0}]}, r"run\.several\[0\]\.width=0: must be a number >= 1"),
        (
            {"listed": [{"width": 1}, {"width": "w"}]},
            r"run\.listed\[1\]\.width: found 'w' \(str\); must be an integer",
        ),
        ({"listed": 3}, r"run\.listed: found 3 \(int\); must be a list of a mapping or null"),
        ({"betas": [0.9, "b"]}, r"run\.betas\[1\]: found 'b' \(str\); must be a number"),
        ({"table": {"a": "b"}}, r"run\.table\.a: found 'b' \(str\); must be an integer"),
        ({"table": [1]}, r"run\.table: found \[1\] \(list\); must be a mapping"),
        ({"part": "c"}, r"run\.part: found 'c' \(str\); must be a \| b or a mapping"),
        ({"size": 3}, r"run\.size: found 3 \(int\); must be 1 \| 2"),
        ({"size": True}, r"run\.size: found True \(bool\); must be 1 \| 2"),  # True == 1
        (
            {"number_or_text": 1.5},
            r"run\.number_or_text: found 1\.5 \(float\); must be an integer or a string",
        ),
    ],
)
def test_bad_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(**changes)


def test_without_a_path_the_message_starts_with_the_key() -> None:
    with pytest.raises(InputError, match=r"^inner\.width=0: must be"):
        build(where="", inner={"width": 0})
    with pytest.raises(InputError, match=r"^name: missing; it needs a string$"):
        from_mapping(Outer, {"inner": {"width": 1}})
    with pytest.raises(InputError, match=r"^Outer: found \[\] \(list\); must be a mapping"):
        from_mapping(Outer, [])  # type: ignore[arg-type]


def test_the_cause_is_kept() -> None:
    with pytest.raises(InputError) as caught:
        build(inner={"width": 0})
    assert isinstance(caught.value.__cause__, ValueError)


def test_other_errors_of_a_dataclass_are_not_hidden() -> None:
    @dataclasses.dataclass
    class Broken:
        x: int = 1

        def __post_init__(self) -> None:
            raise KeyError("a mistake in the code")

    with pytest.raises(KeyError):
        from_mapping(Broken, {})


def test_to_mapping_is_plain() -> None:
    config = build(optional={"width": 2}, several=[{"width": 1}], part={"type": "x.Y", "sizes": (1, 2)})
    plain = to_mapping(config)
    assert plain["optional"] == {"width": 2, "mode": "fast"}
    assert plain["several"] == [{"width": 1, "mode": "fast"}]
    assert plain["betas"] == [0.9, 0.95] and type(plain["betas"]) is list
    assert plain["part"] == {"type": "x.Y", "sizes": [1, 2]}
    assert plain["listed"] is None


inner = st.builds(Inner, width=st.integers(1, 99), mode=st.sampled_from(["fast", "slow"]))


@given(
    st.builds(
        Outer,
        name=st.text(max_size=3),
        inner=inner,
        rate=st.floats(allow_nan=False, allow_infinity=False),
        steps=st.integers(),
        on=st.booleans(),
        maybe=st.none() | st.integers(),
        optional=st.none() | inner,
        several=st.lists(inner, max_size=2).map(tuple),
        listed=st.none() | st.lists(inner, max_size=2).map(tuple),
        betas=st.lists(st.floats(0, 1), max_size=2).map(tuple),
        table=st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
        part=st.sampled_from(["a", "b"]) | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
        number_or_text=st.integers() | st.text(max_size=3),
        size=st.sampled_from([1, 2]),
    )
)
def test_round_trip(config: Outer) -> None:
    assert from_mapping(Outer, to_mapping(config)) == config


def test_flatten() -> None:
    nested = {"a": 1, "b": {"c": {"d": [1, {"e": 2}]}, "f": None}, "g": {}}
    assert flatten(nested) == {"a": 1, "b.c.d": [1, {"e": 2}], "b.f": None, "g": {}}
    assert flatten({}) == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400])
def test_numbers_must_be_finite(value: float) -> None:
    with pytest.raises(InputError, match=r"^run\.rate=-?(nan|inf): must be a finite number$"):
        build(rate=value)
    with pytest.raises(InputError, match=r"^run\.betas\[1\]=-?(nan|inf): must be a finite number$"):
        build(betas=[0.5, value])


@dataclasses.dataclass(frozen=True)
class Bounded:
    steps: int = dataclasses.field(default=1, metadata={"most": 100})
    seeds: tuple[int, ...] = dataclasses.field(default=(), metadata={"most": 7})
    rate: float | None = dataclasses.field(default=None, metadata={"most": 2.5})

    def __post_init__(self) -> None:
        assert self.steps <= 100, "checked before"


def test_numbers_have_upper_bounds() -> None:
    assert from_mapping(Bounded, {"steps": 100, "seeds": [7], "rate": 2.5}).seeds == (7,)
    for values, message in (
        ({"steps": 101}, r"run\.steps=101: must be a number that is at most 100"),
        ({"steps": 1e30}, r"run\.steps=1000000000000000019884624838656: must be a number that is at most 100"),
        ({"seeds": [0, 8]}, r"run\.seeds\[1\]=8: must be a number that is at most 7"),
        ({"rate": 3}, r"run\.rate=3\.0: must be a number that is at most 2\.5"),
    ):
        with pytest.raises(InputError, match=message):
            from_mapping(Bounded, values, "run")


def float_fields() -> list[tuple[type, str]]:
    """Every number of every config, those of its sections included."""
    waiting: list[Any] = [RunConfig, DecoderConfig, StudyConfig, NeedleConfig, CopyingConfig, *TASKS.values()]
    seen: list[Any] = []
    found = []
    while waiting:
        each = waiting.pop()
        waiting += typing.get_args(each)
        if not dataclasses.is_dataclass(each) or each in seen:
            continue
        seen.append(each)
        for name, hint in typing.get_type_hints(each).items():
            waiting.append(hint)
            if hint is float or float in typing.get_args(hint):
                found.append((each, name))
    return found


NEEDED = {"source": "joint", "attention": {"num_heads": 1}}


@pytest.mark.parametrize(("config", "key"), float_fields(), ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_every_number_of_every_config_must_be_finite(config: type, key: str, value: float) -> None:
    hints = typing.get_type_hints(config)
    needed: dict[str, Any] = {
        field.name: NEEDED.get(field.name, {int: 8, float: 1.0, str: "x", bool: True}.get(hints[field.name], {}))
        for field in dataclasses.fields(config)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    given = [value] if typing.get_origin(hints[key]) is tuple else value
    with pytest.raises(InputError, match=rf"^at\.{key}(\[0\])?={value}: must be a finite number"):
        from_mapping(config, {key: given} | {k: v for k, v in needed.items() if k != key}, "at")
