"""Scaling laws fitted to runs: loss against compute, against parameters and tokens, and against experts as well.

All fits minimize a Huber loss of log residuals, as arXiv 2203.15556 (section 3.3) does.
A deterministic grid gives the starts, and `scipy.optimize.least_squares` goes on from the best of them.
The residual is ln(predicted / measured), so that the unit of the loss changes only the asymptote and coefficients.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import least_squares

from moesaic.errors import InputError

__all__ = [
    "EXPONENTS",
    "SMALLEST_DELTA",
    "Floats",
    "JointLaw",
    "PowerLaw",
    "Runs",
    "SurfaceLaw",
    "fit_joint",
    "fit_power_law",
    "fit_runs",
    "fit_surface",
    "read_runs",
]

Floats = NDArray[np.float64]

SMALLEST_DELTA = 0.01
"""Least log residual (1% of the loss) from which the Huber loss grows linearly; the seeds' scatter raises it."""

EFFICIENT = 1.345
"""Huber's delta in standard deviations: 95% efficient under normal noise (Huber 1964, Ann. Math. Statist. 35)."""

EXPONENTS = (1e-4, 3.0)
"""Bounds of an exponent of compute. A fit at the lower one means that the loss does not fall."""

NEAR = 1 - 1e-9
"""Largest free asymptote as a part of the best loss."""


@dataclass(frozen=True)
class PowerLaw:
    """The law L(C) = asymptote + coefficient * C ** -exponent.

    The asymptote has the unit of the loss. The exponent has none.
    """

    asymptote: float
    coefficient: float
    exponent: float

    def __call__(self, compute: ArrayLike) -> Floats:
        """Return the loss at each compute."""
        return self.asymptote + self.coefficient * np.asarray(compute, dtype=float) ** -self.exponent

    def inverse(self, loss: ArrayLike) -> Floats:
        """Return the compute that gives each loss; inf where the loss is at or below the asymptote."""
        above = np.asarray(loss, dtype=float) - self.asymptote
        ratio = np.where(above > 0, above, np.nan) / self.coefficient
        return np.where(above > 0, ratio ** (-1 / self.exponent), np.inf)


@dataclass(frozen=True)
class SurfaceLaw:
    """The law L(N, D) = asymptote + a * N ** -alpha + b * D ** -beta.

    N counts active parameters, D counts tokens (arXiv 2203.15556, section 3.3).
    """

    asymptote: float
    a: float
    alpha: float
    b: float
    beta: float

    def __call__(self, parameters: ArrayLike, tokens: ArrayLike) -> Floats:
        """Return the loss at active parameters N and tokens D, which broadcast."""
        n, d = np.asarray(parameters, dtype=float), np.asarray(tokens, dtype=float)
        return self.asymptote + self.a * n**-self.alpha + self.b * d**-self.beta


@dataclass(frozen=True)
class JointLaw:
    """The law L = a E^delta N^(alpha + gamma ln E) + b E^omega D^(beta + zeta ln E) + asymptote.

    N counts active parameters, D tokens and E experts; a dense model has E = 1 (arXiv 2502.05172).
    Here alpha and beta are negative, as in the source.
    The source puts a transformed number for E, which saturates; give that number, or the plain one.
    """

    asymptote: float
    a: float
    delta: float
    alpha: float
    gamma: float
    b: float
    omega: float
    beta: float
    zeta: float

    def __call__(self, parameters: ArrayLike, tokens: ArrayLike, experts: ArrayLike) -> Floats:
        """Return the loss at active parameters N, tokens D and experts E, which broadcast."""
        n, d, e = (np.log(np.asarray(values, dtype=float)) for values in (parameters, tokens, experts))
        of_size = self.a * np.exp(self.delta * e + (self.alpha + self.gamma * e) * n)
        of_data = self.b * np.exp(self.omega * e + (self.beta + self.zeta * e) * d)
        return of_size + of_data + self.asymptote


@dataclass(frozen=True)
class Runs:
    """Runs of a ladder, sorted into rungs by equal compute.

    Attributes:
        compute: Compute of each of the R rungs (R,), rising.
        rung: Place in `compute` of each of the n runs (n,).
        log_loss: ln of each run's loss (n,).
        seeds: Runs of each rung (R,).
    """

    compute: Floats
    rung: NDArray[np.intp]
    log_loss: Floats
    seeds: Floats

    @property
    def best(self) -> float:
        """Lowest loss of all runs."""
        return math.exp(self.log_loss.min())

    @property
    def position(self) -> Floats:
        """Logarithm of the compute of each rung, around its mean (R,): well scaled for any unit of compute."""
        return np.log(self.compute) - np.log(self.compute).mean()

    def means(self, values: Floats) -> Floats:
        """Return the mean over the runs of each rung: (..., n) to (..., R)."""
        return self.sums(values) / self.seeds

    def sums(self, values: Floats) -> Floats:
        """Return the sum over the runs of each rung: (..., n) to (..., R)."""
        return values @ (self.rung[:, None] == np.arange(len(self.compute))).astype(float)

    def within(self) -> Floats:
        """Return the log losses less the mean of their rung (n,)."""
        return self.log_loss - self.means(self.log_loss)[self.rung]

    def delta(self) -> float:
        """Return the delta of the Huber loss: 1.345 times the seeds' robust scatter, at least `SMALLEST_DELTA`.

        The scatter is 1.4826 times the median absolute deviation from the rungs' means, freed of the degrees of
        freedom that the means take.
        """
        spare = len(self.rung) - len(self.compute)
        if not spare:
            return SMALLEST_DELTA
        scatter = 1.4826 * float(np.median(np.abs(self.within()))) * math.sqrt(len(self.rung) / spare)
        return max(SMALLEST_DELTA, EFFICIENT * scatter)


def read_runs(compute: ArrayLike, loss: ArrayLike, what: str = "compute") -> Runs:
    """Sort runs into rungs.

    Args:
        compute: Compute of each run (n,), or another measure of size: parameters, seconds. Equal within a rung.
        loss: Loss of each run (n,), above zero.
        what: Name of the measure for messages.

    Raises:
        InputError: lengths that differ, compute that is not above zero, a loss that is not finite or not above zero.
    """
    x, y = _columns({what: compute}, loss)
    rungs, place, seeds = np.unique(x[0], return_inverse=True, return_counts=True)
    return Runs(rungs, place, np.log(y), seeds.astype(float))


def fit_power_law(compute: ArrayLike, loss: ArrayLike, *, asymptote: float | None = None) -> PowerLaw:
    """Fit L(C) = asymptote + coefficient * C ** -exponent to runs.

    Args:
        compute: Compute of each run (n,), equal for the runs of one rung.
        loss: Loss of each run (n,).
        asymptote: Loss at infinite compute; None fits it within [0, best loss). Free asymptotes extrapolate badly.

    Raises:
        InputError: fewer than 3 rungs (2 with a pinned asymptote), an asymptote not below the best loss, a loss
            that does not fall with compute, and all that `read_runs` refuses.
    """
    return fit_runs(read_runs(compute, loss), asymptote)


def fit_runs(runs: Runs, asymptote: float | None) -> PowerLaw:
    """Fit a power law to `runs`; see `fit_power_law`."""
    needed = 3 if asymptote is None else 2
    if len(runs.compute) < needed:
        kind = "free" if asymptote is None else "pinned"
        raise InputError(
            f"{len(runs.compute)} rungs of different compute; a law with a {kind} asymptote must have {needed} or more"
        )
    _require_below(asymptote, runs.best)
    position, target, delta = runs.position[runs.rung], runs.log_loss, runs.delta()
    free = asymptote is None

    def split(p: Floats) -> tuple[float, Floats]:
        return (float(p[2]) if asymptote is None else asymptote), np.exp(p[0] - p[1] * position)

    def residuals(p: Floats) -> Floats:
        floor, above = split(p)
        return np.log(floor + above) - target

    def slopes(p: Floats) -> Floats:
        floor, above = split(p)
        columns = [above, -position * above] + [np.ones_like(above)] * free
        return np.stack(columns, axis=1) / (floor + above)[:, None]

    bounds = [(-np.inf, np.inf), EXPONENTS] + [(0.0, runs.best * NEAR)] * free
    p = _minimize(residuals, [_power_start(position, target, delta, asymptote)], bounds, delta, slopes)
    if p[1] <= EXPONENTS[0] * 1.01:
        raise InputError(
            f"the loss does not fall with compute (exponent {p[1]:.1g}); no law can be fitted. "
            "The rungs must be far enough apart for the loss to fall by more than its seeds scatter"
        )
    coefficient = math.exp(p[0] + p[1] * float(np.log(runs.compute).mean()))
    return PowerLaw(float(p[2]) if asymptote is None else asymptote, coefficient, float(p[1]))


def _power_start(position: Floats, target: Floats, delta: float, asymptote: float | None) -> Floats:
    """Return the best start of a grid over exponent and asymptote; the coefficient follows in closed form.

    The grid is so fine that one start is enough: the cost of two numbers is smooth.
    """
    loss = np.exp(target)
    parts = np.array([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995])
    floors = parts * loss.min() if asymptote is None else np.array([asymptote])
    exponents = np.geomspace(0.003, 2, 40)
    above = np.log(loss - floors[:, None])  # (A, n)
    level = (above[:, None] + exponents[:, None] * position).mean(-1)  # (A, B)
    curve = np.exp(level[..., None] - exponents[:, None] * position)  # (A, B, n)
    cost = _huber(np.log(floors[:, None, None] + curve) - target, delta).sum(-1)
    i, j = np.unravel_index(np.argmin(cost), cost.shape)
    return np.array([level[i, j], exponents[j]] + [floors[i]] * (asymptote is None))


def fit_surface(
    parameters: ArrayLike, tokens: ArrayLike, loss: ArrayLike, *, asymptote: float | None = None
) -> SurfaceLaw:
    """Fit L(N, D) = asymptote + a * N ** -alpha + b * D ** -beta to runs.

    For given exponents the rest is linear, so that the starts are a grid over the two exponents only.

    Args:
        parameters: Active parameters N of each run (n,).
        tokens: Tokens D of each run (n,).
        loss: Loss of each run (n,).
        asymptote: Loss at infinite size and data; None fits it within [0, best loss).

    Raises:
        InputError: fewer than 5 different pairs (N, D) (4 with a pinned asymptote), fewer than 3 different N or D
            (2), an asymptote not below the best loss, and all that `read_runs` refuses.
    """
    (n, d), y = _columns({"parameters": parameters, "tokens": tokens}, loss)
    free = asymptote is None
    _require_below(asymptote, y.min())
    _require_spread({"parameters": n, "tokens": d}, 2 + free, 4 + free)
    (u, n0), (v, d0), target = _centered(n), _centered(d), np.log(y)

    def split(p: Floats) -> tuple[float, Floats, Floats]:
        return (float(p[4]) if asymptote is None else asymptote), np.exp(p[0] - p[1] * u), np.exp(p[2] - p[3] * v)

    def residuals(p: Floats) -> Floats:
        floor, of_size, of_data = split(p)
        return np.log(floor + of_size + of_data) - target

    def slopes(p: Floats) -> Floats:
        floor, of_size, of_data = split(p)
        columns = [of_size, -u * of_size, of_data, -v * of_data] + [np.ones_like(u)] * free
        return np.stack(columns, axis=1) / (floor + of_size + of_data)[:, None]

    starts = []
    for alpha in STEPS:
        for beta in STEPS:
            a, b, floor = _linear_part(np.exp(-alpha * u), np.exp(-beta * v), y, asymptote)
            starts.append(np.array([math.log(a), alpha, math.log(b), beta] + [floor] * free))
    starts = sorted(starts, key=lambda p: float(_huber(residuals(p), SMALLEST_DELTA).sum()))[:4]
    span = (-np.inf, np.inf)
    bounds = [span, EXPONENTS, span, EXPONENTS] + [(0.0, y.min() * NEAR)] * free
    p = _minimize(residuals, starts, bounds, SMALLEST_DELTA, slopes)
    a, b = math.exp(p[0] + p[1] * n0), math.exp(p[2] + p[3] * d0)
    return SurfaceLaw(float(p[4]) if asymptote is None else asymptote, a, float(p[1]), b, float(p[3]))


STEPS = np.geomspace(0.02, 1.5, 14)
"""Exponents of the starts of `fit_surface` and `fit_joint`."""


def _linear_part(of_size: Floats, of_data: Floats, loss: Floats, asymptote: float | None) -> tuple[float, float, float]:
    """Return a, b and asymptote of the least relative error; what least squares puts below its bound is put inside."""
    fixed = 0.0 if asymptote is None else asymptote
    columns = np.stack([of_size, of_data] + [np.ones_like(loss)] * (asymptote is None), axis=1) / loss[:, None]
    found = np.linalg.lstsq(columns, 1 - fixed / loss, rcond=None)[0]
    least = 1e-3 * (loss.min() - fixed)
    floor = min(max(found[2], 0.0), 0.99 * loss.min()) if asymptote is None else asymptote
    return max(found[0], least), max(found[1], least), floor


def fit_joint(parameters: ArrayLike, tokens: ArrayLike, experts: ArrayLike, loss: ArrayLike) -> JointLaw:
    """Fit the nine numbers of `JointLaw` to runs.

    A surface fitted to all runs, and a grid of slopes in ln E around it, give the starts.
    The source fitted 280 runs; a grid of about 60 (3 to 4 values of each measure) is the least that is useful.

    Args:
        parameters: Active parameters N of each run (n,).
        tokens: Tokens D of each run (n,).
        experts: Experts E of each run (n,), 1 for a dense model; or the source's transformed number.
        loss: Loss of each run (n,).

    Raises:
        InputError: fewer than 9 different triples (N, D, E), fewer than 3 different N or D or 2 different E, and
            all that `read_runs` refuses.
    """
    (n, d, e), y = _columns({"parameters": parameters, "tokens": tokens, "experts": experts}, loss)
    _require_spread({"experts": e}, 2, 0)
    _require_spread({"parameters": n, "tokens": d, "experts": e}, 0, 9)
    surface = fit_surface(n, d, y)
    (u, n0), (v, d0), w, target = _centered(n), _centered(d), np.log(e), np.log(y)

    def split(p: Floats) -> tuple[Floats, Floats]:
        return np.exp(p[0] + p[1] * w + (p[2] + p[3] * w) * u), np.exp(p[4] + p[5] * w + (p[6] + p[7] * w) * v)

    def residuals(p: Floats) -> Floats:
        of_size, of_data = split(p)
        return np.log(of_size + of_data + p[8]) - target

    def slopes(p: Floats) -> Floats:
        of_size, of_data = split(p)
        ones = np.ones_like(w)
        columns = [of_size * c for c in (ones, w, u, u * w)] + [of_data * c for c in (ones, w, v, v * w)] + [ones]
        return np.stack(columns, axis=1) / (of_size + of_data + p[8])[:, None]

    a, b = math.log(surface.a) - surface.alpha * n0, math.log(surface.b) - surface.beta * d0
    starts = [
        np.array([a, size, -surface.alpha, 0, b, data, -surface.beta, 0, floor])
        for size in (-0.3, -0.1, 0.1)
        for data in (-0.3, -0.1, 0.1)
        for floor in (surface.asymptote, 0.5 * y.min())
    ]
    bounds = [(-np.inf, np.inf)] * 8 + [(0.0, y.min() * NEAR)]
    p = _minimize(residuals, starts, bounds, SMALLEST_DELTA, slopes)
    return JointLaw(
        asymptote=float(p[8]),
        a=math.exp(p[0] - p[2] * n0),
        delta=float(p[1] - p[3] * n0),
        alpha=float(p[2]),
        gamma=float(p[3]),
        b=math.exp(p[4] - p[6] * d0),
        omega=float(p[5] - p[7] * d0),
        beta=float(p[6]),
        zeta=float(p[7]),
    )


def _minimize(
    residuals: Callable[[Floats], Floats],
    starts: list[Floats],
    bounds: Sequence[tuple[float, float]],
    delta: float,
    slopes: Callable[[Floats], Floats],
) -> Floats:
    """Return the parameters of the least Huber loss that the optimizer reaches from any start."""
    low, high = np.array(bounds, dtype=float).T
    with np.errstate(over="ignore", invalid="ignore"):  # a step too long: the optimizer takes a shorter one
        found = [
            least_squares(
                residuals,
                np.clip(start, low, high),
                jac=slopes,
                bounds=(low, high),
                x_scale="jac",
                loss="huber",
                f_scale=delta,
                ftol=1e-11,
                xtol=1e-11,
                gtol=1e-11,
                max_nfev=500,
            )
            for start in starts
        ]
    best: Floats = min(found, key=lambda result: float(result.cost)).x
    return best


def _huber(residual: Floats, delta: float) -> Floats:
    size = np.abs(residual)
    return np.where(size <= delta, size**2 / 2, delta * (size - delta / 2))


def _centered(values: Floats) -> tuple[Floats, float]:
    """Return the logarithms less their mean, and that mean."""
    logs = np.log(values)
    return logs - logs.mean(), float(logs.mean())


def _columns(measures: dict[str, ArrayLike], loss: ArrayLike) -> tuple[list[Floats], Floats]:
    """Return the measures and the loss as arrays (n,), all checked."""
    arrays = {name: np.asarray(values, dtype=float) for name, values in {**measures, "loss": loss}.items()}
    shapes = {name: values.shape for name, values in arrays.items()}
    if any(values.ndim != 1 for values in arrays.values()) or len(set(shapes.values())) > 1:
        raise InputError(f"shapes {shapes}; all must be one row of equal length, one number for each run")
    for name, values in arrays.items():
        for place, value in enumerate(values):
            if math.isfinite(value) and value > 0:
                continue
            where = ", ".join(f"{other} {arrays[other][place]:.4g}" for other in measures if other != name)
            diverged = ": the run diverged" if name == "loss" and not math.isfinite(value) else ""
            at = f" (at {where})" if where else ""
            raise InputError(f"{name} of run {place} is {value}{at}{diverged}; must be finite and above 0")
    return [arrays[name] for name in measures], arrays["loss"]


def _require_below(asymptote: float | None, best: float) -> None:
    """Refuse a pinned asymptote that the runs contradict."""
    if asymptote is not None and not 0 <= asymptote < best * (1 - 1e-12):
        raise InputError(f"an asymptote of {asymptote}; must be at least 0 and below the best loss, {best:.6g}")


def _require_spread(measures: dict[str, Floats], each: int, together: int) -> None:
    """Refuse runs with too few different values of a measure, or of all measures together."""
    for name, values in measures.items():
        if len(np.unique(values)) < each:
            raise InputError(f"{len(np.unique(values))} different values of {name}; must be {each} or more")
    points = len(np.unique(np.stack(list(measures.values()), axis=1), axis=0))
    if points < together:
        raise InputError(f"{points} different points ({', '.join(measures)}); must be {together} or more")
