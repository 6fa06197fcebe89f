"""Minutes into steps: how long the runs of a comparison are, and what they will take."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from moesaic.errors import InputError
from moesaic.studies.progress import duration

__all__ = ["Plan", "Workload", "choose_plan", "estimate", "parse_budget"]

RATES = (0.5, 1.0, 2.0)
"""Factors on the learning rates that are tried for every arm."""

FEWEST_TUNED_STEPS = 100
"""Below it, a budget goes into steps instead of learning rates: short runs say little about the best rate."""

FEWEST_STEPS = 10

FIXED_SECONDS = 3.0
"""What a run takes besides training and scoring."""

IMPORT_SECONDS = 8.0
"""What a worker takes before its first run."""

UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}


@dataclasses.dataclass(frozen=True)
class Workload:
    """What decides how long the runs of one arm take, beside their steps."""

    step_seconds: float
    """One optimizer step on one thread."""
    score_steps: float
    """The final score, as a number of training steps."""
    check_steps: float
    """All checks during the run, likewise."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long each run is, and which learning rates are tried."""

    steps: int
    rates: tuple[float, ...]
    """Factors on every arm's learning rates; (1.0,) means that nothing is tuned."""
    seconds: float
    """What is expected of all runs together, with all workers."""
    at_most: float
    """The same if the best rate of every arm lies at the edge, so that the grid grows."""


def parse_budget(text: str) -> float:
    """Seconds of a duration such as 90s, 10m, 1h30m.

    Raises:
        InputError: another form, or nothing.
    """
    found = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text)
    seconds = (
        0.0
        if found is None
        else sum(float(n or 0) * unit for n, unit in zip(found.groups(), UNITS.values(), strict=True))
    )
    if not 0 < seconds <= 1e8:
        raise InputError(f"budget={text!r}: must be a duration such as 90s, 10m or 1h30m")
    return seconds


def estimate(
    arms: Mapping[str, Workload], steps: int, rates: Sequence[float], num_seeds: int, workers: int
) -> tuple[float, float]:
    """Seconds of all runs together, and the most they can be, where the grids of learning rates grow."""
    tuning = len(rates) if len(rates) > 1 else 0
    per_run = {
        name: FIXED_SECONDS + load.step_seconds * (steps + load.score_steps + load.check_steps)
        for name, load in arms.items()
    }
    # the last run of a few workers leaves the others idle
    idle = max(per_run.values()) * (workers - 1) / workers / 2
    expected = IMPORT_SECONDS + math.fsum(per_run.values()) * (tuning + num_seeds) / workers + idle
    grown = math.fsum(per_run.values()) * 2 / workers if tuning else 0.0
    return expected, expected + grown


def choose_plan(
    arms: Mapping[str, Workload],
    *,
    budget: float,
    num_seeds: int,
    workers: int,
    steps: int | None = None,
    rates: Sequence[float] | None = None,
) -> Plan:
    """The longest runs that fit a budget.

    Args:
        budget: seconds for all runs together.
        steps: what the person asked for; then the budget decides nothing.
        rates: likewise, factors on the learning rates.

    Raises:
        InputError: the budget is too short for any run that would say something.
    """
    wanted = tuple(rates) if rates is not None else RATES

    def most_steps(factors: Sequence[float]) -> int:
        low, high = 0, 10**7
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (
                (middle, high) if estimate(arms, middle, factors, num_seeds, workers)[0] <= budget else (low, middle)
            )
        return low

    if steps is None:
        steps = most_steps(wanted)
        if rates is None and steps < FEWEST_TUNED_STEPS:
            wanted = (1.0,)
            steps = most_steps(wanted)
        if steps < FEWEST_STEPS:
            needed = estimate(arms, FEWEST_STEPS, wanted, num_seeds, workers)[0]
            raise InputError(
                f"budget={duration(budget)}: {FEWEST_STEPS} steps in every run take {duration(needed)} on this "
                f"machine; must be longer, or give a smaller model or fewer seeds"
            )
        steps = _rounded(steps)
    expected, at_most = estimate(arms, steps, wanted, num_seeds, workers)
    return Plan(steps, wanted, expected, at_most)


def _rounded(steps: int) -> int:
    """Two leading digits, downwards."""
    unit = 10 ** max(0, len(str(steps)) - 2)
    return steps // unit * unit
