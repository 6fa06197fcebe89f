"""Intervals of predictions: how often they hold, what widens them, and the rung that is held out."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.errors import InputError
from moesaic.ladder.bootstrap import Estimate, LawSamples, Noise, RefutedLaw, held_out, predict, refit, sample_laws
from moesaic.ladder.laws import Floats, PowerLaw, fit_runs, read_runs

LAW = PowerLaw(asymptote=0.6, coefficient=25.0, exponent=0.11)


def ladder(seed: int, rungs: int = 5, scatter: float = 0.01, misfit: float = 0.0) -> tuple[Floats, Floats]:
    """Compute and loss of a ladder of three seeds from 1e11 to 1e13, with noise of seeds and of whole rungs."""
    random = np.random.default_rng([seed, rungs])
    compute = np.repeat(np.geomspace(1e11, 1e13, rungs), 3)
    noise = scatter * random.standard_normal(3 * rungs) + misfit * np.repeat(random.standard_normal(rungs), 3)
    return compute, LAW(compute) * np.exp(noise)


def width(found: Estimate) -> float:
    return found.high - found.low


def coverage(ladders: int, samples: int, rungs: int, asymptote: float | None, misfit: float) -> dict[str, float]:
    """Parts of the intervals at 10, 100 and 300 times the largest rung that hold the truth, and of laws not refuted."""
    held = {"10": 0, "100": 0, "300": 0, "held out": 0}
    for seed in range(ladders):
        compute, loss = ladder(seed, rungs, scatter=0.005, misfit=misfit)
        laws = sample_laws(read_runs(compute, loss), asymptote, seed, samples)
        for times in (10, 100, 300):
            found = laws.at(1e13 * times)
            held[str(times)] += found.low <= LAW(1e13 * times) <= found.high
        held["held out"] += not held_out(compute, loss, asymptote=asymptote, seed=seed, samples=samples).refuted
    return {name: count / ladders for name, count in held.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rungs", "asymptote", "misfit"), [(4, 0.6, 0.0), (5, 0.6, 0.003), (5, None, 0.0), (6, None, 0.003)]
)
def test_intervals_of_200_ladders_hold_the_truth_in_90_to_99_percent(
    rungs: int, asymptote: float | None, misfit: float
) -> None:
    found = coverage(200, 250, rungs, asymptote, misfit)
    assert all(0.90 <= found[times] <= 0.99 for times in ("10", "100", "300")), found
    assert found["held out"] >= 0.90, found


@pytest.mark.slow
def test_intervals_of_40_ladders_hold_the_truth_and_are_not_much_wider_than_they_must_be() -> None:
    found = [predict(*ladder(seed), 1e15, asymptote=0.6, seed=seed, samples=100) for seed in range(40)]
    held = [one.low <= LAW(1e15) <= one.high for one in found]
    assert sum(held) >= 36, held
    scatter = float(np.std([one.value for one in found]))
    # Student's t with three degrees of freedom: 3.18 deviations on each side
    assert 4 * scatter < np.mean([width(one) for one in found]) < 8 * scatter


def test_a_refit_of_all_samples_at_once_is_what_the_optimizer_finds() -> None:
    for asymptote in (0.6, None):
        runs = read_runs(*ladder(3, scatter=0.003))
        law = fit_runs(runs, asymptote)
        random = np.random.default_rng(0)
        noise = Noise.of((runs, law, 3), samples=15, random=random)
        drawn = np.log(law(runs.compute))[runs.rung] + noise.runs(runs, np.random.default_rng(1))
        laws = refit(runs, law, asymptote, noise, np.random.default_rng(1))  # the same draws
        for place, targets in enumerate(drawn):
            alone = fit_runs(replace(runs, log_loss=targets), asymptote)
            assert np.exp(laws.log_loss(1e15)[place]) == pytest.approx(float(alone(1e15)), rel=1e-4)


def test_without_noise_the_interval_closes_on_the_truth() -> None:
    for asymptote in (0.6, None):
        found = predict(*ladder(0, scatter=0), 1e15, asymptote=asymptote, samples=100)
        assert found.low == pytest.approx(float(LAW(1e15)), rel=1e-3)
        assert found.high == pytest.approx(float(LAW(1e15)), rel=1e-3)


def test_distance_and_noise_and_a_free_asymptote_widen_the_interval() -> None:
    compute, loss = ladder(0)
    near, far = (predict(compute, loss, at, asymptote=0.6, samples=300) for at in (1e14, 1e16))
    free, noisy = predict(compute, loss, 1e16), predict(*ladder(0, scatter=0.03), 1e14, asymptote=0.6)
    assert width(near) < width(far) < width(free)
    assert width(near) < width(noisy)
    assert near.low < near.value < near.high


def test_a_rung_that_all_its_seeds_agree_on_and_the_law_does_not_widens_the_interval() -> None:
    compute, loss = ladder(0, scatter=0.001)
    bent = loss * np.where(compute == compute[6], 1.03, 1)
    assert width(predict(compute, bent, 1e15, asymptote=0.6)) > 3 * width(predict(compute, loss, 1e15, asymptote=0.6))


def test_the_same_seed_gives_the_same_interval_and_another_one_a_near_one() -> None:
    runs = ladder(0)
    first, again, other = (predict(*runs, 1e15, asymptote=0.6, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert width(first) == pytest.approx(width(other), rel=0.25)


@settings(max_examples=10)
@given(unit=st.floats(1e-9, 1e9), seed=st.integers(0, 99))
def test_the_unit_of_compute_changes_no_prediction(unit: float, seed: int) -> None:
    compute, loss = ladder(seed)
    one = predict(compute, loss, 1e15, asymptote=0.6, samples=50)
    other = predict(compute * unit, loss, 1e15 * unit, asymptote=0.6, samples=50)
    assert (other.value, other.low, other.high) == pytest.approx((one.value, one.low, one.high), rel=1e-5)


def test_fewer_than_two_spare_rungs_are_helped_by_the_seeds() -> None:
    compute, loss = ladder(1, rungs=3)
    found = predict(compute, loss, 1e14)  # three rungs, three numbers
    assert 0 < width(found) < 2
    with pytest.raises(InputError, match="nothing to tell the noise; there must be one rung or one seed more"):
        predict(compute[::3], loss[::3], 1e14)
    assert width(predict(compute[::3], loss[::3], 1e14, asymptote=0.6)) > 0


def test_rungs_may_have_different_numbers_of_seeds() -> None:
    compute, loss = ladder(0)
    kept = np.array([True] * 12 + [True, False, False])
    found = predict(compute[kept], loss[kept], 1e14, asymptote=0.6)
    assert found.low < LAW(1e14) < found.high


def test_a_law_that_holds_is_not_refuted() -> None:
    found = held_out(*ladder(0), asymptote=0.6)
    assert not found.refuted
    assert found.compute == 1e13
    assert found.seeds == 3
    assert found.measured == pytest.approx(float(LAW(1e13)), rel=0.02)
    assert width(found.expected) > width(found.predicted), "the measurement has noise of its own"
    found.require()


def test_a_law_that_breaks_at_the_largest_rung_is_refuted_and_refused() -> None:
    compute, loss = ladder(0, scatter=0.003)
    found = held_out(compute, loss * np.where(compute == 1e13, 0.9, 1), asymptote=0.6)
    assert found.refuted
    with pytest.raises(RefutedLaw, match=r"expects a loss of 1\.5.* at 1e\+13, where 1\.3.* must not be extrapolated"):
        found.require()


def test_the_held_out_rung_does_not_enter_its_law() -> None:
    compute, loss = ladder(0)
    moved = held_out(compute, loss * np.where(compute == 1e13, 0.5, 1), asymptote=0.6)
    assert moved.law == held_out(compute, loss, asymptote=0.6).law


def test_one_seed_at_the_largest_rung_leaves_a_wider_interval_than_three() -> None:
    compute, loss = ladder(0)
    three, one = held_out(compute, loss, asymptote=0.6), held_out(compute[:-2], loss[:-2], asymptote=0.6)
    assert one.seeds == 1
    assert width(one.expected) > width(three.expected)
    assert one.predicted == three.predicted


@pytest.mark.parametrize(("rungs", "asymptote"), [(3, None), (2, 0.6)])
def test_too_few_rungs_to_hold_one_out_are_refused(rungs: int, asymptote: float | None) -> None:
    with pytest.raises(InputError, match=f"{rungs} rungs; to hold one out .* there must be {rungs + 1}"):
        held_out(*ladder(0, rungs=rungs), asymptote=asymptote)


@pytest.mark.parametrize("at", [0, -1e12, math.nan, math.inf])
def test_a_compute_to_predict_at_must_be_a_number_above_zero(at: float) -> None:
    with pytest.raises(InputError, match="to predict at; must be finite and above 0"):
        predict(*ladder(0), at, asymptote=0.6)


def test_quantiles_of_samples_with_infinite_ones_are_numbers() -> None:
    samples = np.array([1.0] * 90 + [math.inf] * 10)
    assert Estimate.of(2.0, samples) == Estimate(2.0, 1.0, math.inf)
    assert Estimate.of(math.inf, np.full(100, math.inf)) == Estimate(math.inf, math.inf, math.inf)
    assert str(Estimate(1.6, 1.4, 1.9)) == "1.6 [1.4, 1.9]"


def test_laws_at_an_asymptote_invert_to_infinity() -> None:
    laws: LawSamples = sample_laws(read_runs(*ladder(0)), 0.6, samples=10)
    assert laws.log_inverse(np.full(10, math.log(0.6) - 1)).tolist() == [math.inf] * 10
    assert laws.log_inverse(laws.log_loss(1e14)) == pytest.approx(np.full(10, math.log(1e14)))
