"""Fitted laws: constants recovered, published numbers, and what is refused."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.errors import InputError
from moesaic.ladder.laws import (
    Floats,
    JointLaw,
    PowerLaw,
    SurfaceLaw,
    fit_joint,
    fit_power_law,
    fit_surface,
    read_runs,
)

PUBLISHED_COMPUTE = np.array([1e18, 3e18, 1e19, 3e19, 1e20, 3e20])
PUBLISHED_LOSS = np.array([3.5273, 3.3398, 3.1494, 3.0066, 2.8509, 2.7222])
"""Six optima of a public iso-FLOP study; 2.599 was measured at 1e21."""

LAW = PowerLaw(asymptote=0.6, coefficient=25.0, exponent=0.11)
COMPUTE = np.repeat(np.geomspace(1e11, 1e13, 5), 3)


def noisy(loss: Floats, scatter: float, seed: int = 0) -> Floats:
    return loss * np.exp(scatter * np.random.default_rng(seed).standard_normal(loss.shape))


def test_six_published_optima_give_the_published_exponent_and_the_next_run() -> None:
    law = fit_power_law(PUBLISHED_COMPUTE, PUBLISHED_LOSS, asymptote=1.6)
    assert round(law.exponent, 3) == 0.094
    assert law(1e21) == pytest.approx(2.599, rel=0.003)
    assert law(1e21) == pytest.approx(2.605, abs=0.001)


def test_the_first_three_optima_predict_the_run_of_a_thousand_times_the_compute() -> None:
    law = fit_power_law(PUBLISHED_COMPUTE[:3], PUBLISHED_LOSS[:3], asymptote=1.6)
    assert law(1e21) == pytest.approx(2.599, rel=0.003)
    assert law(1e21) == pytest.approx(2.602, abs=0.001)


def test_a_free_asymptote_is_found_between_zero_and_the_best_loss() -> None:
    law = fit_power_law(PUBLISHED_COMPUTE, PUBLISHED_LOSS)
    assert 1 < law.asymptote < 2
    assert law(PUBLISHED_COMPUTE) == pytest.approx(PUBLISHED_LOSS, rel=0.003)


@pytest.mark.parametrize("truth", [LAW, PowerLaw(1.2, 59.2, 0.0844), PowerLaw(0.0, 8.0, 0.05), PowerLaw(2.0, 3e4, 0.4)])
@pytest.mark.parametrize("rungs", [3, 6])
def test_the_constants_of_a_power_law_are_recovered(truth: PowerLaw, rungs: int) -> None:
    compute = np.geomspace(1e11, 1e14, rungs)
    pinned = fit_power_law(compute, truth(compute), asymptote=truth.asymptote)
    free = fit_power_law(compute, truth(compute))
    for found, tolerance in ((pinned, 1e-6), (free, 1e-3)):
        assert found.asymptote == pytest.approx(truth.asymptote, abs=tolerance)
        assert found.coefficient == pytest.approx(truth.coefficient, rel=10 * tolerance)
        assert found.exponent == pytest.approx(truth.exponent, rel=tolerance)


def test_seeds_that_scatter_leave_the_constants_near() -> None:
    compute = np.repeat(np.geomspace(1e11, 1e13, 6), 50)
    found = fit_power_law(compute, noisy(LAW(compute), 0.01))
    assert found.asymptote == pytest.approx(0.6, abs=0.1)
    assert found.exponent == pytest.approx(0.11, abs=0.02)


def test_one_bad_seed_moves_the_law_little() -> None:
    loss = noisy(LAW(COMPUTE), 0.003)
    spoilt = loss.copy()
    spoilt[-1] *= 1.3  # plain least squares would follow by a third of ln 1.3 at the top rung, 8%
    law, moved = (fit_power_law(COMPUTE, values, asymptote=0.6) for values in (loss, spoilt))
    assert moved(1e13) == pytest.approx(law(1e13), rel=0.01)
    assert moved(1e13) != pytest.approx(law(1e13), rel=1e-5)


def test_the_inverse_is_the_inverse_and_infinite_at_the_asymptote() -> None:
    assert LAW.inverse(LAW(COMPUTE)) == pytest.approx(COMPUTE)
    assert LAW.inverse([0.6, 0.3]).tolist() == [math.inf, math.inf]


def test_a_mixture_and_its_dense_twin_are_four_times_apart() -> None:
    mixture, dense = PowerLaw(1.2, 59.2, 0.0844), PowerLaw(1.2, 64.6, 0.0836)
    compute = np.geomspace(1e18, 1e20, 5)
    found = [fit_power_law(compute, law(compute), asymptote=1.2) for law in (mixture, dense)]
    assert found[0].exponent == pytest.approx(found[1].exponent, abs=0.001)
    # the published 4.2 is near the size of the published runs
    assert found[1].inverse(found[0](1e21)) / 1e21 == pytest.approx(4.2, rel=0.1)


@settings(max_examples=10)
@given(
    unit=st.floats(1e-12, 1e12),
    scale=st.floats(0.1, 10),
    asymptote=st.sampled_from([None, 0.5]),
    seed=st.integers(0, 99),
)
def test_units_and_the_order_of_runs_change_nothing(
    unit: float, scale: float, asymptote: float | None, seed: int
) -> None:
    loss = noisy(LAW(COMPUTE), 0.005, seed)
    law = fit_power_law(COMPUTE, loss, asymptote=asymptote)
    order = np.random.default_rng(seed).permutation(len(loss))
    pinned = None if asymptote is None else asymptote * scale
    other = fit_power_law(COMPUTE[order] * unit, loss[order] * scale, asymptote=pinned)
    assert other(1e14 * unit) / scale == pytest.approx(float(law(1e14)), rel=1e-4)
    assert other.exponent == pytest.approx(law.exponent, rel=2e-3)


def test_the_delta_follows_the_scatter_of_the_seeds_and_one_outlier_does_not_raise_it() -> None:
    quiet = read_runs(COMPUTE, noisy(LAW(COMPUTE), 0.001))
    assert quiet.delta() == 0.01
    many = np.repeat(COMPUTE, 20)
    assert read_runs(many, noisy(LAW(many), 0.1)).delta() == pytest.approx(0.1345, rel=0.15)
    loss = noisy(LAW(COMPUTE), 0.001)
    loss[4] *= 2
    assert read_runs(COMPUTE, loss).delta() == 0.01


SURFACE = SurfaceLaw(asymptote=0.6, a=30.0, alpha=0.3, b=20.0, beta=0.25)
SIZES, TOKENS = (grid.ravel() for grid in np.meshgrid(np.geomspace(1e5, 1e7, 4), np.geomspace(1e6, 1e8, 4)))


@pytest.mark.parametrize("asymptote", [0.6, None])
@pytest.mark.parametrize("truth", [SURFACE, SurfaceLaw(1.69, 406.4, 0.34, 410.7, 0.28)])
def test_the_constants_of_a_surface_are_recovered(truth: SurfaceLaw, asymptote: float | None) -> None:
    pinned = None if asymptote is None else truth.asymptote
    found = fit_surface(SIZES, TOKENS, truth(SIZES, TOKENS), asymptote=pinned)
    for name in ("asymptote", "a", "alpha", "b", "beta"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=1e-3), name


def test_a_noisy_surface_predicts_a_larger_run() -> None:
    found = fit_surface(SIZES, TOKENS, noisy(SURFACE(SIZES, TOKENS), 0.003))
    assert found(1e8, 1e9) == pytest.approx(SURFACE(1e8, 1e9), rel=0.05)


JOINT = JointLaw(0.7, a=35.0, delta=0.23, alpha=-0.19, gamma=-0.01, b=36.0, omega=-0.55, beta=-0.178, zeta=0.026)
GRID = tuple(grid.ravel() for grid in np.meshgrid(np.geomspace(1e5, 1e7, 4), np.geomspace(1e6, 1e8, 4), [1, 4, 16, 64]))


def test_the_nine_constants_of_the_joint_law_are_recovered() -> None:
    found = fit_joint(*GRID, JOINT(*GRID))
    for name in ("asymptote", "a", "delta", "alpha", "gamma", "b", "omega", "beta", "zeta"):
        assert getattr(found, name) == pytest.approx(getattr(JOINT, name), rel=1e-3), name


def test_a_noisy_joint_law_predicts_a_larger_run() -> None:
    found = fit_joint(*GRID, noisy(JOINT(*GRID), 0.002))
    assert found(1e8, 1e9, 16) == pytest.approx(JOINT(1e8, 1e9, 16), rel=0.05)


THREE = [1e11, 1e12, 1e13]
FALLING = [2.0, 1.8, 1.65]


@pytest.mark.parametrize(
    ("compute", "loss", "asymptote", "message"),
    [
        ([1e11, 1e11, 1e12], FALLING, None, "2 rungs of different compute; .* free asymptote must have 3"),
        ([1e11, 1e11, 1e11], FALLING, 0.5, "1 rungs of different compute; .* pinned asymptote must have 2"),
        ([], [], None, "0 rungs"),
        (THREE, [2.0, math.nan, 1.65], None, r"loss of run 1 is nan \(at compute 1e\+12\): the run diverged"),
        (THREE, [2.0, 1.8, math.inf], None, "loss of run 2 is inf .*: the run diverged; must be finite"),
        (THREE, [2.0, 1.8, -0.1], None, "loss of run 2 is -0.1"),
        (THREE, FALLING, 1.65, "an asymptote of 1.65; must be .* below the best loss, 1.65"),
        (THREE, FALLING, 2.0, "an asymptote of 2.0"),
        (THREE, FALLING, -0.1, "an asymptote of -0.1; must be at least 0"),
        (THREE, FALLING, math.nan, "an asymptote of nan"),
        ([0, 1e12, 1e13], FALLING, None, "compute of run 0 is 0.0; must be finite and above 0"),
        ([-1e11, 1e12, 1e13], FALLING, None, "compute of run 0 is -1"),
        (THREE, FALLING[:2], None, r"shapes .*'compute': \(3,\), 'loss': \(2,\).* equal length"),
        ([THREE], [FALLING], None, "must be one row"),
        (THREE, [1.6, 1.8, 2.0], None, "the loss does not fall with compute"),
    ],
)
def test_bad_runs_are_refused_with_the_reason(
    compute: list[float], loss: list[float], asymptote: float | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        fit_power_law(compute, loss, asymptote=asymptote)


def test_bad_surfaces_are_refused_with_the_reason() -> None:
    loss = SURFACE(SIZES, TOKENS)
    with pytest.raises(InputError, match="1 different values of tokens; must be 3"):
        fit_surface(SIZES, np.full_like(SIZES, 1e6), loss)
    with pytest.raises(InputError, match=r"3 different points \(parameters, tokens\); must be 5"):
        fit_surface(THREE, THREE, FALLING)
    with pytest.raises(InputError, match="an asymptote of 9"):
        fit_surface(SIZES, TOKENS, loss, asymptote=9)
    with pytest.raises(InputError, match=r"loss of run 0 is nan \(at parameters 1e\+05, tokens 1e\+06\)"):
        fit_surface(SIZES, TOKENS, np.where(np.arange(16) == 0, np.nan, loss))


def test_bad_joint_grids_are_refused_with_the_reason() -> None:
    sizes, tokens, experts = GRID
    with pytest.raises(InputError, match="1 different values of experts; must be 2"):
        fit_joint(sizes, tokens, np.ones_like(sizes), JOINT(*GRID))
    with pytest.raises(InputError, match=r"8 different points .* must be 9"):
        fit_joint(sizes[:8], tokens[:8], experts[:8], JOINT(*GRID)[:8])
    with pytest.raises(InputError, match="experts of run 0 is 0"):
        fit_joint(sizes, tokens, experts - 1, JOINT(*GRID))
