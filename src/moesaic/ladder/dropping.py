"""Arms that go no further up a ladder: far behind at a cheap rung (one cut of successive halving, arXiv 1502.07943).

The cut is by the measured runs of one rung. So an arm that is kept looks better at that rung than it is, by the luck
of its seeds there; runs at larger rungs are new ones, which nothing was selected by.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping

from moesaic.errors import InputError
from moesaic.ladder.config import LadderConfig, name_of
from moesaic.ladder.rungs import AXIS
from moesaic.studies.config import AxisConfig, StudyConfig
from moesaic.studies.jobs import Row
from moesaic.studies.plan import score
from moesaic.studies.results import ArmResult, listed_factors, summarize_study

__all__ = ["dropped", "kept", "up_to_drop"]


def up_to_drop(ladder: LadderConfig, study: StudyConfig) -> StudyConfig:
    """The study of all arms up to the rung that decides; all of it without one."""
    if ladder.drop is None:
        return study
    last = ladder.drop.rung
    return _with_rungs(study, {name_of(flops) for flops in ladder.rungs if flops <= last})


def kept(study: StudyConfig, out: Mapping[str, str]) -> StudyConfig:
    """The study without the arms that go no further."""
    axis = study.axes[AXIS]
    arms = {arm: overrides for arm, overrides in study.arms.items() if arm not in out}
    marks = {arm: mark for arm, mark in study.marks.items() if arm not in out}
    of_arm = {arm: values for arm, values in axis.of_arm.items() if arm not in out}
    return dataclasses.replace(study, arms=arms, marks=marks, axes={AXIS: dataclasses.replace(axis, of_arm=of_arm)})


def _with_rungs(study: StudyConfig, names: set[str]) -> StudyConfig:
    axis = study.axes[AXIS]
    values = {name: overrides for name, overrides in axis.values.items() if name in names}
    of_arm = {arm: {name: own[name] for name in values if name in own} for arm, own in axis.of_arm.items()}
    return dataclasses.replace(study, axes={AXIS: AxisConfig(values, axis.fixed, of_arm)})


def dropped(ladder: LadderConfig, study: StudyConfig, rows: Mapping[str, Row]) -> dict[str, str]:
    """The arms that have no runs above the rung that decides, and why, by rows alone.

    An arm has failed if it diverged at all learning rates that were tried. It is dropped if its mean over the seeds is
    more than `ladder.drop.behind` of the baseline's above it, if `ladder.drop.keep` others are better, or if a run of
    its own diverged there. Nothing is dropped before all arms have all runs up to that rung.

    Raises:
        InputError: the baseline diverged there, so that nothing can be behind it.
    """
    out = {}
    for result in summarize_study(study, rows):
        if result.tuning.failed:
            out[result.arm] = f"failed: it diverged at all learning rates tried ({listed_factors(result.tuning)})"
    if ladder.drop is None:
        return out
    rung, most = name_of(ladder.drop.rung), ladder.drop.behind
    found = {result.arm: result for result in summarize_study(study, rows) if result.axis == f"{AXIS}={rung}"}
    judged = {arm: _mean(study, found[arm]) for arm in ladder.arms if arm not in out}
    means = {arm: mean for arm, mean in judged.items() if mean is not None}
    if len(means) < len(judged):
        return out
    base = means.pop(ladder.baseline, math.inf)
    if not math.isfinite(base):
        raise InputError(
            f"ladder.drop.rung={rung}: {ladder.baseline}, the baseline, diverged there, so that no arm can be behind "
            "it; it must have other learning rates, or ladder.drop must be null"
        )
    ranking = sorted(means, key=means.__getitem__)
    for arm, mean in means.items():
        if not math.isfinite(mean):
            out[arm] = f"dropped at {rung}: it diverged there"
        elif mean > (1 + most) * base:
            out[arm] = f"dropped at {rung}: {mean / base - 1:.1%} behind {ladder.baseline}, and {most:.1%} was the most"
        elif ladder.drop.keep is not None and ranking.index(arm) >= ladder.drop.keep:
            place = f"number {ranking.index(arm) + 1} of {len(ranking)} beside {ladder.baseline}"
            out[arm] = f"dropped at {rung}: {place}, and {ladder.drop.keep} were kept"
    return out


def _mean(study: StudyConfig, result: ArmResult) -> float | None:
    """Over the seeds; infinite if a run diverged, None if one is missing."""
    if result.missing or not result.rows:
        return None
    return statistics.fmean(score(study, row) for row in result.rows)
