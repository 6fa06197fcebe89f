"""Plain mapping (from YAML) -> strict frozen dataclass.

An unknown key, a wrong type or an impossible value raises `InputError` that names the key by its dotted path.
Range checks belong to the dataclasses themselves: `__post_init__` raises `ValueError("key=...: ...")` and the path is
put in front here.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from moesaic.errors import InputError, UnknownKey

__all__ = ["LARGEST_SEED", "flatten", "from_mapping", "require", "require_same", "to_mapping"]

LARGEST_SEED = 2**32 - 1
"""Lightning and numpy take no larger one."""

T = TypeVar("T")


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build the dataclass `cls` from `values`, nested dataclasses included.

    Args:
        cls: a dataclass; a class method `check_mapping(values)` may refuse what only a mapping can be wrong about by
            raising ValueError. Field types may be bool, int, float, str, None, Any, Literal, X | Y, tuple[X, ...],
            dict[str, X] and other dataclasses. One field, a dict, may have metadata {"other_keys": function}: it takes
            the keys that are no fields but among the names that the function returns. Numbers must be finite; of a
            field with metadata {"most": n} none may be larger than n, which keeps a machine from hanging. A field with
            metadata {"key": name} is called that in mappings, where no attribute can be.
        values: plain containers, as `OmegaConf.to_container(..., resolve=True)` gives them.
        where: dotted path of `values` in the whole config, for messages.

    Raises:
        InputError: unknown or missing key, wrong type, or a value that `cls` refuses.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{where or cls.__name__}: found {_show(values)}; must be a mapping of {_names(cls)}")
    others = _others(cls)
    passed_on = () if others is None else others.metadata["other_keys"]()
    for key in values:
        if key not in _names(cls) and key not in passed_on:
            close = difflib.get_close_matches(str(key), [*_names(cls), *passed_on], n=1)
            hint = f" (did you mean {_join(where, close[0])}?)" if close else ""
            raise UnknownKey(f"{_join(where, str(key))}: unknown key{hint}; must be one of {', '.join(_names(cls))}")
    try:
        if (check := getattr(cls, "check_mapping", None)) is not None:
            check(values)
    except ValueError as error:
        raise InputError(f"{_join(where, '')}{error}") from error
    types_of = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        path = _join(where, _key_of(field))
        if field is others:
            arguments[field.name] = {str(key): value for key, value in values.items() if key not in _names(cls)}
        elif _key_of(field) in values:
            arguments[field.name] = _convert(types_of[field.name], values[_key_of(field)], path)
            _require_in_range(arguments[field.name], path, field.metadata.get("most", math.inf))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise InputError(f"{path}: missing; it needs {_describe(types_of[field.name])}")
    try:
        return cls(**arguments)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{_join(where, '')}{error}") from error


def to_mapping(config: Any) -> dict[str, Any]:
    """The plain mapping (dicts, lists, numbers, strings) from which `from_mapping` rebuilds `config`."""
    others = _others(type(config))
    fields = [field for field in dataclasses.fields(config) if field is not others]
    own = {_key_of(field): _plain(getattr(config, field.name)) for field in fields}
    return own if others is None else own | _plain(getattr(config, others.name))


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys; an empty mapping stays a value."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_mapping(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _convert(expected: Any, value: Any, path: str) -> Any:
    origin = get_origin(expected)
    if origin in (Union, types.UnionType):
        return _convert_union(get_args(expected), expected, value, path)
    if origin is Literal:
        if value in get_args(expected) and type(value) in {type(option) for option in get_args(expected)}:
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            element = get_args(expected)[0]
            return tuple(_convert(element, item, f"{path}[{i}]") for i, item in enumerate(value))
    elif origin is dict:
        if isinstance(value, Mapping):
            return {str(k): _convert(get_args(expected)[1], v, _join(path, str(k))) for k, v in value.items()}
    elif dataclasses.is_dataclass(expected):
        return from_mapping(typing.cast(type, expected), value, path)
    elif expected is Any:
        return value
    elif expected is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:  # an integer of hundreds of digits
                return math.inf
    elif expected in (int, str, bool):
        if type(value) is expected:
            return value
        if expected is int and isinstance(value, float) and value.is_integer():
            return int(value)  # YAML and the command line read 1e4 as a float
    elif expected is type(None) and value is None:
        return None
    raise InputError(f"{path}: found {_show(value)}{_hint(expected, value)}; must be {_describe(expected)}")


def _hint(expected: Any, value: Any) -> str:
    """What may have been meant instead of a value: a class by dotted path, or the choice that is spelled nearly so."""
    options = get_args(expected) if get_origin(expected) in (Union, types.UnionType) else (expected,)
    kinds = {get_origin(option) for option in options}
    if kinds >= {Literal, dict} and isinstance(value, str) and {".", ":"} & set(value):
        return f" (did you mean {{type: {value}}}?)"
    choices = [str(each) for option in options if get_origin(option) is Literal for each in get_args(option)]
    close = difflib.get_close_matches(str(value), choices, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _require_in_range(value: Any, path: str, most: float) -> None:
    """Refuse numbers that are not finite or too large, in lists too; what is in dataclasses has been checked."""
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            _require_in_range(item, f"{path}[{i}]", most)
    elif isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{path}={value}: must be a finite number")
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and value > most:
        raise InputError(f"{path}={value}: must be a number that is at most {most}")


def _convert_union(options: tuple[Any, ...], expected: Any, value: Any, path: str) -> Any:
    if value is None and type(None) in options:
        return None
    errors: list[InputError] = []
    if isinstance(value, Mapping):  # of several dataclasses the one that was meant
        options = tuple(sorted(options, key=lambda option: _misfits(option, value)))
    for option in options:
        try:
            return _convert(option, value, path)
        except InputError as error:
            errors.append(error)
            listed = get_origin(option) is tuple and isinstance(value, (list, tuple))
            if listed or (dataclasses.is_dataclass(option) and isinstance(value, Mapping)):
                raise  # the value was meant for this option: its own message says more
    raise InputError(
        f"{path}: found {_show(value)}{_hint(expected, value)}; must be {_describe(expected)}"
    ) from errors[-1]


def _misfits(option: Any, values: Mapping[str, Any]) -> tuple[int, int]:
    """How many keys a dataclass does not know or the mapping lacks, and of these how many it does not know."""
    if not dataclasses.is_dataclass(option):
        return 0, 0
    missing = dataclasses.MISSING
    needed = {x.name for x in dataclasses.fields(option) if x.default is missing and x.default_factory is missing}
    unknown = len(set(values) - set(_names(typing.cast(type, option))))
    return unknown + len(needed - set(values)), unknown


def _describe(expected: Any) -> str:
    origin = get_origin(expected)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in get_args(expected))
    if origin is Literal:
        return " | ".join(str(option) for option in get_args(expected))
    if origin is tuple:
        return f"a list of {_describe(get_args(expected)[0])}"
    if origin is dict or dataclasses.is_dataclass(expected):
        return "a mapping"
    names = {type(None): "null", int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    return names.get(expected, str(expected))


def _names(cls: type) -> list[str]:
    return [_key_of(field) for field in dataclasses.fields(cls) if "other_keys" not in field.metadata]


def _key_of(field: dataclasses.Field[Any]) -> str:
    return str(field.metadata.get("key", field.name))


def _others(cls: type) -> dataclasses.Field[Any] | None:
    """The field of `other_keys`, if the dataclass has one."""
    return next((field for field in dataclasses.fields(cls) if "other_keys" in field.metadata), None)


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _show(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"


def require(config: Any, name: str, ok: bool, allowed: str) -> None:
    """Raise ValueError for the field `name` of a dataclass unless `ok`; `allowed` says what it must be."""
    if not ok:
        raise ValueError(f"{name}={getattr(config, name)!r}: must be {allowed}")


def require_same(
    where: object, found: Mapping[str, Any], wanted: Mapping[str, Any], ignored: Collection[str] = ()
) -> None:
    """Raise InputError that lists every key in which two mappings differ; keys of nested ones are dotted.

    Args:
        where: begins the message: whose `found` is, and what to do about it.
        ignored: dotted keys that may differ.
    """
    found, wanted = flatten(found), flatten(wanted)
    absent = "(absent)"
    differing = [
        f"{key}: {found.get(key, absent)!r} there, {wanted.get(key, absent)!r} now"
        for key in sorted(found.keys() | wanted.keys())
        if key not in ignored and json.dumps(found.get(key, absent)) != json.dumps(wanted.get(key, absent))
    ]
    if differing:
        raise InputError(f"{where}: {'; '.join(differing)}")
