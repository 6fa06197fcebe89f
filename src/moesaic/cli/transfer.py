"""Check that settings transfer over width and depth: moesaic transfer check [key=value ...]"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from moesaic.cli.arguments import require_known, require_list
from moesaic.cli.common import launch, plain
from moesaic.config import from_mapping
from moesaic.errors import InputError
from moesaic.files import make_folder, write_json
from moesaic.models import DecoderConfig
from moesaic.models.resizing import resized
from moesaic.training.config import OptimizerConfig
from moesaic.training.coordinates import MOST_FALL_OF_LOGITS, MOST_SLOPE, Check, Curve, check
from moesaic.training.coordinates_plot import draw

__all__ = ["main"]


def _task(config: DictConfig) -> None:
    given = plain(config)
    if given["action"] is None:
        raise InputError(
            "action: missing; must be check: moesaic transfer check trains small models of several widths and depths, "
            "about a minute for each optimizer and kind; optimizers=[muon] kinds=[moe] takes one of each"
        )
    if given["action"] != "check":
        raise InputError(f"action={given['action']!r}: must be check")
    console = Console(emoji=False, soft_wrap=True, highlight=False)
    model = from_mapping(DecoderConfig, {**given["model"], "vocab_size": 256, "parametrization": "standard"}, "model")
    optimizer = from_mapping(OptimizerConfig, given["optimizer"], "optimizer")
    if given["threads"] is not None:
        torch.set_num_threads(given["threads"])
    checks = _checks(given)
    for size in given["widths"]:
        resized(model, dim=size)  # refused before anything is made
    directory = Path(given["output_dir"])
    make_folder(directory, "output_dir")
    found: dict[str, list[Curve]] = {}
    for each in checks:
        found[each.name] = check(model, optimizer, each)
        console.print(f"{each.name}: {_said(found[each.name])}", markup=False)
    rows = {name: [_row(each) for each in curves] for name, curves in found.items()}
    write_json(directory / "coordinates.json", rows)
    draw(found, directory / "coordinates.png")
    console.print(_table(found))
    console.print(f"written  {directory / 'coordinates.png'}, {directory / 'coordinates.json'}", markup=False)
    broken = [
        each.name
        for each in checks
        if each.parametrization == "transfer" and any(not x.holds for x in found[each.name])
    ]
    if broken:
        said = f"fails: {'; '.join(broken)}"
    elif any(each.parametrization == "transfer" for each in checks):
        falls = f"logits may fall with the width by {MOST_FALL_OF_LOGITS}"
        said = f"passes: no slope beyond {MOST_SLOPE} under transfer ({falls})"
    else:
        said = "no verdict: parametrizations has no transfer"
    console.print(said, markup=False)
    sys.exit(bool(broken))


def _said(curves: Sequence[Curve]) -> str:
    """What a check found, in one line: each quantity that does not keep its size, and which way it goes."""
    moves = [f"{curve.quantity} {_way(curve.slope)} with {curve.axis}" for curve in curves if not curve.holds]
    return ", ".join(moves) or "holds"


def _way(slope: float) -> str:
    if math.isinf(slope):
        return "becomes 0 or infinite"
    return "grows" if slope > 0 else "shrinks"


def _checks(given: dict[str, Any]) -> list[Check]:
    """The checks that are asked for.

    Raises:
        InputError: an unknown name, or sizes that say nothing.
    """
    fields = {field.name: field.type for field in dataclasses.fields(Check)}
    for key, field in (("parametrizations", "parametrization"), ("optimizers", "optimizer"), ("kinds", "kind")):
        require_list(key, given[key])
        if not given[key]:
            raise InputError(f"{key}=[]: must be one or more of {', '.join(get_args(fields[field]))}")
        for each in given[key]:
            require_known(key, each, get_args(fields[field]))
    for key in ("widths", "depths"):
        sizes = given[key]
        require_list(key, sizes)
        if not sizes or any(type(size) is not int or size < 1 for size in sizes) or len(set(sizes)) < len(sizes):
            raise InputError(f"{key}={sizes}: must be different whole numbers >= 1")
    if len(given["widths"]) < 2 and len(given["depths"]) < 2:
        raise InputError(f"widths={given['widths']}: there must be two of them, or two depths")
    if type(given["steps"]) is not int or given["steps"] < 1:
        raise InputError(f"steps={given['steps']!r}: must be an integer >= 1")
    widths, depths = tuple(sorted(given["widths"])), tuple(sorted(given["depths"]))
    return [
        Check(parametrization, optimizer, kind, widths, depths, given["steps"])
        for optimizer in given["optimizers"]
        for kind in given["kinds"]
        for parametrization in given["parametrizations"]
    ]


def _row(curve: Curve) -> dict[str, Any]:
    return {**dataclasses.asdict(curve), "slope": curve.slope, "holds": curve.holds}


def _table(found: dict[str, list[Curve]]) -> Table:
    table = Table(title="slope: d log2(mean absolute value) / d log2(size)", title_justify="left")
    for name in ("quantity", "axis", *found):
        table.add_column(name, justify="left" if name in ("quantity", "axis") else "right")
    rows = dict.fromkeys((curve.quantity, curve.axis) for curves in found.values() for curve in curves)
    for quantity, axis in sorted(rows, key=lambda row: row[1], reverse=True):
        slopes = []
        for curves in found.values():
            curve = next((x for x in curves if (x.quantity, x.axis) == (quantity, axis)), None)
            slopes.append("" if curve is None else f"{'' if curve.holds else '[bold red]'}{curve.slope:+.2f}")
        table.add_row(quantity, axis, *slopes)
    return table


def main(arguments: Sequence[str]) -> None:
    launch("transfer", arguments, _task)
