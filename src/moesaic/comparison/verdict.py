"""What a comparison says: its costs as a table, one plain sentence for each new arm, and what to try next."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from moesaic.statistics import Interval, student_t
from moesaic.studies.config import StudyConfig
from moesaic.studies.results import ArmResult

__all__ = ["UNCHECKED", "costs_table", "next_steps", "seeds_to_see", "sentence", "unit_of"]

MOST_SEEDS = 30

UNCHECKED = "could not be checked for leaks"
"""The mark of an arm whose checks raised."""


def unit_of(metric: str) -> str:
    """The unit of a metric, in words."""
    units = {"validation/bits_per_byte": "bits per byte", "validation/loss": "nats per token"}
    return units.get(metric, metric.replace("_", " ").replace("/", " "))


def sentence(study: StudyConfig, arm: ArmResult, unequal: Sequence[str]) -> str:
    """One plain sentence: better, worse or not to be told, by how much, and at what price.

    Args:
        arm: a new arm that has its difference to the baseline.
        unequal: what is not held equal, as "22% fewer parameters".
    """
    difference, unit = arm.difference, unit_of(study.metric)
    assert difference is not None  # only the baseline has none
    price = f", with {_listed(unequal)}" if unequal else ""
    name, baseline = study.shown(arm.arm), study.shown(study.baseline)
    marks = {each: mark for each in (arm.arm, study.baseline) if (mark := study.mark_of(each))}
    if difference.n < 2:
        found = f"is {difference.mean:+.4f} {unit} from {baseline} on one seed" if difference.n else "has no score"
        text = f"{name} {found}, so there is no verdict"
    elif difference.low <= 0 <= difference.high:
        bounds = f"{difference.low:+.4f} to {difference.high:+.4f}"
        text = f"No difference seen between {name} and {baseline}: 95% interval {bounds} {unit}"
        text += f", {difference.n} pairs of runs{price}"
    else:
        word = "better" if (difference.mean > 0) == study.higher_is_better else "worse"
        low, high = sorted((abs(difference.low), abs(difference.high)))
        text = f"{name} is {word} than {baseline} by {abs(difference.mean):.4f} {unit}"
        text += f" (95% interval {low:.4f} to {high:.4f}, {difference.n} pairs of runs){price}"
    if marks:
        told = " and ".join(f"{each} {mark}" for each, mark in marks.items())
        text += f". It does not count: {told}"
        text += "" if UNCHECKED in marks.values() else ", which no honest language model can"
    return f"{text}."


def _listed(texts: Sequence[str]) -> str:
    *first, last = texts
    return f"{', '.join(first)} and {last}" if first else last


def seeds_to_see(difference: Interval) -> int | None:
    """How many seeds would show a difference of this mean, if its spread stays; None beyond `MOST_SEEDS`."""
    deviation = (difference.high - difference.low) / 2 / student_t(difference.n) * math.sqrt(difference.n)
    for n in range(difference.n + 1, MOST_SEEDS + 1):
        if student_t(n) * deviation / math.sqrt(n) < abs(difference.mean):
            return n
    return None


def next_steps(
    study: StudyConfig, arms: Sequence[ArmResult], failed: Mapping[str, Sequence[str]], is_tuned: bool
) -> list[str]:
    """What to try next, one sentence each.

    Args:
        failed: names of the checks that an arm failed.
    """
    found = []
    if study.baseline in study.marks:
        found.append(f"Mend {study.baseline} first: it fails {_listed(failed.get(study.baseline, ()))}.")
    for arm in arms:
        difference = arm.difference
        if difference is None:
            continue
        checks = failed.get(arm.arm, ())
        if arm.arm in study.marks:
            found.append(f"Mend {arm.arm} first: it fails {_listed(checks)}.")
            continue
        if checks:
            found.append(f"{arm.arm} fails {_listed(checks)}, which its score does not show.")
        if arm.diverged:
            found.append(
                f"{arm.name} diverged on {len(arm.diverged)} seeds: try smaller rates, as in rates=[0.1,0.25,0.5]."
            )
        if difference.n < 2:
            found.append("Give seeds=3 for an interval.")
        elif difference.low <= 0 <= difference.high:
            half = (difference.high - difference.low) / 2
            whose = f"{arm.name}: with" if len(arms) > 1 else "With"
            seen = f"{whose} {difference.n} pairs, differences below about {half:.4f} cannot be seen"
            n = seeds_to_see(difference)
            if n is None:
                found.append(f"{seen}; the one found, {difference.mean:+.4f}, would need more than {MOST_SEEDS} seeds.")
            else:
                found.append(f"{seen}; if {difference.mean:+.4f} is real, seeds={n} would show it.")
        else:
            found.append(f"See whether {arm.arm} keeps its place at another size: model.dim, training.steps, data.")
        if arm.tuning.at_edge:
            found.append(f"The best learning rate of {arm.name} is at the edge of what was tried: give more rates.")
    if not is_tuned:
        found.append("Learning rates were not tuned: a longer budget tries three for every arm.")
    return list(dict.fromkeys(found))


SHOWN = {
    "parameters": ("parameters", 1, ",.0f"),
    "active_parameters": ("active parameters", 1, ",.0f"),
    "forward_flops": ("MFLOP per token, forward", 1e6, ",.3f"),
    "training_flops": ("MFLOP per token, training", 1e6, ",.3f"),
    "weight_bytes": ("MB of weights", 1e6, ",.2f"),
    "optimizer_bytes": ("MB of optimizer state", 1e6, ",.2f"),
    "activation_bytes": ("MB of activations", 1e6, ",.2f"),
    "step_seconds": ("ms per step, one thread", 1e-3, ",.1f"),
}


def costs_table(baseline: str, fairs: Mapping[str, Mapping[str, Any]]) -> Table:
    """The costs of the baseline and of the new arms as they run, with ratios."""
    table = Table(box=None, pad_edge=True)
    for heading in ("", baseline, *(word for name in fairs for word in (name, "ratio"))):
        table.add_column(heading, justify="right" if heading else "left")
    [first, *_] = fairs.values()
    for key, (label, unit, form) in SHOWN.items():
        theirs = first["baseline"].get(key)
        if not theirs or math.isnan(theirs):
            continue
        cells = [label, format(theirs / unit, form)]
        for fair in fairs.values():
            # each arm is timed beside the baseline: its own ratio holds, and is what the verdict says
            ratio = (fair["after"].get(key) or math.nan) / (fair["baseline"].get(key) or math.nan)
            cells += [format(theirs * ratio / unit, form), f"{ratio:.3f}"]
        table.add_row(*map(escape, cells))
    return table
