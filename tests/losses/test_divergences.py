"""Divergences: values by an oracle, bounds, limits, and gradients."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import codistillation as reference
from torch import Tensor

from moesaic.losses import DIVERGENCES
from moesaic.losses.divergences import WITH_COEFFICIENT, forward_kl, jsd

TOKENS, VOCAB = 5, 7
names = pytest.mark.parametrize("name", DIVERGENCES)


def logits(scale: float = 2.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(TOKENS, VOCAB, dtype=torch.float64, generator=generator)


def apply(name: str, student: Tensor, teacher: Tensor, coefficient: float = 0.3) -> Tensor:
    return DIVERGENCES[name](student.log_softmax(-1), teacher.log_softmax(-1), coefficient)


def test_the_names() -> None:
    assert set(WITH_COEFFICIENT) < set(DIVERGENCES)
    assert set(DIVERGENCES) == {
        "forward_kl",
        "reverse_kl",
        "jeffreys",
        "jsd",
        "skew_forward_kl",
        "skew_reverse_kl",
        "total_variation",
    }


@names
def test_equals_the_oracle(name: str) -> None:
    student, teacher = logits(seed=1), logits(seed=2)
    expected = [
        reference.divergence(name, reference.softmax(t), reference.softmax(z), 0.3)
        for z, t in zip(student, teacher, strict=True)
    ]
    torch.testing.assert_close(apply(name, student, teacher), torch.stack(expected), rtol=0, atol=1e-14)


@names
@given(seed=st.integers(0, 99), scale=st.sampled_from([0.01, 1.0, 30.0]), coefficient=st.floats(0.01, 0.99))
def test_never_negative(name: str, seed: int, scale: float, coefficient: float) -> None:
    assert (apply(name, logits(scale, seed), logits(scale, seed + 100), coefficient) >= -1e-14).all()


@names
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_zero_with_zero_gradient_where_both_are_equal(name: str, scale: float) -> None:
    student = logits(scale).requires_grad_()
    value = apply(name, student, student.detach())
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.abs().max() < 1e-13 and gradient.abs().max() < 1e-13


@names
def test_gradient_by_differences(name: str) -> None:
    teacher = logits(seed=1)
    assert torch.autograd.gradcheck(lambda z: apply(name, z, teacher), logits(seed=2).requires_grad_())


@names
def test_differs_from_the_others(name: str) -> None:
    """Else a wrong name in the table would pass where both sides are equal."""
    student, teacher = logits(seed=1), logits(seed=2)
    value = apply(name, student, teacher)
    for other in set(DIVERGENCES) - {name}:
        assert (apply(other, student, teacher) - value).abs().max() > 1e-3


@given(seed=st.integers(0, 99), c=st.floats(0.01, 0.99))
def test_bounds(seed: int, c: float) -> None:
    student, teacher = logits(30.0, seed), logits(30.0, seed + 100)
    entropy = -c * math.log(c) - (1 - c) * math.log1p(-c)
    assert (apply("jsd", student, teacher, c) <= entropy + 1e-12).all()
    for name in ("skew_forward_kl", "skew_reverse_kl"):
        assert (apply(name, student, teacher, c) <= -math.log(c) + 1e-12).all()
    assert (apply("total_variation", student, teacher) <= 1 + 1e-12).all()


def test_the_bounds_are_reached() -> None:
    apart = 60 * torch.eye(2, dtype=torch.float64)
    assert apply("jsd", apart, apart.flip(0), 0.5)[0].item() == pytest.approx(math.log(2))
    assert apply("skew_forward_kl", apart, apart.flip(0), 0.1)[0].item() == pytest.approx(math.log(10))
    assert apply("total_variation", apart, apart.flip(0))[0].item() == pytest.approx(1)


def test_jsd_over_b_tends_to_forward_kl() -> None:
    """And jsd itself to 0: no jump to the whole KL at the end."""
    student, teacher = logits(seed=1).log_softmax(-1), logits(seed=2).log_softmax(-1)
    torch.testing.assert_close(jsd(student, teacher, 1e-6) / 1e-6, forward_kl(student, teacher), rtol=1e-4, atol=0)


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_mass_anywhere_and_extreme_logits(name: str, dtype: torch.dtype) -> None:
    """A padded column of the vocabulary is -inf for both; a sure teacher leaves everything else without mass."""
    student, teacher = logits(seed=1).to(dtype), logits(seed=2).to(dtype)
    plain = apply(name, student, teacher)
    padding = torch.full((TOKENS, 2), -torch.inf, dtype=dtype)
    z = torch.cat([student, padding], dim=1).requires_grad_()
    padded = apply(name, z, torch.cat([teacher, padding], dim=1))
    torch.testing.assert_close(padded, plain)
    (gradient,) = torch.autograd.grad(padded.sum(), z)
    assert gradient[:, :-2].isfinite().all()
    for scale in (1e3, 1e4):
        z = (student * scale).requires_grad_()
        value = apply(name, z, -teacher * scale)
        (gradient,) = torch.autograd.grad(value.sum(), z)
        assert value.dtype == dtype and value.isfinite().all() and gradient.isfinite().all()
