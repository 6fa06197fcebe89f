"""Compute multipliers: how many times the baseline's compute an idea is worth, as a function of size.

The baseline's law is inverted at the loss of each rung of the arm; arXiv 2507.17702 calls this efficiency leverage.
The interval holds the baseline's law, and the seeds and the misfit of the arm's rung; see `moesaic.ladder.bootstrap`.
Both arms are taken to have the same noise, which is estimated from both, and independent draws of it.
Where a seed moves both alike, as its order of the data does, the interval is wider than it needs to be.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from moesaic.errors import InputError
from moesaic.ladder.bootstrap import Estimate, Noise, numbers_of, refit
from moesaic.ladder.laws import Floats, fit_runs, read_runs

__all__ = ["multiplier", "passes"]


def multiplier(
    baseline: tuple[ArrayLike, ArrayLike],
    arm: tuple[ArrayLike, ArrayLike],
    *,
    asymptote: float | None = None,
    seed: int = 0,
    samples: int = 1000,
) -> tuple[list[Estimate], Estimate]:
    """Return what each rung of an arm is worth: the baseline's compute for the same loss, over the arm's own.

    Compute may be another measure of size, such as seconds or parameters, if it is so for both.
    It must be equal for the runs of one rung: give the rung's median of seconds.

    Args:
        baseline: Compute and loss of each of the baseline's runs, (n,) each.
        arm: Compute and loss of each of the arm's runs, (m,) each.
        asymptote: Loss at infinite compute of both laws; None fits each.
        seed: Seed of the bootstrap.
        samples: Bootstrap samples.

    Returns:
        The multiplier of each of the arm's rungs, from the smallest; inf where the arm's loss is at or below the
        baseline's asymptote, so that no compute is enough. And the slope d ln(multiplier) / d ln(compute) by least
        squares over the finite ones: above 0, the gain grows with size; nan for fewer than two of them.

    Raises:
        InputError: what `predict` refuses, of either arm.
    """
    random = np.random.default_rng(seed)
    base, runs = read_runs(*baseline), read_runs(*arm)
    law = fit_runs(base, asymptote)
    of_arm = None if asymptote is not None and asymptote >= runs.best else asymptote  # one that it beats is fitted
    fits = (base, law, numbers_of(asymptote)), (runs, fit_runs(runs, of_arm), numbers_of(of_arm))
    noise = Noise.of(*fits, samples=samples, random=random)
    with_baseline = refit(base, law, asymptote, noise, random)
    log_loss = runs.means(runs.log_loss)
    moved = log_loss + noise.means(runs.seeds, random)  # (B, R)
    logs = np.log(runs.compute)
    with np.errstate(over="ignore"):
        value = np.log(law.inverse(np.exp(log_loss))) - logs
        drawn = np.stack([with_baseline.log_inverse(column) for column in moved.T], axis=1) - logs
        found = [Estimate.of(np.exp(one), np.exp(many)) for one, many in zip(value, drawn.T, strict=True)]
    finite = np.isfinite(value)
    if finite.sum() < 2:
        return found, Estimate(math.nan, math.nan, math.nan)
    weights = logs[finite] - logs[finite].mean()
    weights /= (weights**2).sum()
    with np.errstate(invalid="ignore"):
        slopes = drawn[:, finite] @ weights
    return found, Estimate.of(value[finite] @ weights, np.where(np.isnan(slopes), np.inf, slopes))


def passes(multipliers: Sequence[Estimate], throughput_ratio: float | Sequence[float] = 1.0) -> bool:
    """Return whether an idea passes the gate: worth more than it costs, with 95% confidence, at two rungs or more.

    A rung counts when the low end of its multiplier's interval times the throughput ratio exceeds 1.
    An idea that halves the speed must so be worth more than twice the compute.

    Args:
        multipliers: Of each rung, by compute.
        throughput_ratio: Tokens per second of the arm over those of the baseline at equal FLOPs per token, one
            number or one for each rung.

    Raises:
        InputError: a ratio that is not finite and above zero, or not one for each rung.
    """
    ratios = np.asarray(throughput_ratio, dtype=float)
    if ratios.ndim and ratios.shape != (len(multipliers),):
        raise InputError(
            f"throughput ratios of shape {ratios.shape}; must be one, or one for each of {len(multipliers)} rungs"
        )
    if not (np.isfinite(ratios).all() and (ratios > 0).all()):
        raise InputError(f"throughput ratio {throughput_ratio}; must be finite and above 0")
    low: Floats = np.array([one.low for one in multipliers]) * ratios
    return int((low > 1).sum()) >= 2
