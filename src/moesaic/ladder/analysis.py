"""What the points of a ladder say: the law of each arm, whether its largest rung refutes it, what an arm is worth."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import InputError
from moesaic.ladder.bootstrap import Estimate, HeldOut, held_out
from moesaic.ladder.config import LadderConfig
from moesaic.ladder.laws import PowerLaw, fit_power_law
from moesaic.ladder.multiplier import multiplier, passes
from moesaic.ladder.points import Cell, Points, points_of

__all__ = ["ASYMPTOTES", "MEASURES", "Analysis", "Fit", "Worth", "analyze"]

ASYMPTOTES = ("pinned", "free")

MEASURES: dict[str, Callable[[Points], NDArray[np.float64]]] = {
    "FLOPs": lambda points: points.flops,
    "seconds": lambda points: points.seconds,
    "parameters": lambda points: points.parameters,
}
"""In what an arm may be worth more than the baseline."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """The law of an arm over active FLOPs."""

    arm: str
    asymptote: str
    """pinned or free"""
    law: PowerLaw | None = None
    held: HeldOut | None = None
    reason: str = ""
    """Why there is no law, or no held-out rung."""


@dataclasses.dataclass(frozen=True)
class Worth:
    """How many times as much of a measure the baseline needs for the loss of an arm, rung by rung."""

    arm: str
    measure: str
    rungs: tuple[str, ...]
    values: tuple[Estimate, ...] = ()
    slope: Estimate | None = None
    """d ln(value) / d ln(measure)"""
    reason: str = ""
    """Why there is nothing."""


@dataclasses.dataclass(frozen=True)
class Analysis:
    """All that is fitted to a ladder."""

    fits: tuple[Fit, ...]
    worths: tuple[Worth, ...]
    throughput: dict[str, tuple[float, ...]]
    """FLOPs per second over those of the baseline at the same rung, by arm."""
    gates: dict[str, bool]
    """Whether worth in FLOPs times throughput exceeds 1 with 95% confidence at two rungs, by arm."""

    def fit(self, arm: str, asymptote: str) -> Fit:
        return next(fit for fit in self.fits if (fit.arm, fit.asymptote) == (arm, asymptote))

    def worth(self, arm: str, measure: str) -> Worth:
        return next(worth for worth in self.worths if (worth.arm, worth.measure) == (arm, measure))


def analyze(ladder: LadderConfig, cells: Sequence[Cell]) -> Analysis:
    """Fit what can be fitted; what cannot has its reason. Worth is by the law with the pinned asymptote."""
    found: dict[str, Points | str] = {arm: _points(ladder, cells, arm) for arm in ladder.arms}
    fits = [_fit(ladder, arm, points, which) for arm, points in found.items() for which in ASYMPTOTES]
    base, others = found[ladder.baseline], [arm for arm in ladder.arms if arm != ladder.baseline]
    worths = [_worth(ladder, base, arm, found[arm], measure) for arm in others for measure in MEASURES]
    throughput = {arm: _throughput(ladder, cells, arm) for arm in others}
    gates = {
        worth.arm: passes(worth.values, throughput[worth.arm])
        for worth in worths
        if worth.measure == "FLOPs" and worth.values
    }
    return Analysis(tuple(fits), tuple(worths), throughput, gates)


def _points(ladder: LadderConfig, cells: Sequence[Cell], arm: str) -> Points | str:
    """The points of an arm, or why there are none."""
    try:
        return points_of(ladder, cells, arm)
    except InputError as error:
        return str(error)


def _fit(ladder: LadderConfig, arm: str, points: Points | str, which: str) -> Fit:
    if isinstance(points, str):
        return Fit(arm, which, reason=points)
    asymptote = ladder.asymptote if which == "pinned" else None
    law = None
    try:
        law = fit_power_law(points.flops, points.loss, asymptote=asymptote)
        return Fit(arm, which, law, held_out(points.flops, points.loss, asymptote=asymptote))
    except InputError as error:
        return Fit(arm, which, law, reason=str(error))


def _worth(ladder: LadderConfig, base: Points | str, arm: str, points: Points | str, measure: str) -> Worth:
    for each in (base, points):
        if isinstance(each, str):
            return Worth(arm, measure, (), reason=each)
    assert not isinstance(base, str) and not isinstance(points, str)
    rungs, of = tuple(dict.fromkeys(points.rungs)), MEASURES[measure]
    try:
        values, slope = multiplier(
            (of(base), base.loss), (of(points), points.loss), asymptote=ladder.asymptote, seed=0, samples=1000
        )
    except InputError as error:
        return Worth(arm, measure, rungs, reason=str(error))
    return Worth(arm, measure, rungs, tuple(values), slope)


def _throughput(ladder: LadderConfig, cells: Sequence[Cell], arm: str) -> tuple[float, ...]:
    """Ratios to the baseline at the rungs of the fit that both have finished."""
    speed: Mapping[tuple[str, str], float] = {
        (cell.arm, cell.rung): cell.flops_per_second for cell in cells if cell.finished
    }
    return tuple(
        speed[arm, rung] / speed[ladder.baseline, rung]
        for rung in ladder.fitted()
        if (arm, rung) in speed and (ladder.baseline, rung) in speed
    )
