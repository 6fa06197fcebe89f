"""Means over runs or samples, their standard errors, and 95% intervals by Student's t."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

from torch import Tensor

__all__ = ["Interval", "half_width", "interval", "mean_and_error", "student_t"]

STUDENT_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""97.5% quantiles for 1 to 30 degrees of freedom; beyond that the normal 1.96 is near enough."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over n values and its 95% interval (Student t, two-sided); low and high are nan for n < 2."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        if self.n < 2:
            return f"{self.mean:.4f} (n=1)" if self.n else "-"
        return f"{self.mean:.4f} ± {self.high - self.mean:.4f}"


def student_t(n: int) -> float:
    """Return the 97.5% quantile of Student's t for n >= 2 values."""
    return STUDENT_T[n - 2] if n <= len(STUDENT_T) + 1 else 1.96


def half_width(values: Sequence[float]) -> float:
    """Return t(0.975, n - 1) * s / sqrt(n), s the sample's standard deviation; nan for n < 2."""
    n = len(values)
    return math.nan if n < 2 else student_t(n) * statistics.stdev(values) / math.sqrt(n)


def interval(values: Sequence[float]) -> Interval:
    """Return the mean ± `half_width`; the mean of no values is nan."""
    mean, half = statistics.fmean(values) if values else math.nan, half_width(values)
    return Interval(mean, mean - half, mean + half, len(values))


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return the mean of values (S,) and its standard error, nan for fewer than two."""
    error = values.double().std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return values.double().mean().item(), error
