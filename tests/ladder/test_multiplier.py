"""What an arm is worth in compute, rung by rung."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.errors import InputError
from moesaic.ladder.bootstrap import Estimate
from moesaic.ladder.laws import Floats, PowerLaw
from moesaic.ladder.multiplier import multiplier, passes

BASELINE, ARM = PowerLaw(0.6, 25.0, 0.11), PowerLaw(0.6, 27.0, 0.115)
"""The arm is worth 1.5 times the compute at 1e11 and 1.9 times at 1e13; the slope is 0.115 / 0.11 - 1."""


def runs(
    law: PowerLaw, seed: int = 0, rungs: int = 5, scatter: float = 0.01, misfit: float = 0.0
) -> tuple[Floats, Floats]:
    random = np.random.default_rng([seed, rungs, int(law is ARM)])
    compute = np.repeat(np.geomspace(1e11, 1e13, rungs), 3)
    noise = scatter * random.standard_normal(3 * rungs) + misfit * np.repeat(random.standard_normal(rungs), 3)
    return compute, law(compute) * np.exp(noise)


def truth(compute: float) -> float:
    return float(BASELINE.inverse(ARM(compute))) / compute


def coverage(ladders: int, samples: int, rungs: int, asymptote: float | None, misfit: float) -> dict[str, float]:
    """Parts of the intervals of the smallest and largest rung's multiplier, and of the slope, that hold the truth."""
    held = {"smallest": 0, "largest": 0, "slope": 0}
    for seed in range(ladders):
        found, slope = multiplier(
            *(runs(law, seed, rungs, scatter=0.005, misfit=misfit) for law in (BASELINE, ARM)),
            asymptote=asymptote,
            seed=seed,
            samples=samples,
        )
        held["smallest"] += found[0].low <= truth(1e11) <= found[0].high
        held["largest"] += found[-1].low <= truth(1e13) <= found[-1].high
        held["slope"] += slope.low <= 0.115 / 0.11 - 1 <= slope.high
    return {name: count / ladders for name, count in held.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rungs", "asymptote", "misfit"), [(4, 0.6, 0.0), (5, 0.6, 0.003), (5, None, 0.0), (6, None, 0.003)]
)
def test_intervals_of_200_ladders_hold_the_truth_in_90_to_99_percent(
    rungs: int, asymptote: float | None, misfit: float
) -> None:
    found = coverage(200, 250, rungs, asymptote, misfit)
    assert all(0.90 <= part <= 0.99 for part in found.values()), found


def test_intervals_of_40_ladders_hold_the_truth() -> None:
    found = coverage(40, 100, 5, 0.6, 0.0)
    assert all(part >= 0.90 for part in found.values()), found


def test_without_noise_the_multipliers_and_their_slope_are_exact() -> None:
    found, slope = multiplier(runs(BASELINE, scatter=0), runs(ARM, scatter=0), asymptote=0.6, samples=100)
    for one, compute in zip(found, np.geomspace(1e11, 1e13, 5), strict=True):
        assert (one.value, one.low, one.high) == pytest.approx([truth(compute)] * 3, rel=1e-4)
    assert slope.value == pytest.approx(0.115 / 0.11 - 1, rel=1e-4)
    assert (slope.low, slope.high) == pytest.approx([slope.value] * 2, rel=1e-3)


def test_the_published_mixture_is_worth_four_times_the_compute() -> None:
    mixture, dense = PowerLaw(1.2, 59.2, 0.0844), PowerLaw(1.2, 64.6, 0.0836)
    compute = np.geomspace(1e18, 1e21, 4)
    found, slope = multiplier((compute, dense(compute)), (compute, mixture(compute)), asymptote=1.2, samples=50)
    assert found[-1].value == pytest.approx(4.2, rel=0.1)
    assert abs(slope.value) < 0.011


def test_an_arm_that_is_the_baseline_is_worth_one() -> None:
    found, slope = multiplier(runs(BASELINE), runs(BASELINE), asymptote=0.6)
    assert all(one.low < 1 < one.high for one in found)
    assert slope.low < 0 < slope.high


def test_arms_may_stand_at_other_compute_than_the_baseline() -> None:
    compute = np.geomspace(3e11, 5e12, 4)
    found, _ = multiplier(runs(BASELINE, scatter=0), (compute, ARM(compute)), asymptote=0.6, samples=50)
    assert [one.value for one in found] == pytest.approx([truth(one) for one in compute], rel=1e-4)


@settings(max_examples=10)
@given(unit=st.floats(1e-9, 1e9), seed=st.integers(0, 99))
def test_the_unit_of_compute_leaves_multipliers(unit: float, seed: int) -> None:
    baseline, arm = runs(BASELINE, seed), runs(ARM, seed)
    one, slope = multiplier(baseline, arm, asymptote=0.6, samples=50)
    other, other_slope = multiplier(
        (baseline[0] * unit, baseline[1]), (arm[0] * unit, arm[1]), asymptote=0.6, samples=50
    )
    for a, b in zip([*one, slope], [*other, other_slope], strict=True):
        assert (b.value, b.low, b.high) == pytest.approx((a.value, a.low, a.high), rel=1e-4, abs=1e-6)


@settings(max_examples=10)
@given(seed=st.integers(0, 99))
def test_the_order_of_runs_leaves_values(seed: int) -> None:
    (compute, loss), arm = runs(BASELINE, seed), runs(ARM, seed)
    order = np.random.default_rng(seed).permutation(len(loss))
    one, _ = multiplier((compute, loss), arm, asymptote=0.6, samples=20)
    other, _ = multiplier((compute[order], loss[order]), arm, asymptote=0.6, samples=20)
    assert [b.value for b in other] == pytest.approx([a.value for a in one], rel=1e-5)


def test_below_the_asymptote_of_the_baseline_no_compute_is_enough() -> None:
    compute = np.geomspace(1e11, 1e13, 4)
    found, slope = multiplier(
        (compute, PowerLaw(1.5, 20.0, 0.14)(compute)), (compute, BASELINE(compute) * 0.95), asymptote=1.5, samples=50
    )
    assert [math.isinf(one.value) for one in found] == [False, False, False, True]
    assert found[-1].high == math.inf
    assert slope.value > 0
    found, slope = multiplier((compute, compute**-0.1 + 3), (compute, compute**-0.1), asymptote=3, samples=50)
    assert all(one == Estimate(math.inf, math.inf, math.inf) for one in found)
    assert math.isnan(slope.value)


def test_what_a_fit_refuses_is_refused_of_either_arm() -> None:
    compute, loss = runs(ARM)
    with pytest.raises(InputError, match="the run diverged"):
        multiplier(runs(BASELINE), (compute, np.where(compute == 1e13, np.nan, loss)), asymptote=0.6)
    with pytest.raises(InputError, match="below the best loss"):
        multiplier((compute, loss), runs(BASELINE), asymptote=1.9)


WORTH = [Estimate(1.1, 0.9, 1.3), Estimate(1.3, 1.1, 1.5), Estimate(1.6, 1.4, 1.9)]


@pytest.mark.parametrize(
    ("ratio", "passed"),
    [(1.0, True), (0.95, True), (0.9, False), (0.5, False), ([1, 0.8, 1], False), ([2, 0.5, 1], True)],
)
def test_an_idea_passes_if_it_is_surely_worth_its_time_at_two_rungs(ratio: float | list[float], passed: bool) -> None:
    assert passes(WORTH, ratio) is passed


def test_one_rung_is_not_enough_and_none_is_known_by_nan() -> None:
    assert not passes(WORTH[2:])
    assert not passes([Estimate(math.nan, math.nan, math.nan)] * 3)
    assert passes([Estimate(math.inf, 2.0, math.inf)] * 2)


@pytest.mark.parametrize("ratio", [0, -1, math.nan, math.inf, [1, 1], [1, 1, 0]])
def test_a_bad_throughput_ratio_is_refused(ratio: float | list[float]) -> None:
    with pytest.raises(InputError, match="throughput ratio"):
        passes(WORTH, ratio)
