"""Check mixture-of-experts layers, and parts alone: moesaic conformance moesaic package.module:factory mine:MyRouter

Exits with 1 if a check failed, with 2 if a layer could not be made. Without names, the ones known here are listed.
"""

import difflib
import importlib.metadata
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from moesaic import imports
from moesaic.cli.arguments import did_you_mean, require_list, require_switches
from moesaic.cli.common import launch, plain
from moesaic.errors import InputError
from moesaic.layers import MoE
from moesaic.models.seams import SEAMS, find_part, seam_of, split_seam
from moesaic.testing import Report, check_moe, check_named_part, checks_of, comparison_table, status_of
from moesaic.testing.ours import ROUTED
from moesaic.testing.peers import PEERS

__all__ = ["main"]


def llama4() -> MoE:
    """Sigmoid top-1, the score on the experts' input, a shared expert."""
    return MoE.build(16, 24, 4)


def top2_with_bias() -> MoE:
    """Softmax top-2 normalized, the score on the output, no shared expert, a selection bias."""
    return MoE.build(
        16,
        24,
        4,
        top_k=2,
        score_function="softmax",
        normalize_scores=True,
        score_before_experts=False,
        shared_hidden_dim=0,
        expert_bias=True,
    )


def in_bfloat16() -> MoE:
    return MoE.build(16, 24, 4, top_k=2, expert_bias=True, dtype=torch.bfloat16)


LAYERS: dict[str, Callable[..., Any]] = {
    "moesaic": llama4,
    "moesaic-top2-bias": top2_with_bias,
    "moesaic-bfloat16": in_bfloat16,
    **ROUTED,
    **PEERS,
}
PACKAGES = ("torch", "transformers", "torchtitan", "st-moe-pytorch", "mixture-of-experts", "pytorch-mixtures")
COLORS = {"pass": "green", "fail": "red", "not applicable": "dim"}


def examine(name: str) -> Report:
    """The checks of a layer known here, or of `package.module:name` as seen from the working directory.

    A seam before the name, or a signature that fits a router, a mixer or experts alone, means the checks of such a
    part; everything else is taken for a function or class that makes a whole layer.

    Raises:
        InputError: nothing of that name can be imported, called, or checked.
    """
    if name in LAYERS:
        return check_moe(LAYERS[name])
    seam, path = split_seam(name)
    if seam is not None:
        return check_named_part(seam, path)
    if "." not in path:
        hint = did_you_mean(difflib.get_close_matches(name, LAYERS, n=1))
        raise InputError(f"{name}{hint}: must be package.module:factory, or one of {', '.join(LAYERS)}")
    found = imports.resolve(path, "layer")
    if not callable(found):
        raise InputError(f"{name} is {type(found).__name__}: must be a function that returns a layer")
    said = seam_of(found)
    if said == ("ffn",):
        return check_moe(found)
    try:
        part = find_part(name)  # it is tried out where its signature says nothing
    except InputError as no_part:
        if said:
            raise
        try:
            return check_moe(found)
        except InputError as no_layer:
            seams = ", ".join(f"{seam}:" for seam in SEAMS)
            raise InputError(
                f"{name}: it is neither a whole layer ({no_layer}) nor a part ({no_part}); a word before the name says "
                f"what it is: {seams}"
            ) from no_layer
    return check_named_part(*part)


def versions() -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def show(reports: Mapping[str, Report], console: Console) -> None:
    table = Table("check", *(Column(escape(name), overflow="fold") for name in reports))
    for check in checks_of(reports):
        statuses = [status_of(report, check) for report in reports.values()]
        table.add_row(check, *(f"[{COLORS[status]}]{status}[/]" if status else "" for status in statuses))
    console.print(table)
    for name, report in reports.items():
        for row in report.rows:
            if row.status == "fail":
                console.print(f"[bold]{escape(name)}[/], [red]{row.check}[/]: {escape(row.statement)}", highlight=False)
                console.print(f"    {row.detail}", markup=False, highlight=False)
                console.print(f"    guards against {row.bug}", markup=False, highlight=False)
            elif row.status == "not applicable" and len(reports) == 1:
                console.print(f"[bold]{escape(name)}[/], [dim]{row.check}: {escape(row.detail)}[/]", highlight=False)


def markdown(reports: Mapping[str, Report]) -> str:
    lines = [f"With {versions()}.", "", comparison_table(reports), ""]
    for name, report in reports.items():
        lines += [f"- {name}, {row.check}: {row.detail}" for row in report.failures]
    return "\n".join(lines)


def _task(config: DictConfig) -> None:
    given = plain(config)
    require_list("layers", given["layers"])
    require_switches(given, "markdown")
    if not given["layers"]:
        print(f"Known layers: {', '.join(LAYERS)}")
        return
    reports = {name: examine(name) for name in map(str, given["layers"])}
    if given["markdown"]:
        print(markdown(reports))
    else:
        show(reports, Console(emoji=False))
    sys.exit(not all(report.ok for report in reports.values()))


def main(arguments: Sequence[str]) -> None:
    launch("conformance", arguments, _task)
