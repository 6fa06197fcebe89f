"""Costs by hand, step times, and widths that make costs equal."""

import dataclasses

import pytest
import torch

from moesaic.errors import InputError
from moesaic.models import AttentionConfig, DecoderConfig, account, llama4_toy
from moesaic.models.comparison import (
    WIDTH_STEP,
    Candidate,
    count_costs,
    default_width,
    solve_width,
    time_steps,
    with_width,
)

DENSE = DecoderConfig(
    vocab_size=10,
    dim=4,
    num_layers=1,
    attention=AttentionConfig(num_heads=1),
    hidden_dim=8,
    interleave_moe_layer_step=0,
    nope_layer_interval=0,
)


def arm(model: DecoderConfig, seq_len: int = 3) -> Candidate:
    return Candidate(model, 2, seq_len, "adamw", lambda decoder: torch.optim.AdamW(decoder.parameters()))


def test_costs_by_hand() -> None:
    costs = count_costs(arm(DENSE))
    attention, ffn, embedding, norms = 4 * 4 * 4, 3 * 4 * 8, 10 * 4, 3 * 4
    assert costs.parameters == costs.active_parameters == attention + ffn + 2 * embedding + norms == 252
    # a query of 3 sees 2 keys on average; q k and p v are 2 multiply-adds per key and channel
    assert costs.forward_flops == 2 * (attention + ffn + embedding) + 2 * 2 * 4 * 2 == 432
    assert costs.training_flops == 3 * 432
    assert costs.weight_bytes == 4 * 252
    assert 2 * 4 * 252 <= costs.optimizer_bytes < 2 * 4 * 252 + 200  # two moments, and a counter per tensor
    assert costs.activation_bytes > 6 * 4 * 4


def test_custom_modules_are_counted_too() -> None:
    toy = llama4_toy(50)
    assert toy.moe is not None
    own = {"type": "custom_samples.LinearRouter"}
    owned = count_costs(arm(dataclasses.replace(toy, moe=dataclasses.replace(toy.moe, router=own)), 8))
    assert owned.weight_bytes == 4 * owned.parameters


def test_times_are_of_the_arms_in_order() -> None:
    small, large = time_steps([arm(DENSE), arm(dataclasses.replace(DENSE, dim=256, hidden_dim=4096), 64)], rounds=3)
    assert 0 < small < large


def test_the_width_is_that_of_the_experts_where_there_are_any() -> None:
    toy = llama4_toy(50)
    assert default_width(toy) == default_width(dataclasses.replace(toy, dense_twin=True)) == "model.moe.hidden_dim"
    assert default_width(DENSE) == "model.hidden_dim"
    changed = with_width(toy, "model.moe.hidden_dim", 72)
    assert changed.moe is not None
    assert (changed.moe.hidden_dim, changed.hidden_dim) == (72, toy.hidden_dim)
    assert with_width(toy, "model.hidden_dim", 72) == dataclasses.replace(toy, hidden_dim=72)
    with pytest.raises(InputError, match="nothing to solve, no layer of b has this width"):
        with_width(DENSE, "model.moe.hidden_dim", 8)
    with pytest.raises(InputError, match=r"width=model.dim: must be one of model.hidden_dim, model.moe.hidden_dim"):
        with_width(DENSE, "model.dim", 8)


@pytest.mark.parametrize("quantity", ["forward_flops", "parameters"])
@pytest.mark.parametrize("start", [8, 48, 1000])
def test_the_solved_width_is_the_nearest_step(quantity: str, start: int) -> None:
    toy = llama4_toy(50, interleave_moe_layer_step=1)
    target = getattr(account(dataclasses.replace(DENSE, vocab_size=50, dim=64, hidden_dim=900), 16), quantity)

    def measure(width: int) -> float:
        return float(getattr(account(with_width(toy, "model.moe.hidden_dim", width), 16), quantity))

    width, value = solve_width(measure, target, start=start, most=10_000)
    assert width % WIDTH_STEP == 0
    assert value == measure(width)
    assert abs(value - target) <= (measure(width + WIDTH_STEP) - value) / 2
    assert solve_width(measure, measure(40), start=start, most=10_000) == (40, measure(40))


def test_out_of_range() -> None:
    with pytest.raises(InputError, match=r"out of range: b has 8 even at width 8, the smallest .* a has 5"):
        solve_width(float, 5, start=64, most=1000)
    with pytest.raises(InputError, match=r"out of range: b has 800 even at width 800, the largest .* a has 5000"):
        solve_width(float, 5000, start=64, most=800)


def test_tolerance_saves_measurements() -> None:
    tried: list[int] = []

    def measure(width: int) -> float:
        tried.append(width)
        return float(width)

    assert solve_width(measure, 1000, start=64, most=8000, tolerance=0.1) == (1024, 1024.0)
    assert tried == [64, 128, 256, 512, 1024]
