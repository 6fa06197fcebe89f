import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding, apply_rotary_pos_emb

from moesaic.layers import Llama3RopeScaling, RotaryEmbedding, YarnRopeScaling

PUBLISHED = {"head_dim": 128, "theta": 500000.0}


@given(start=st.integers(0, 100000), theta=st.sampled_from([100.0, 10000.0, 500000.0]))
def test_equals_complex_multiplication_of_interleaved_pairs(start: int, theta: float) -> None:
    rotary = RotaryEmbedding(6, theta=theta)
    x = torch.randn(2, 3, 4, 6)
    positions = torch.arange(start, start + 3)
    y = rotary(x, positions)
    for t in range(3):
        for j in range(3):
            angle = torch.tensor(float(positions[t])) * torch.tensor(theta ** (-2 * j / 6), dtype=torch.float32)
            turn = complex(math.cos(angle), math.sin(angle))
            pair = torch.complex(x[:, t, :, 2 * j], x[:, t, :, 2 * j + 1]) * turn
            found = torch.complex(y[:, t, :, 2 * j], y[:, t, :, 2 * j + 1])
            # fp32 angles: two ways to round theta^(-2j/6) differ by about position * 1e-7
            torch.testing.assert_close(found, pair, rtol=0, atol=1e-5 + 3e-7 * start)


@given(start=st.integers(0, 10**6))
def test_norms_are_preserved(start: int) -> None:
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    y = RotaryEmbedding(8)(x, torch.arange(start, start + 5))
    pairs_before, pairs_after = (z.unflatten(-1, (-1, 2)).norm(dim=-1) for z in (x, y))
    torch.testing.assert_close(pairs_after, pairs_before, rtol=1e-6, atol=0)  # cos and sin are fp32


@given(shift=st.integers(1, 500), distance=st.integers(0, 20))
def test_products_depend_on_the_distance_only(shift: int, distance: int) -> None:
    rotary = RotaryEmbedding(8)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def product(query: int, key: int) -> float:
        return (rotary(q, torch.tensor([query])) * rotary(k, torch.tensor([key]))).sum().item()

    assert product(shift + distance, shift) == pytest.approx(product(distance, 0), abs=1e-3)


def test_distances_are_told_apart() -> None:
    rotary = RotaryEmbedding(8)
    x = torch.ones(1, 5, 1, 8)
    products = (rotary(x, torch.arange(5)) * x).sum(-1).flatten()
    assert products.diff().abs().min() > 0.1


def test_position_zero_is_the_identity() -> None:
    x = torch.randn(2, 1, 3, 8)
    assert torch.equal(RotaryEmbedding(8)(x, torch.zeros(1, dtype=torch.int64)), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept_and_the_rotation_is_at_least_fp32(dtype: torch.dtype) -> None:
    x = torch.randn(1, 4, 2, 8).to(dtype)
    positions = torch.arange(1000, 1004)
    y = RotaryEmbedding(8)(x, positions)
    assert y.dtype == dtype
    wide = RotaryEmbedding(8)(x.double(), positions)
    torch.testing.assert_close(y, wide.to(dtype), rtol=0, atol=1e-6)  # bf16: rounded once, at the end


def test_frequencies_cannot_be_spoiled_by_a_cast() -> None:
    rotary = RotaryEmbedding(**PUBLISHED)  # type: ignore[arg-type]
    expected = rotary.frequencies()
    rotary.to(torch.bfloat16)
    assert not [*rotary.parameters(), *rotary.buffers()]
    assert torch.equal(rotary.frequencies(), expected) and expected.dtype == torch.float32


def scaled(factor: float, low: float, high: float) -> torch.Tensor:
    """Frequency of each pair relative to the unscaled one, at the published sizes."""
    scaling = Llama3RopeScaling(factor, low, high, 8192)
    rotary, plain = RotaryEmbedding(**PUBLISHED, scaling=scaling), RotaryEmbedding(**PUBLISHED)  # type: ignore[arg-type]
    return rotary.frequencies() / plain.frequencies()


def test_scaling_without_a_band_as_in_scout() -> None:
    ratio = scaled(16.0, 1.0, 1.0)
    torch.testing.assert_close(ratio[:35], torch.ones(35))
    torch.testing.assert_close(ratio[35:], torch.full((29,), 1 / 16))


def test_scaling_with_a_band_as_in_llama_3() -> None:
    ratio = scaled(8.0, 1.0, 4.0)
    torch.testing.assert_close(ratio[:29], torch.ones(29))
    torch.testing.assert_close(ratio[35:], torch.full((29,), 1 / 8))
    assert (ratio[28:36].diff() < 0).all(), "six pairs between"
    for j in range(29, 35):
        turns = 8192 * 500000.0 ** (-2 * j / 128) / (2 * math.pi)
        t = (turns - 1) / 3
        assert ratio[j].item() == pytest.approx((1 - t) / 8 + t, rel=1e-4)


def test_factor_one_changes_nothing() -> None:
    torch.testing.assert_close(scaled(1.0, 1.0, 4.0), torch.ones(64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RotaryEmbedding(7), "head_dim=7: rotary embedding needs an even head_dim"),
        (lambda: RotaryEmbedding(8, theta=0.0), "theta=0.0: must be a number > 0"),
        (lambda: Llama3RopeScaling(0.5, 1.0, 4.0, 8192), "factor=0.5: must be a number >= 1"),
        (
            lambda: Llama3RopeScaling(8.0, 4.0, 1.0, 8192),
            "high_freq_factor=1.0: must not be below low_freq_factor=4.0",
        ),
        (lambda: Llama3RopeScaling(8.0, 1.0, 4.0, 0), "original_length=0: must be a number >= 1"),
    ],
)
def test_bad_arguments(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


YARN: dict[str, dict[str, Any]] = {
    "gpt-oss": {"factor": 32.0, "original_length": 4096, "truncate": False},
    "rounded": {"factor": 4.0, "original_length": 4096, "beta_fast": 20.0, "beta_slow": 2.0},
    "own amplitude": {"factor": 4.0, "original_length": 64, "attention_factor": 1.7},
    "no pair is kept": {"factor": 8.0, "original_length": 2},
    "one bound": {"factor": 8.0, "original_length": 64, "beta_fast": 3.0, "beta_slow": 3.0, "truncate": False},
    "no stretch": {"factor": 1.0, "original_length": 64},
}


DEFAULTS: dict[str, Any] = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}


@pytest.mark.parametrize("name", YARN)
@pytest.mark.parametrize("theta", [50.0, 150000.0])
def test_yarn_equals_transformers(name: str, theta: float) -> None:
    given, width = YARN[name], 16
    parameters = {key: value for key, value in given.items() if key != "original_length"}
    parameters |= {"original_max_position_embeddings": given["original_length"]}
    config = GptOssConfig(head_dim=width, rope_parameters={"rope_type": "yarn", "rope_theta": theta, **parameters})
    theirs, ours = (
        GptOssRotaryEmbedding(config),
        RotaryEmbedding(width, theta=theta, scaling=YarnRopeScaling(**DEFAULTS | given)),
    )
    torch.testing.assert_close(ours.frequencies(), theirs.inv_freq, rtol=3e-7, atol=0)
    x, positions = torch.randn(1, 9, 2, width), torch.arange(9)
    paired = x.unflatten(-1, (2, -1)).transpose(-2, -1).flatten(-2)  # halves -> neighbors
    angles = theirs(x, positions[None])
    expected, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), *angles)
    found = ours(paired, positions).unflatten(-1, (-1, 2)).transpose(-2, -1).flatten(-2)
    torch.testing.assert_close(found.transpose(1, 2), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": 0.5}, "factor=0.5: must be a number >= 1"),
        ({"beta_fast": 0.5}, "beta_fast=0.5: must not be below beta_slow=1.0"),
        ({"attention_factor": 0.0}, "attention_factor=0.0: must be a number > 0"),
        ({"original_length": 0}, "original_length=0: must be a number >= 1"),
    ],
)
def test_bad_yarn(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        YarnRopeScaling(**{**DEFAULTS, "factor": 2.0, "original_length": 64, **changes})
    with pytest.raises(ValueError, match="theta=1: must be a number > 1 with YaRN"):
        RotaryEmbedding(8, theta=1, scaling=YarnRopeScaling(2.0, 64, 32.0, 1.0, True))
