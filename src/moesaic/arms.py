"""Short names for what tells runs apart: num_experts=16, router=ExpertChoice."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

__all__ = ["class_name", "gather_custom", "name_arms", "short_keys", "short_value"]

MARKS = ("type", "_target_")
"""Keys whose value is the dotted path of a class or function."""

MANY = 3
"""Keys in a name; where arms differ in more, a name leaves out what most of them share."""


def class_name(path: str) -> str:
    """Return the last part of a dotted path, or of one with a colon."""
    return path.replace(":", ".").rpartition(".")[2]


def short_keys(keys: Collection[str]) -> dict[str, str]:
    """Map dotted keys to their last parts, as many of them as tell each one apart from the others."""
    found = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        others = [f".{other}" for other in keys if other != key]
        found[key] = next((end for end in ends if not any(other.endswith(f".{end}") for other in others)), key)
    return found


def short_value(value: Any) -> str:
    """Return a value for a name: a custom module by its class, a pattern of layers as mixer/ffn+mixer/ffn."""
    if isinstance(value, Mapping):
        mark = next((mark for mark in MARKS if _is_path(value.get(mark))), None)
        if mark is not None:
            others = ", ".join(f"{key}={short_value(each)}" for key, each in value.items() if key != mark)
            return class_name(value[mark]) + (f"({others})" if others else "")
        if value.keys() == {"mixer", "ffn"}:
            return f"{short_value(value['mixer'])}/{short_value(value['ffn'])}"
        return "{" + ", ".join(f"{key}={short_value(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        if value and all(isinstance(each, Mapping) for each in value):
            return "+".join(map(short_value, value))
        return f"[{','.join(map(short_value, value))}]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def gather_custom(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return a flat config in which a custom module (KEY.type and its arguments) is one value at KEY."""
    gathered = dict(flat)
    for key, value in flat.items():
        parent, _, mark = key.rpartition(".")
        if mark in MARKS and parent and _is_path(value):
            below = {name: gathered.pop(name) for name in list(gathered) if name.startswith(f"{parent}.")}
            if below:
                gathered[parent] = {name.removeprefix(f"{parent}."): each for name, each in below.items()}
    return gathered


def name_arms(arms: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, Any]]:
    """Name each of some different flat configs by the keys in which they differ.

    Returns:
        the names, and what most arms have where a name does not say otherwise. That is empty where names say all.
    """
    gathered = [gather_custom(arm) for arm in arms]
    keys = sorted({key for arm in gathered for key in arm})
    differing = [key for key in keys if any(not _same(arm.get(key), gathered[0].get(key)) for arm in gathered)]
    if not differing:
        return ["(all equal)"] * len(arms), {}
    usual = _usual(gathered, differing) if len(differing) > MANY else {}
    shown = short_keys(differing)
    names = []
    for arm in gathered:
        said = [key for key in differing if not (key in usual and _same(arm.get(key), usual[key]))]
        values = {key: arm.get(key) for key in said}
        values = {key: value for key, value in values.items() if value is not None} or values
        names.append(", ".join(f"{shown[key]}={short_value(value)}" for key, value in values.items()) or "as most")
    for i in [i for i, name in enumerate(names) if names.count(name) > 1]:  # classes of one name, or only null tells
        full = {key: gathered[i].get(key) for key in differing}
        names[i] = ", ".join(f"{key}={json.dumps(value, default=str)}" for key, value in full.items())
    return names, {shown[key]: value for key, value in usual.items()}


def _usual(arms: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, Any]:
    """The value of each key that more than half of the arms have."""
    found = {}
    for key in keys:
        values = [arm.get(key) for arm in arms]
        common = max(values, key=lambda value: sum(_same(value, other) for other in values))
        if sum(_same(common, other) for other in values) > len(arms) / 2:
            found[key] = common
    return found


def _same(one: Any, other: Any) -> bool:
    return json.dumps(one, sort_keys=True, default=str) == json.dumps(other, sort_keys=True, default=str)


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and ("." in value or ":" in value)
