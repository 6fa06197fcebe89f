"""A condition on runs, in a grammar of its own: model.moe.num_experts>8 and seed=0. Nothing of it is evaluated."""

import dataclasses
import difflib
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from moesaic.arms import gather_custom, short_keys, short_value
from moesaic.errors import InputError

__all__ = ["Comparison", "matches", "parse_where"]

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "==": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
}

COMPARISON = re.compile(r"\s*([\w./-]+?)\s*(<=|>=|!=|==|<|>|=)\s*(.+?)\s*")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One `KEY OPERATOR VALUE`."""

    key: str
    sign: str
    value: Any

    def holds(self, found: Any) -> bool:
        """Whether a run with `found` at the key is chosen. Numbers compare as numbers, all else as its text."""
        if _is_number(found) and _is_number(self.value):
            return OPERATORS[self.sign](found, self.value)
        texts = {short_value(found), str(found)}
        if self.sign in ("<", ">", "<=", ">="):
            return False
        return (short_value(self.value) in texts) == (self.sign != "!=")


def parse_where(text: str) -> list[Comparison]:
    """Read `KEY OPERATOR VALUE and KEY OPERATOR VALUE ...`.

    Raises:
        InputError: it is something else, or compares a text by size.
    """
    found = []
    for part in re.split(r"\s+and\s+", text.strip()):
        match = COMPARISON.fullmatch(part)
        if match is None:
            raise InputError(f"where={text!r}: {part!r}: must be KEY OPERATOR VALUE with one of {' '.join(OPERATORS)}")
        key, sign, written = match.groups()
        try:
            value = yaml.safe_load(written)
        except (yaml.YAMLError, ValueError):  # the latter of what looks like a date and is none
            value = written
        if sign in ("<", ">", "<=", ">=") and not _is_number(value):
            raise InputError(f"where={text!r}: {part!r}: after {sign} there must be a number")
        found.append(Comparison(key, sign, value))
    return found


def matches(where: Sequence[Comparison], runs: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Say of each run whether all comparisons hold. A run without the key is not chosen.

    Args:
        runs: flat configs with the numbers of metrics.json. A key may be named by its last parts where that is clear.

    Raises:
        InputError: no run has a key, or several keys end like that.
    """
    known = [{**run, **gather_custom(run)} for run in runs]
    keys = sorted({key for run in known for key in run})
    chosen = [True] * len(runs)
    for comparison in where:
        key = _find(comparison.key, keys)
        for i, run in enumerate(known):
            chosen[i] = chosen[i] and key in run and comparison.holds(run[key])
    return chosen


def _find(name: str, keys: Sequence[str]) -> str:
    if name in keys:
        return name
    ending = [key for key in keys if key.endswith((f".{name}", f"/{name}"))]
    if len(ending) == 1:
        return ending[0]
    if ending:
        raise InputError(f"where: {name}: found {', '.join(ending)}; must be one of them")
    close = difflib.get_close_matches(name, [*keys, *short_keys(keys).values()], n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise InputError(f"where: {name}: no run has this key{hint}; must be a key of config.yaml or metrics.json")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
