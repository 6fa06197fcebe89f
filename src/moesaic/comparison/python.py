"""A comparison from Python: moesaic.compare(baseline, new, data="texts", seeds=3)."""

import contextlib
import copy
import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from moesaic.comparison.arms import (
    Arm,
    differences,
    is_assignment,
    name_of,
    split_words,
    with_parts,
)
from moesaic.comparison.compare import compare as run_comparison
from moesaic.comparison.fairness import Equal
from moesaic.comparison.handed import digest_of
from moesaic.comparison.request import Request
from moesaic.config import flatten, to_mapping
from moesaic.errors import InputError
from moesaic.imports import HANDED_IN, handing_in
from moesaic.models.seams import SEAMS, find_part, seam_of, split_seam
from moesaic.overrides import apply_overrides, merge, parse_overrides
from moesaic.studies.jobs import Row
from moesaic.training.config import RunConfig

__all__ = ["Candidate", "Comparison", "compare"]

Candidate = str | Mapping[str, Any] | type[nn.Module] | Callable[..., nn.Module] | nn.Module
"""Words as on the command line, keys of the run config, or a part: its class, a factory, or a module to copy.

A part that fits several seams stands among the keys under the name of its seam: {"mixer": part}.
"""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What a comparison found."""

    verdicts: tuple[str, ...]
    """One plain sentence for each new arm."""
    next_steps: tuple[str, ...]
    rows: tuple[Row, ...]
    """One for each run, see docs/studies.md."""
    costs: dict[str, Any]
    """By arm: what each costs, what was solved, and what is unequal."""
    failed: dict[str, str]
    """Runs that failed, and why."""
    directory: Path
    """Table, pictures and runs. The same call goes on there."""


def compare(
    baseline: Candidate | None = None,
    new: Candidate | Sequence[Candidate] = (),
    *,
    data: str | Path | Mapping[str, Any] | None = None,
    seeds: int | Sequence[int] = 3,
    budget: str = "20m",
    equal: Equal = "active_flops",
    rates: Sequence[float] | None = None,
    workers: int = 2,
    rounds: int = 5,
    config: Mapping[str, Any] | None = None,
    results_dir: str | Path | None = None,
    console: Console | None = None,
) -> Comparison:
    """Ask whether an idea beats the baseline, as `moesaic compare` does.

    A part that no file can name (a lambda, a function in a notebook, a module) is handed in. Its runs take place in
    this process, one after another. Its checkpoints can be read only within `moesaic.imports.handing_in`.

    Args:
        baseline: None for the default model.
        new: one candidate or several.
        data: a folder or file of text, or keys of `data`; None for the sources of the standard library.
        seeds: how many, or which; the order of the data goes with the seed.
        budget: time for all runs ("10m"); it sets the steps unless `config` does.
        equal: what the new arm's width is solved for.
        rates: factors on the learning rates that are tried for every arm; None: as the budget allows.
        workers: runs at a time.
        rounds: steps timed per arm.
        config: keys for all arms, dotted or nested.
        results_dir: None for comparisons/NAME.

    Raises:
        InputError: what cannot be compared.
    """
    fixed = dict(config or {})
    base = _applied(to_mapping(RunConfig()), {"trainer.precision": "32-true"}, "config")
    base = _applied(base, _data_keys(data), "data")
    base = _applied(base, fixed, "config")
    several = isinstance(new, (list, tuple))
    candidates: list[Any] = list(new) if several else [new]  # type: ignore[arg-type]
    if not candidates:
        raise InputError("new: missing; must be a candidate, or a list of candidates")
    handed: dict[str, Any] = {}
    with contextlib.ExitStack() as within:
        first = _arm("baseline", baseline, base, base, handed, within)
        asked = [_arm("new", each, base, first.config, handed, within) for each in candidates]
        request = Request.as_given(
            [first, *asked],
            seeds=seeds,
            budget=budget,
            results_dir=results_dir,
            equal=equal,
            rates=None if rates is None else tuple(rates),
            workers=workers,
            rounds=rounds,
            in_process=bool(handed),
            handed={name: digest_of(part) for name, part in handed.items()},
            fixed=frozenset({*differences(to_mapping(RunConfig()), base), *flatten(fixed)}),
        )
        console = console or Console(emoji=False, width=None if _is_terminal() else 140)
        found = run_comparison(request, console, "the same call of moesaic.compare")
    return Comparison(
        verdicts=tuple(found["verdict"]),
        next_steps=tuple(found["next"]),
        rows=tuple(found["rows"]),
        costs=found["fair"],
        failed=found["failed"],
        directory=request.directory,
    )


def _is_terminal() -> bool:
    """Whether standard output is one; programs may have none, or one of their own."""
    return bool(getattr(sys.stdout, "isatty", lambda: False)())


def _data_keys(data: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    if data is None:
        return {}
    if isinstance(data, Mapping):
        return {f"data.{key}": value for key, value in data.items()}
    return {"data.source": "files", "data.path": str(data)}


def _applied(config: Mapping[str, Any], keys: Mapping[str, Any], where: str) -> dict[str, Any]:
    dotted = {key: value for key, value in keys.items() if "." in key or not isinstance(value, Mapping)}
    nested = {key: value for key, value in keys.items() if key not in dotted}
    for key in nested:
        if key not in config:
            raise InputError(f"{where}.{key}: the run config has no such key; must be one of {', '.join(config)}")
    return apply_overrides(merge(config, nested), dotted, where)


def _arm(
    key: str,
    candidate: Any,
    base: dict[str, Any],
    baseline: dict[str, Any],
    handed: dict[str, Any],
    within: contextlib.ExitStack,
) -> Arm:
    if candidate is None or candidate == "":
        return Arm("baseline", base)
    if isinstance(candidate, Mapping):
        config = _applied(base, {name: value for name, value in candidate.items() if name not in SEAMS}, key)
        words = [f"{path}={value}" for path, value in differences(base, config).items()]
        given = frozenset(differences(baseline, config))
        parts = []
        for seam in [name for name in candidate if name in SEAMS]:
            part = candidate[seam]
            word = part if isinstance(part, str) else _word_for(key, part, handed, within)
            parts.append(f"{seam}:{split_seam(word)[1]}")
        config = with_parts(config, (find_part(word, key) for word in parts), key)
        return Arm(name_of([*words, *parts]), config, given, (*words, *parts))
    words = split_words(key, candidate) if isinstance(candidate, str) else [_word_for(key, candidate, handed, within)]
    config = _applied(base, parse_overrides([word for word in words if is_assignment(word)]), key)
    given = frozenset(differences(baseline, config))
    config = with_parts(config, (find_part(word, key) for word in words if not is_assignment(word)), key)
    return Arm(name_of(words), config, given, tuple(words))


def _word_for(key: str, part: Any, handed: dict[str, Any], within: contextlib.ExitStack) -> str:
    """The dotted path of a part; one that no file can name is handed in under its name."""
    if not callable(part) or inspect.isbuiltin(part):
        raise InputError(
            f"{key}: found a {type(part).__name__}; must be words, keys, or a part: class, factory or module"
        )
    named = part
    while isinstance(named, functools.partial):
        named = named.func
    name = getattr(named, "__name__", type(named).__name__)
    module = getattr(part, "__module__", None)
    if module not in (None, "__main__") and getattr(sys.modules.get(module), name, None) is part:
        return f"{module}.{name}"
    name = "part" if not name.isidentifier() else name
    if name in handed and handed[name] is not part:
        name = f"{name}_{len(handed)}"
    if name not in handed:
        handed[name] = part
        within.enter_context(handing_in(**{name: _copier(part) if isinstance(part, nn.Module) else part}))
    seams = seam_of(part)
    return f"{seams[0]}:{HANDED_IN}.{name}" if len(seams) == 1 else f"{HANDED_IN}.{name}"


def _copier(module: nn.Module) -> Callable[[], nn.Module]:
    """A factory of copies, drawn anew where a part of them can be."""

    def make() -> nn.Module:
        made = copy.deepcopy(module)
        for part in made.modules():
            if callable(reset := getattr(part, "reset_parameters", None)):
                reset()
        return made

    make.func = type(module)  # type: ignore[attr-defined]  # whose source file is hashed
    return make
