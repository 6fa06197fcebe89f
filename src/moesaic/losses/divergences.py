"""Divergences of the student's distribution q from the teacher's p, per token.

Each is a function (student's log q (..., V), teacher's log p (..., V), coefficient) -> (...), at least 0, and 0 where q
equals p. An entry without mass in the first argument of a Kullback-Leibler term counts 0: log p may be -inf.
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "DIVERGENCES",
    "WITH_COEFFICIENT",
    "Divergence",
    "forward_kl",
    "jeffreys",
    "jsd",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
]

Divergence = Callable[[Tensor, Tensor, float], Tensor]


def forward_kl(student: Tensor, teacher: Tensor, coefficient: float = 0.5) -> Tensor:
    """KL(p || q): covers everything the teacher finds likely (Hinton et al. 2015, arXiv 1503.02531)."""
    return _kl(teacher, student)


def reverse_kl(student: Tensor, teacher: Tensor, coefficient: float = 0.5) -> Tensor:
    """KL(q || p): stays where the teacher has mass (MiniLLM, Gu et al. 2023, arXiv 2306.08543)."""
    return _kl(student, teacher)


def jeffreys(student: Tensor, teacher: Tensor, coefficient: float = 0.5) -> Tensor:
    """KL(p || q) + KL(q || p), the sum, not the mean."""
    return _kl(teacher, student) + _kl(student, teacher)


def jsd(student: Tensor, teacher: Tensor, coefficient: float = 0.5) -> Tensor:
    """b KL(p || m) + (1 - b) KL(q || m) with m = b p + (1 - b) q, at most the entropy of (b, 1 - b).

    As GKD has it (Agarwal et al. 2023, arXiv 2306.13649); b is the coefficient, 0 < b < 1. It tends to 0 at both ends,
    and divided by b to KL(p || q) as b tends to 0.
    """
    middle = _log_mix(teacher, student, coefficient)
    return coefficient * _kl(teacher, middle) + (1 - coefficient) * _kl(student, middle)


def skew_forward_kl(student: Tensor, teacher: Tensor, coefficient: float = 0.5) -> Tensor:
    """KL(p || c p + (1 - c) q), at most -log c (DistiLLM, Ko et al. 2024, arXiv 2402.03898); c is the coefficient."""
    return _kl(teacher, _log_mix(teacher, student, coefficient))


def skew_reverse_kl(student: Tensor, teacher: Tensor, coefficient: float = 0.5) -> Tensor:
    """KL(q || c q + (1 - c) p), at most -log c (DistiLLM); c is the coefficient."""
    return _kl(student, _log_mix(student, teacher, coefficient))


def total_variation(student: Tensor, teacher: Tensor, coefficient: float = 0.5) -> Tensor:
    """Half the sum of |p - q|, at most 1; its gradient is 0 where q equals p."""
    return (teacher.exp() - student.exp()).abs().sum(dim=-1) / 2


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jeffreys": jeffreys,
    "jsd": jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
}
WITH_COEFFICIENT = ("jsd", "skew_forward_kl", "skew_reverse_kl")
"""The names that look at the coefficient; they need 0 < coefficient < 1."""


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    a = log_a.exp()
    # masked before the product: 0 * (-inf) would be NaN, in the gradient too
    return (a * (log_a - log_b).masked_fill(a == 0, 0)).sum(dim=-1)


def _log_mix(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """log(share * a + (1 - share) * b); not by logaddexp, whose gradient is NaN where neither has mass."""
    mixed = share * log_a.exp() + (1 - share) * log_b.exp()
    return mixed.clamp(min=torch.finfo(mixed.dtype).tiny).log()
