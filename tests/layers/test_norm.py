import pytest
import torch

from moesaic.layers import CenteredRMSNorm, RMSNorm


def test_by_hand() -> None:
    norm = RMSNorm(2, eps=0.0)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 10.0]))  # type: ignore[union-attr]
    y = norm(torch.tensor([[3.0, 4.0]]))  # mean square 12.5
    torch.testing.assert_close(y, torch.tensor([[3.0, 40.0]]) / 12.5**0.5)


@pytest.mark.parametrize("gain", [True, False])
def test_gain_is_one_at_first_and_optional(gain: bool) -> None:
    norm = RMSNorm(6, gain=gain)
    x = torch.randn(3, 4, 6)
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    assert [name for name, _ in norm.named_parameters()] == (["weight"] if gain else [])


def test_eps_is_added_to_the_mean_square() -> None:
    x = torch.full((1, 4), 1e-3)
    torch.testing.assert_close(RMSNorm(4, eps=1e-6)(x), torch.full((1, 4), 0.5**0.5))
    assert not RMSNorm(4)(torch.zeros(1, 4)).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_are_fp32(dtype: torch.dtype) -> None:
    x = torch.full((1, 64), 1000.0, dtype=dtype)  # squares overflow fp16
    torch.testing.assert_close(RMSNorm(64, gain=False)(x), torch.ones(1, 64, dtype=dtype))


def test_cast_comes_before_the_gain() -> None:
    norm = RMSNorm(256, dtype=torch.bfloat16)
    with torch.no_grad():
        norm.weight.normal_()  # type: ignore[union-attr]
    x = torch.randn(4, 256, dtype=torch.bfloat16)
    wide = x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert norm.weight is not None
    expected, wrong = wide.bfloat16() * norm.weight, (wide * norm.weight.float()).bfloat16()
    assert not torch.equal(expected, wrong), "this input cannot tell the two orders apart"
    assert torch.equal(norm(x), expected)


def test_float64_stays_float64() -> None:
    norm = RMSNorm(5, dtype=torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt(), rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(norm, (x,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_centered_gain_is_a_gain_less_one(dtype: torch.dtype) -> None:
    norm = CenteredRMSNorm(32, dtype=dtype)
    assert not norm.weight.any()
    with torch.no_grad():
        norm.weight.normal_(std=0.1)
    x = torch.randn(5, 32, dtype=dtype)
    wide = x.double()
    expected = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * (1 + norm.weight.double())
    found = norm(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype))  # in bf16 too: it is rounded once


def test_a_centered_norm_refuses_another_width() -> None:
    with pytest.raises(ValueError, match="CenteredRMSNorm"):
        CenteredRMSNorm(4)(torch.randn(2, 5))
