"""What a comparison says: its costs as a table, one plain sentence for each new arm, and what to try next."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from moesaic.statistics import Interval, student_t
from moesaic.studies.config import StudyConfig
from moesaic.studies.results import ArmResult

__all__ = ["RANDOM", "UNCHECKED", "costs_table", "next_steps", "seeds_to_see", "sentence", "unit_of"]

MOST_SEEDS = 30

UNCHECKED = "could not be checked for leaks"
"""The mark of an arm whose checks raised."""

RANDOM = "is random beyond all seeds"
"""The mark of an arm of which no two outputs can be compared."""


def unit_of(metric: str) -> str:
    """The unit of a metric, in words."""
    units = {"validation/bits_per_byte": "bits per byte", "validation/loss": "nats per token"}
    return units.get(metric, metric.replace("_", " ").replace("/", " "))


def sentence(study: StudyConfig, arm: ArmResult, unequal: Sequence[str], against: ArmResult | None = None) -> str:
    """One plain sentence: better, worse or not to be told, by how much, and at what price. Runs that are left out
    follow.

    Args:
        arm: a new arm that has its difference to the baseline.
        unequal: what is not held equal, as "22% fewer parameters".
        against: the baseline.
    """
    difference, unit = arm.difference, unit_of(study.metric)
    assert difference is not None  # only the baseline has none
    price = f", with {_listed(unequal)}" if unequal else ""
    name, baseline = study.shown(arm.arm), study.shown(study.baseline)
    marks = {each: mark for each in (arm.arm, study.baseline) if (mark := study.mark_of(each))}
    if difference.n < 2:
        found = f"is {difference.mean:+.4f} {unit} from {baseline} on one seed" if difference.n else "has no score"
        text = f"{name} {found}, so there is no verdict"
    elif difference.low == difference.high == 0:
        text = f"{name} and {baseline} have the same score in all {difference.n} pairs of runs{price}"
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
        text += "" if {UNCHECKED, RANDOM} & {*marks.values()} else ", which no honest language model can"
    left_out = [each for result in (arm, against) if result is not None for each in _left_out(result)]
    return " ".join(f"{each}." for each in (text, *left_out))


def _left_out(arm: ArmResult) -> list[str]:
    """Which runs of an arm are in no mean, and why."""
    whole = len(arm.rows) + len(arm.missing)
    found = [("diverged", len(arm.diverged)), ("without a score", len(arm.missing))]
    return [f"Left out: {count} of {_times(whole, 'run')} of {arm.name}, {why}" for why, count in found if count]


def _times(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


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


HARDLY = 0.02
"""Share of the way from chance to 1 that is no learning yet, and that hardly can be learned."""

FEW_WINDOWS = 16
"""Windows of text below which a score is of this text alone."""

ELSEWHERE = "and another results_dir"
"""What a comparison has decided stays in its directory."""


def next_steps(
    study: StudyConfig, arms: Sequence[ArmResult], failed: Mapping[str, Sequence[str]], how_to_tune: str | None = None
) -> list[str]:
    """What to try next, one sentence each.

    Args:
        arms: the baseline, and those that are compared with it.
        failed: names of the checks that an arm failed.
        how_to_tune: what to give for tuned learning rates, where none were.
    """
    level = _level(study, arms)
    found = list(filter(None, [level, _little_text(study, arms)]))
    several = sum(arm.difference is not None for arm in arms) > 1
    for arm in arms:
        difference, checks = arm.difference, failed.get(arm.arm, ())
        if arm.arm in study.marks:
            found.append(f"Mend {arm.arm} first: it fails {_listed(checks)}.")
            continue
        if checks:
            found.append(f"{arm.arm} fails {_listed(checks)}, which its score does not show.")
        if arm.diverged:
            count = _times(len(arm.diverged), "run")
            found.append(f"{arm.name} diverged in {count}: try smaller rates, as in rates=[0.1,0.25,0.5], {ELSEWHERE}.")
        if arm.missing:
            found.append(f"Repeat the command: {_times(len(arm.missing), 'run')} of {arm.name} must still end.")
        if difference is None or level is not None:
            pass
        elif len(study.seeds) < 2:
            found.append("Give seeds=3 for an interval.")
        elif difference.n < 2:
            found.append(f"See in the logs why so few runs of {arm.name} have a score.")
        elif difference.low == difference.high == 0:
            found.append(f"Look for what keeps {arm.name} at the score of {study.baseline}: a part that does nothing?")
        elif difference.low <= 0 <= difference.high:
            half = (difference.high - difference.low) / 2
            whose = f"{arm.name}: with" if several else "With"
            seen = f"{whose} {difference.n} pairs, differences below about {half:.4f} cannot be seen"
            n = seeds_to_see(difference)
            if n is None:
                found.append(f"{seen}; the one found, {difference.mean:+.4f}, would need more than {MOST_SEEDS} seeds.")
            else:
                found.append(f"{seen}; if {difference.mean:+.4f} is real, seeds={n} would show it.")
        else:
            found.append(f"See whether {arm.arm} keeps its place at another size: model.dim, training.steps, data.")
        if arm.tuning.at_edge:
            found.append(
                f"The best learning rate of {arm.name} is at the edge of what was tried: give {_more_rates(arm)} "
                f"{ELSEWHERE}."
            )
    if how_to_tune is not None:
        found.append(f"Learning rates were not tuned: give {how_to_tune} {ELSEWHERE}.")
    return list(dict.fromkeys(found))


def _level(study: StudyConfig, arms: Sequence[ArmResult]) -> str | None:
    """Whether the accuracies of all arms are those of a guess, or as high as can be: then they compare nothing."""
    chances = [row["metrics"]["recall/chance"] for arm in arms for row in arm.rows if "recall/chance" in row["metrics"]]
    values = [value for arm in arms for value in arm.values.values()]
    if not (study.metric.startswith("recall/") and chances and values):
        return None
    chance = max(chances)
    if max(values) < chance + HARDLY * (1 - chance):
        return f"No arm answers more than chance, {chance:.3g}: give more training.steps, or an easier data.task."
    if min(values) > 1 - HARDLY * (1 - chance):
        return "All arms answer nearly everything: a harder data.task would tell them apart."
    return None


def _little_text(study: StudyConfig, arms: Sequence[ArmResult]) -> str | None:
    """Whether the scores are of so few windows that other text would give others."""
    windows = [row["metrics"].get("validation/windows", math.inf) for arm in arms for row in arm.rows]
    if not study.metric.startswith("validation/") or min(windows, default=math.inf) >= FEW_WINDOWS:
        return None
    return (
        f"Scores are of {_times(int(min(windows)), 'window')} of text, which says little of any other: give more data."
    )


def _more_rates(arm: ArmResult) -> str:
    """The factors that were tried, and the next one beyond the best."""
    tried = list(arm.tuning.factors)
    tried = [tried[0] ** 2 / tried[1], *tried] if arm.tuning.best == tried[0] else [*tried, tried[-1] ** 2 / tried[-2]]
    return f"rates=[{','.join(f'{factor:.3g}' for factor in tried)}]"


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
        table.add_column(escape(heading), justify="right" if heading else "left")
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
