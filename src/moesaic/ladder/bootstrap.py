"""Intervals of what a fitted power law says: a bootstrap over seeds and rungs that covers with few of both.

The plain bootstrap, which draws runs or rungs again, covers too little here.
Four to six rungs leave one to four spare ones beside the law's numbers, and three seeds of a rung share its misfit.
A rung's misfit is what its shape and rates add to all of its seeds alike.
So the data of a sample are drawn from the fitted law, and the law is fitted to them again:

1. The residual of a rung's mean has R - p degrees of freedom, for R rungs and a law of p numbers. Its variance v
   holds seeds and misfit alike. Each sample draws v as (R - p) * mean square / chi-square(R - p). So the scatter
   of the samples has the tails of Student's t, and the factor sqrt(R / (R - p)) is in it.
2. Each seed draws a deviation from its rung's mean out of those of all rungs, times sqrt(S / (S - 1)) for S seeds.
3. What the seeds leave of v is the rung's misfit, drawn as normal: there are too few residuals to draw from.
4. The refitted laws give the 2.5% and 97.5% quantiles of whatever is asked: a loss, a compute, a multiplier.

In a linear model these are the intervals of Student's t, whatever the misfit; the tests count how often they hold.
They are the generalized intervals of Weerahandi (1993, J. Am. Stat. Assoc. 88) for variance components.
The bootstrap of residuals, its factor, and the one of two levels: Davison and Hinkley (1997, sections 3.8 and 6.2).

Two bounds keep v sensible.
It is never below the variance that the seeds show alone, at its lower end of 99.9% confidence: a higher
bound would cover too often.
With fewer than two spare rungs Student's t is useless (a factor of 12.7 for one, none for zero).
Then the misfit is taken to be at most as large as the scatter of the seeds, unless the residual is larger.

Seeds of all rungs are taken to scatter alike, in the logarithm of the loss.
"""

import math
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import chi2

from moesaic.errors import InputError
from moesaic.ladder.laws import EXPONENTS, Floats, PowerLaw, Runs, fit_runs, read_runs

__all__ = [
    "Estimate",
    "HeldOut",
    "LawSamples",
    "Noise",
    "RefutedLaw",
    "held_out",
    "numbers_of",
    "predict",
    "refit",
    "sample_laws",
]


@dataclass(frozen=True)
class Estimate:
    """A number with its two-sided 95% interval; inf is a value like others, nan says that there is none."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"

    @classmethod
    def of(cls, value: float | Floats, samples: Floats) -> "Estimate":
        """Return `value` with the 2.5% and 97.5% quantiles of `samples` (B,), among which inf may be."""
        low, high = np.quantile(samples, [0.025, 0.975], method="nearest")  # between two inf there is nan
        return cls(float(value), float(low), float(high))


@dataclass(frozen=True)
class Noise:
    """Draws of what moves the mean log loss of a rung; see the module.

    Attributes:
        variance: Variance v of a rung's mean in each sample (B,).
        of_seed: Part of it that one seed alone brings (B,); a mean over S seeds has of_seed / S of it.
        deviations: Deviations of seeds, of unit variance, to draw from; a zero where seeds agree or are single.
        seeds: Seeds of a rung, the harmonic mean over rungs.
    """

    variance: Floats
    of_seed: Floats
    deviations: Floats
    seeds: float

    @classmethod
    def of(cls, *fits: tuple[Runs, PowerLaw, int], samples: int, random: np.random.Generator) -> "Noise":
        """Draw the variances `samples` times for the residuals of laws, each with how many of its numbers were fitted.

        Several fits share one variance: more degrees of freedom, so a narrower interval, for one more assumption.

        Raises:
            InputError: neither a spare rung nor a second seed, so that nothing tells the noise.
        """
        spare = sum(len(runs.compute) - numbers for runs, _, numbers in fits)
        extra = sum(len(runs.rung) - len(runs.compute) for runs, _, _ in fits)
        if not spare and not extra:
            raise InputError(
                "rungs of one seed, no more of them than the law has fitted numbers, leave nothing to tell the noise; "
                "there must be one rung or one seed more"
            )
        rungs = sum(len(runs.compute) for runs, _, _ in fits)
        seeds = rungs / sum(float((1 / runs.seeds).sum()) for runs, _, _ in fits)
        within = np.concatenate([runs.within() for runs, _, _ in fits])
        size = np.concatenate([runs.seeds[runs.rung] for runs, _, _ in fits])
        deviations, scatter, least, drawn = np.zeros(1), 0.0, 0.0, np.zeros(samples)
        if extra:
            scatter = float((within**2).sum()) / extra
            least = scatter * extra / float(chi2.ppf(0.999, extra)) / seeds
            drawn = scatter * extra / random.chisquare(extra, samples)
        if scatter:
            raw = within[size > 1] * np.sqrt(size[size > 1] / (size[size > 1] - 1))
            deviations = raw / math.sqrt(float((raw**2).mean()))
        variance, square = np.full(samples, np.inf), 0.0
        if spare:
            square = sum(float((_residual(runs, law) ** 2).sum()) for runs, law, _ in fits) / spare
            variance = np.maximum(square * spare / random.chisquare(spare, samples), least)
        if spare < 2 and extra:
            variance = np.minimum(variance, np.maximum(drawn * (1 / seeds + 1), square))
        return cls(variance, np.minimum(scatter, variance * seeds), deviations, seeds)

    def runs(self, runs: Runs, random: np.random.Generator) -> Floats:
        """Draw what is added to the log loss of each run (B, n)."""
        shape = (len(self.variance), len(runs.rung))
        misfit = self._misfit() * random.standard_normal((shape[0], len(runs.compute)))
        return misfit[:, runs.rung] + np.sqrt(self.of_seed)[:, None] * random.choice(self.deviations, shape)

    def means(self, seeds: ArrayLike, random: np.random.Generator) -> Floats:
        """Draw what is added to the mean log loss of rungs with `seeds` runs each (R,): (B, R)."""
        of_seeds = self.of_seed[:, None] / np.asarray(seeds, dtype=float)
        normal = random.standard_normal(of_seeds.shape)
        return np.sqrt(self._misfit() ** 2 + of_seeds) * normal

    def _misfit(self) -> Floats:
        return np.sqrt(np.maximum(self.variance - self.of_seed / self.seeds, 0))[:, None]


def _residual(runs: Runs, law: PowerLaw) -> Floats:
    """Return the mean log loss of each rung less that of the law (R,)."""
    return runs.means(runs.log_loss) - np.log(law(runs.compute))


@dataclass(frozen=True)
class LawSamples:
    """A fitted law and its refits to B samples.

    Attributes:
        law: The law fitted to the runs themselves.
        asymptote, log_coefficient, exponent: Its numbers in each sample (B,).
        noise: What the samples were drawn with.
    """

    law: PowerLaw
    asymptote: Floats
    log_coefficient: Floats
    exponent: Floats
    noise: Noise

    def log_loss(self, compute: float) -> Floats:
        """Return ln of the loss at `compute` in each sample (B,)."""
        return np.log(self.asymptote + np.exp(self.log_coefficient - self.exponent * math.log(compute)))

    def log_inverse(self, log_loss: Floats) -> Floats:
        """Return ln of the compute at which each sample (B,) has its loss (B,); inf at or below its asymptote."""
        above = np.exp(log_loss) - self.asymptote
        logs = np.log(np.where(above > 0, above, 1))
        return np.where(above > 0, (self.log_coefficient - logs) / self.exponent, np.inf)

    def at(self, compute: float) -> Estimate:
        """Return the loss at `compute`, the mean over seeds that a run there has if it follows the law.

        Raises:
            InputError: compute that is not finite and above zero.
        """
        if not (math.isfinite(compute) and compute > 0):
            raise InputError(f"compute {compute} to predict at; must be finite and above 0")
        return Estimate.of(self.law(compute), np.exp(self.log_loss(compute)))


def sample_laws(runs: Runs, asymptote: float | None, seed: int = 0, samples: int = 1000) -> LawSamples:
    """Fit a power law to `runs`, and again to each of `samples` bootstrap samples; see the module.

    Raises:
        InputError: what `fit_power_law` refuses, and runs that leave nothing to tell the noise.
    """
    law, random = fit_runs(runs, asymptote), np.random.default_rng(seed)
    noise = Noise.of((runs, law, numbers_of(asymptote)), samples=samples, random=random)
    return refit(runs, law, asymptote, noise, random)


def numbers_of(asymptote: float | None) -> int:
    """Return how many numbers of a power law are fitted."""
    return 2 + (asymptote is None)


def refit(runs: Runs, law: PowerLaw, asymptote: float | None, noise: Noise, random: np.random.Generator) -> LawSamples:
    """Fit the law again to samples that are `law` and `noise`."""
    drawn = np.log(law(runs.compute))[runs.rung] + noise.runs(runs, random)
    level, exponent, floor = _refit(runs, law, drawn, asymptote).T
    return LawSamples(law, floor, level + exponent * float(np.log(runs.compute).mean()), exponent, noise)


def _refit(runs: Runs, law: PowerLaw, targets: Floats, asymptote: float | None) -> Floats:
    """Fit the law to log losses (B, n) at once: Levenberg-Marquardt steps of the Huber loss, from `law`.

    One call of scipy's optimizer for each sample would take a hundred times longer; the tests hold this to it.

    Returns:
        Level (ln of the part above the asymptote at the mean position), exponent and asymptote: (B, 3).
    """
    count, delta, u = len(targets), runs.delta(), runs.position
    start = [
        math.log(law.coefficient) - law.exponent * float(np.log(runs.compute).mean()),
        law.exponent,
        law.asymptote,
    ]
    p = np.tile(start, (count, 1))
    low, high = np.tile([-np.inf, EXPONENTS[0], 0.0], (count, 1)), np.tile([np.inf, EXPONENTS[1], 0.0], (count, 1))
    if asymptote is None:
        high[:, 2] = np.exp(targets.min(1)) * (1 - 1e-9)
    else:
        low[:, 2] = high[:, 2] = asymptote
    p = np.clip(p, low, high)
    damping = np.full(count, 1e-3)
    active = np.arange(count)

    def curve(p: Floats, targets: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        above = np.exp(p[:, :1] - p[:, 1:2] * u)
        total = p[:, 2:] + above
        residual = np.log(total)[:, runs.rung] - targets
        size = np.abs(residual)
        cost = np.where(size <= delta, residual**2 / 2, delta * (size - delta / 2)).sum(1)
        return above, total, residual, cost

    above, total, residual, cost = curve(p, targets)
    for _ in range(100):
        q = p[active]
        weight = np.minimum(1, delta / np.maximum(np.abs(residual), 1e-300))
        slopes = np.stack([above / total, -u * above / total, 1 / total], axis=2)  # (B, R, 3)
        gradient = np.einsum("brk,br->bk", slopes, runs.sums(weight * residual))
        curvature = np.einsum("brk,br,brl->bkl", slopes, runs.sums(weight), slopes)
        held = ((q <= low[active]) & (gradient > 0)) | ((q >= high[active]) & (gradient < 0)) | (low == high)[active]
        gradient = np.where(held, 0, gradient)
        curvature = np.where(held[:, :, None] | held[:, None, :], 0, curvature)
        diagonal = np.einsum("bkk->bk", curvature)
        curvature = curvature + np.eye(3) * np.where(held, 1, diagonal * damping[active][:, None] + 1e-300)[:, None]
        step = np.linalg.solve(curvature, -gradient[..., None])[..., 0]
        step[:, 0] = np.clip(step[:, 0], -2, 2)  # a longer one overflows
        tried = np.clip(q + step, low[active], high[active])
        new = curve(tried, targets[active])
        better = new[3] <= cost
        gain = np.where(better, cost - new[3], np.inf)
        p[active] = np.where(better[:, None], tried, q)
        damping[active] = np.clip(np.where(better, damping[active] / 5, damping[active] * 5), 1e-12, 1e12)
        above, total, residual, cost = (
            np.where(better.reshape(-1, *[1] * (now.ndim - 1)), now, old)
            for now, old in zip(new, (above, total, residual, cost), strict=True)
        )
        going = (gain > 1e-7 * cost + 1e-30) & (damping[active] < 1e11)
        active = active[going]
        above, total, residual, cost = (values[going] for values in (above, total, residual, cost))
        if not len(active):
            break
    return p


def predict(
    compute: ArrayLike,
    loss: ArrayLike,
    at: float,
    *,
    asymptote: float | None = None,
    seed: int = 0,
    samples: int = 1000,
) -> Estimate:
    """Predict the loss at another compute, with a 95% interval.

    The interval is that of the law, the mean over many seeds. `held_out` adds the noise of a measurement.

    Args:
        compute: Compute of each run (n,), equal for the runs of one rung.
        loss: Loss of each run (n,).
        at: Compute to predict at, in the same unit.
        asymptote: Loss at infinite compute; None fits it.
        seed: Seed of the bootstrap.
        samples: Bootstrap samples.

    Raises:
        InputError: what `fit_power_law` refuses, runs that leave nothing to tell the noise, `at` not above zero.
    """
    return sample_laws(read_runs(compute, loss), asymptote, seed, samples).at(at)


class RefutedLaw(InputError):
    """A law that its own largest rung contradicts, so that nothing may be extrapolated from it."""


@dataclass(frozen=True)
class HeldOut:
    """A law fitted without the largest rung, and that rung.

    Attributes:
        law: The law fitted to the smaller rungs.
        compute: Compute of the largest rung.
        predicted: Loss that the law gives there.
        expected: The same value, with the interval of a mean over as many seeds as were run there.
        measured: Mean loss that was run there (of the logarithms).
        seeds: Runs of the largest rung.
    """

    law: PowerLaw
    compute: float
    predicted: Estimate
    expected: Estimate
    measured: float
    seeds: int

    @property
    def refuted(self) -> bool:
        """Whether the measured mean is outside the interval that law and seeds leave it."""
        return not self.expected.low <= self.measured <= self.expected.high

    def require(self) -> None:
        """Do nothing unless the law is refuted.

        Raises:
            RefutedLaw: the law is refuted; the message has the numbers and what to do.
        """
        if self.refuted:
            self._refuse()

    def _refuse(self) -> NoReturn:
        raise RefutedLaw(
            f"the law of the smaller rungs expects a loss of {self.expected} at {self.compute:.3g}, where "
            f"{self.measured:.4g} was measured (mean of {self.seeds}); so it must not be extrapolated. "
            "Fit the upper rungs only, or run a larger one"
        )


def held_out(
    compute: ArrayLike, loss: ArrayLike, *, asymptote: float | None = None, seed: int = 0, samples: int = 1000
) -> HeldOut:
    """Fit the law without the largest rung, and compare it with that rung.

    Args:
        compute: Compute of each run (n,), equal for the runs of one rung.
        loss: Loss of each run (n,).
        asymptote: Loss at infinite compute; None fits it.
        seed: Seed of the bootstrap.
        samples: Bootstrap samples.

    Raises:
        InputError: fewer than 4 rungs (3 with a pinned asymptote), and what `predict` refuses.
    """
    runs = read_runs(compute, loss)
    needed = 4 if asymptote is None else 3
    if len(runs.compute) < needed:
        kind = "free" if asymptote is None else "pinned"
        raise InputError(
            f"{len(runs.compute)} rungs; to hold one out of a fit with a {kind} asymptote, there must be {needed}"
        )
    x, y = np.asarray(compute, dtype=float), np.asarray(loss, dtype=float)
    top = float(runs.compute[-1])
    of_law = sample_laws(read_runs(x[x < top], y[x < top]), asymptote, seed, samples)
    seeds = int(runs.seeds[-1])
    scatter = of_law.noise.means([seeds], np.random.default_rng([seed, 1]))[:, 0]
    return HeldOut(
        law=of_law.law,
        compute=top,
        predicted=of_law.at(top),
        expected=Estimate.of(of_law.law(top), np.exp(of_law.log_loss(top) + scatter)),
        measured=math.exp(runs.means(runs.log_loss)[-1]),
        seeds=seeds,
    )
