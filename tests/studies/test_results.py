"""Intervals against hand-computed numbers, and what the verdict says about them."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from moesaic.statistics import Interval, interval
from moesaic.studies.config import StudyConfig
from moesaic.studies.jobs import Job
from moesaic.studies.results import paired_difference, summarize_study, verdict


def test_interval_of_three_values_by_hand() -> None:
    # mean 2, s = 1, t(0.975, 2) = 4.303, half = 4.303 / sqrt(3) = 2.4843
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.high - 2.0 == pytest.approx(2.48434, abs=1e-4)
    assert 2.0 - found.low == pytest.approx(2.48434, abs=1e-4)


def test_interval_of_two_values_by_hand() -> None:
    # mean 1.5, s = 0.7071, t(0.975, 1) = 12.706, half = 12.706 / 2 = 6.353
    assert interval([1.0, 2.0]).low == pytest.approx(1.5 - 6.353)


@pytest.mark.parametrize("values", [[], [1.0]])
def test_fewer_than_two_values_have_no_interval(values: list[float]) -> None:
    found = interval(values)
    assert found.n == len(values)
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_differences_are_paired_by_seed() -> None:
    """The seeds' own spread (10) is far larger than the effect (-1, -1.2, -0.8) and must cancel."""
    difference = paired_difference({0: 9.0, 1: 18.8, 2: 29.2, 7: 0.0}, {2: 30.0, 1: 20.0, 0: 10.0, 8: 99.0})
    assert difference.n == 3
    assert difference.mean == pytest.approx(-1.0)
    assert difference.high == pytest.approx(-1.0 + 4.303 * 0.2 / math.sqrt(3))


@pytest.mark.parametrize(
    ("difference", "higher_is_better", "text"),
    [
        (Interval(-0.05, -0.08, -0.02, 3), False, "moe is better than dense by 0.0500 [0.0200, 0.0800] (3 pairs)"),
        (Interval(-0.05, -0.08, -0.02, 3), True, "moe is worse than dense by 0.0500 [0.0200, 0.0800] (3 pairs)"),
        (Interval(0.05, 0.02, 0.08, 5), False, "moe is worse than dense by 0.0500 [0.0200, 0.0800] (5 pairs)"),
        (
            Interval(-0.05, -0.11, 0.01, 3),
            False,
            "no difference seen between moe and dense: the interval [-0.1100, +0.0100] holds 0 (3 pairs)",
        ),
        (
            Interval(0.0, 0.0, 0.0, 2),
            False,
            "no difference seen between moe and dense: the interval [+0.0000, +0.0000] holds 0 (2 pairs)",
        ),
        (interval([-0.05]), False, "moe minus dense is -0.0500 on one seed: no interval, no verdict"),
        (interval([]), False, "moe against dense: no pair of finished runs, no verdict"),
    ],
)
def test_verdict(difference: Interval, higher_is_better: bool, text: str) -> None:
    assert verdict("moe", "dense", difference, higher_is_better) == text


def made_up(job: Job) -> float:
    """moe better by 0.1 with a spread of 0.01 over pairs; the seeds differ by far more."""
    gain = 0.1 + 0.01 * (job.seed - 1) if job.arm == "moe" else 0.0
    return 2.0 + job.seed - gain + abs(job.factor - 1)


def test_summary_of_a_study(
    study_of: Callable[..., StudyConfig], base: dict[str, Any], run_all: Callable[..., Any]
) -> None:
    study = study_of()
    dense, moe = summarize_study(study, run_all(study, base, made_up))
    assert (dense.arm, dense.difference, dense.verdict) == ("dense", None, "")
    assert dense.level.mean == pytest.approx(3.0)
    assert moe.difference is not None
    assert moe.difference.mean == pytest.approx(-0.1)
    assert moe.difference.high == pytest.approx(-0.1 + 4.303 * 0.01 / math.sqrt(3))
    assert moe.verdict.startswith("moe is better than dense by 0.1000 [")
    assert moe.tuning.best == 1.0
    assert moe.tuning_cpu_seconds == 3 * 40
    assert moe.mean_of("cpu_seconds") == 40
    assert moe.mean_of("router/*/load") == pytest.approx(moe.level.mean + 0.5)
    assert math.isnan(moe.mean_of("absent"))


def test_diverged_runs_count_in_no_mean_and_are_named(
    study_of: Callable[..., StudyConfig], base: dict[str, Any], run_all: Callable[..., Any]
) -> None:
    study = study_of()

    def loss(job: Job) -> float | None:
        return None if job.arm == "moe" and job.seed == 2 else made_up(job)

    _, moe = summarize_study(study, run_all(study, base, loss))
    assert moe.diverged == [2]
    assert moe.level.n == 2
    assert moe.difference is not None
    assert moe.difference.n == 2
    assert moe.verdict.endswith("; moe: 1 of 3 runs diverged and count in no mean")


def test_an_arm_that_the_axis_does_not_change_is_compared_at_each_value(
    study_of: Callable[..., StudyConfig], base: dict[str, Any], run_all: Callable[..., Any]
) -> None:
    values = {"2": {"model.moe.num_experts": 2}, "8": {"model.moe.num_experts": 8}}
    study = study_of(axes={"experts": {"values": values, "fixed": ["dense"]}})
    rows = run_all(study, base, made_up)
    assert sum(row["arm"] == "dense" for row in rows.values()) == 3 + 3, "run once, not once per value"
    found = summarize_study(study, rows)
    assert [arm.name for arm in found] == ["dense", "moe (experts=2)", "moe (experts=8)"]
    assert all(arm.difference is not None and arm.difference.n == 3 for arm in found[1:])
    free = study_of(axes={"experts": {"values": values}})
    found = summarize_study(free, run_all(free, base, made_up))
    assert [(arm.name, arm.baseline) for arm in found] == [
        ("dense (experts=2)", None),
        ("moe (experts=2)", "dense (experts=2)"),
        ("dense (experts=8)", None),
        ("moe (experts=8)", "dense (experts=8)"),
    ]
