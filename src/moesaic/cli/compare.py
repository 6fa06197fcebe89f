"""Your idea against the baseline: moesaic compare new=my.parts:Router [baseline=...] [key=value ...]

See conf/compare.yaml, and docs/architecture.md for the five steps. The same command goes on with what was stopped.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, Literal

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig
from rich.console import Console

from moesaic.cli.arguments import as_additions, check_overrides, is_sweep
from moesaic.cli.common import composed, launch, plain, typed, users_config_dir
from moesaic.comparison.arms import (
    Arm,
    differences,
    is_assignment,
    name_of,
    split_words,
    with_parts,
)
from moesaic.comparison.compare import compare
from moesaic.comparison.fairness import Equal
from moesaic.comparison.request import Request
from moesaic.config import LARGEST_SEED, from_mapping
from moesaic.errors import InputError, naming
from moesaic.models.seams import find_part
from moesaic.overrides import command_line

__all__ = ["main", "request_of"]


@dataclasses.dataclass(frozen=True)
class Options:
    """The keys of the command itself; every other key holds for all arms."""

    new: tuple[str, ...]
    baseline: str
    seeds: tuple[int, ...] = dataclasses.field(metadata={"most": LARGEST_SEED})
    budget: str
    equal: Equal
    rates: tuple[float, ...] | None
    workers: int = dataclasses.field(metadata={"most": 1024})
    rounds: int = dataclasses.field(metadata={"most": 10**5})
    only: Literal["costs"] | None
    results_dir: str | None


OWN = tuple(field.name for field in dataclasses.fields(Options))

INSTEAD = {
    "seed": "given as seeds: how many, or a list as in seeds=[5]",
    "output_dir": "given as results_dir, the directory that keeps everything",
    "run_dir": "given as results_dir, the directory that keeps everything",
    "resume": "left out; the same command goes on with what was stopped",
}
"""Keys of a run that say nothing to a comparison, and what says it."""


def request_of(config: dict[str, Any], overrides: Sequence[str]) -> Request:
    """What a command line asks for.

    Args:
        config: what Hydra composed, the keys of the command among it.
        overrides: the command line that it was composed with, where `new` may stand several times.

    Raises:
        InputError: it cannot be understood.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    candidates = [o.value() for o in parsed if o.key_or_group == "new"]
    new = tuple(str(one) for each in candidates for one in (each if isinstance(each, list) else [each]))
    for key, instead in INSTEAD.items():
        if any(o.key_or_group == key for o in parsed):
            raise InputError(f"{key}: must be {instead}")
    seeds = config["seeds"]
    asked = {"new": list(new), "seeds": [0] if type(seeds) is int else seeds, "budget": str(config["budget"])}
    options = from_mapping(Options, {**{key: config[key] for key in OWN}, **asked})
    common = as_additions([str(o.input_line) for o in parsed if o.key_or_group not in OWN])
    baseline = _arm("baseline", options.baseline, common, {})
    arms = [_arm("new", text, common, baseline.config) for text in options.new]
    if not arms:
        raise InputError(
            "new: missing; must name a part (my.parts:Router), or be key=value of the model or of training"
        )
    keys = frozenset(o.key_or_group for o in parsed if o.key_or_group not in OWN)
    return Request.as_given(
        [baseline, *arms],
        seeds=seeds if type(seeds) is int else options.seeds,
        budget=config["budget"],
        results_dir=options.results_dir,
        name=config["name"] if "name" in keys else None,
        equal=options.equal,
        rates=options.rates,
        workers=options.workers,
        rounds=options.rounds,
        only=options.only,
        fixed=keys,
    )


def _arm(key: str, text: str, common: Sequence[str], base: dict[str, Any]) -> Arm:
    """The arm that these words describe: overrides first, then parts, which take their places in what is there."""
    words = split_words(key, text)
    for word in words:
        if word.startswith("["):
            raise InputError(f"{key}={text}: several candidates must be several {key}=")
        if is_assignment(word) and is_sweep(word):
            raise InputError(f"{key}: {word}: several values must be several candidates, each with a {key}= of its own")
    found = {word: find_part(word, key) for word in words if not is_assignment(word)}
    overrides = [*common, *as_additions([word for word in words if word not in found])]
    with naming(key) if words else contextlib.nullcontext():  # else all that is wrong stands beside new= and baseline=
        check_overrides("train", overrides, users_config_dir())
        config = composed("train", overrides)
        given = frozenset(differences(base, config)) if base else frozenset()
        config = with_parts(config, found.values(), key)
    if config["trainer"]["precision"] == "auto":  # each machine would choose its own
        config["trainer"]["precision"] = "32-true"
    return Arm(name_of(words), config, given, tuple(words))


def main(arguments: Sequence[str]) -> None:
    def task(config: DictConfig) -> None:
        request = request_of(plain(config), HydraConfig.get().overrides.task)
        console = Console(emoji=False, width=None if sys.stdout.isatty() else 140)
        result = compare(request, console, command_line("compare", *typed(arguments)))
        sys.exit(1 if result.get("failed") else 0)

    launch("compare", arguments, task)
