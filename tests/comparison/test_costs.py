"""Costs that are counted: known answers, parts that cost more than they say, what nobody counts, activations."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moesaic.comparison.compare import costs_table
from moesaic.comparison.costs import Candidate, measure_costs, time_steps
from moesaic.layers.work import Work
from moesaic.models import AttentionConfig, DecoderConfig, LayerConfig, MoEConfig, account, estimate_memory

TOKENS = 64

SMALL = DecoderConfig(
    vocab_size=50,
    dim=32,
    num_layers=2,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2),
    hidden_dim=64,
    moe=MoEConfig(num_experts=8, hidden_dim=32),
    interleave_moe_layer_step=2,
    nope_layer_interval=0,
)


def candidate(model: DecoderConfig = SMALL, batch_size: int = 2, **changes: Any) -> Candidate:
    made = Candidate(model, batch_size, TOKENS, "adamw", lambda decoder: torch.optim.AdamW(decoder.parameters()))
    return dataclasses.replace(made, **changes)


def with_router(name: str, **moe: Any) -> DecoderConfig:
    assert SMALL.moe is not None
    router = {"type": f"costly_parts.{name}"}
    return dataclasses.replace(SMALL, moe=dataclasses.replace(SMALL.moe, router=router, **moe))


def with_mixer(name: str) -> DecoderConfig:
    layers = (LayerConfig({"type": f"costly_parts.{name}"}, "dense"), LayerConfig("rope", "moe"))
    return dataclasses.replace(SMALL, pattern=layers, interleave_moe_layer_step=None, nope_layer_interval=None)


def test_our_parts_cost_what_they_say() -> None:
    costs, booked = measure_costs(candidate()), account(SMALL, TOKENS)
    assert costs.flops_source == "counted"
    assert costs.forward_flops == costs.booked_flops == booked.forward_flops
    assert (costs.parameters, costs.active_parameters) == (booked.parameters, booked.active_parameters)
    assert costs.notes == costs.unknown_operators == ()
    # the backward of attention makes its scores anew: 5 products in place of 4
    attention = booked.attention_flops
    assert costs.training_flops == pytest.approx(3 * booked.forward_flops + attention / 2, rel=1e-6)


@pytest.mark.slow_but_for("moe2")
@pytest.mark.parametrize("moe", [{"top_k": 3}, {"backend": "grouped"}, {"backend": "loop", "shared_hidden_dim": 0}])
def test_every_backend_is_counted(moe: dict[str, Any]) -> None:
    assert SMALL.moe is not None
    model = dataclasses.replace(SMALL, moe=dataclasses.replace(SMALL.moe, **moe))
    costs = measure_costs(candidate(model))
    assert costs.forward_flops == account(model, TOKENS).forward_flops
    assert costs.training_flops == pytest.approx(3 * costs.forward_flops, rel=0.05)


@pytest.mark.slow
def test_the_default_router_against_one_that_takes_every_expert() -> None:
    """The known answer: the seven more experts of each token, and nothing else."""
    one, all_of_them = measure_costs(candidate()), measure_costs(candidate(with_router("PaddedChoice")))
    of_one_expert = 2 * 3 * 32 * 32
    assert all_of_them.forward_flops - one.forward_flops == 7 * of_one_expert
    assert all_of_them.active_parameters - one.active_parameters == 7 * 3 * 32 * 32


@pytest.mark.slow
def test_expert_choice_costs_the_rows_that_the_experts_take() -> None:
    one, chosen = measure_costs(candidate()), measure_costs(candidate(with_router("ExpertChoice")))
    assert chosen.forward_flops - one.forward_flops == pytest.approx((8 / 2 - 1) * 2 * 3 * 32 * 32)
    assert chosen.active_parameters - one.active_parameters == 3 * 3 * 32 * 32


@pytest.mark.slow
def test_a_quadratic_mixer_costs_its_whole_product() -> None:
    attention, quadratic = measure_costs(candidate()), measure_costs(candidate(with_mixer("QuadraticMixer")))
    projections = 2 * (32 * 96 - 32 * (32 + 16 + 16 + 32))  # q, k and v of both, and the output of attention
    products = 2 * 2 * 32 * (TOKENS - (TOKENS + 1) / 2)  # of all tokens, and up to the diagonal
    assert quadratic.forward_flops - attention.forward_flops == pytest.approx(projections + products)


@pytest.mark.slow
def test_a_part_that_declares_too_little_is_named() -> None:
    costs = measure_costs(candidate(with_router("ModestRouter")))
    assert costs.forward_flops == measure_costs(candidate()).forward_flops
    [note] = [note for note in costs.notes if "ffn.router" in note]
    assert note == (
        "layers.1.ffn.router (ModestRouter) declares 0 FLOP per token, forward; 512 FLOP were counted, which is what "
        "is compared."
    )


@pytest.mark.slow_but_for("LeavesTorch-numpy")
@pytest.mark.parametrize(
    ("mixer", "operator"), [("Orthogonal", "aten::linalg_qr"), ("LeavesTorch", "numpy"), ("QuadraticMixer", None)]
)
def test_what_nobody_counts_is_named(mixer: str, operator: str | None) -> None:
    costs = measure_costs(candidate(with_mixer(mixer)))
    assert (operator in costs.unknown_operators) == bool(operator)
    assert any("are not counted" in note and str(operator) in note for note in costs.notes) == bool(operator)


@torch.library.custom_op("costs_test::product", mutates_args=())
def product(x: Tensor) -> Tensor:
    return x @ x.mT


def test_operators() -> None:
    x = torch.randn(2, 16, 32)

    def count(function: Any) -> tuple[int, tuple[str, ...]]:
        with Work() as work:
            function()
        return work.flops, work.unknown

    lstm = nn.LSTM(32, 24, batch_first=True)
    convolution = nn.Conv1d(32, 32, 3, groups=32, bias=False)
    assert count(lambda: lstm(x)) == (2 * 2 * 16 * 4 * 24 * (32 + 24), ())
    assert count(lambda: convolution(x.mT)) == (2 * 2 * 14 * 32 * 3, ())
    assert count(lambda: torch.fft.rfft(x, dim=1)) == (2 * 32 * 5 * 16 * 4 // 2, ())
    assert count(lambda: x[0].addmm_(x[0, :, :16], x[0, :16])) == (2 * 16 * 16 * 32, ())
    assert count(lambda: x[0] @ x[0, 0]) == (2 * 16 * 32, ())
    causal = functools.partial(nn.functional.scaled_dot_product_attention, x[None], x[None], x[None])
    assert count(causal) == (2 * 2 * 2 * 16 * 16 * 32, ())
    assert count(lambda: causal(is_causal=True)) == (2 * 2 * 2 * (16 * 17 // 2) * 32, ())
    assert count(lambda: torch.cdist(x, x)) == (0, ("aten::_cdist_forward",))
    assert count(lambda: product(x)) == (0, ("costs_test::product",))
    free = (nn.GroupNorm(2, 16), nn.BatchNorm1d(16), nn.GLU(), nn.AvgPool1d(2), nn.Dropout())
    assert count(lambda: [module(x) for module in free]) == (0, ())
    assert count(lambda: (x.cumprod(1), x.logsumexp(1), x.cummax(1), x.sort(), x.topk(2))) == (0, ())


@pytest.mark.slow
def test_activations_by_hand() -> None:
    """What two mixers keep besides their input, by how much they differ."""
    costs = [measure_costs(candidate(with_mixer(name))) for name in ("Orthogonal", "QuadraticMixer")]
    row = 2 * TOKENS * 4
    # q, k and v are views of one tensor; then the masked product
    quadratic = row * (3 * 32 + TOKENS)
    orthogonal = 2 * 32 * 32 * 4  # Q and R
    assert costs[1].activation_bytes - costs[0].activation_bytes == quadratic - orthogonal


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [False, True])
def test_activations_of_our_parts_are_those_of_the_formula(checkpoint: bool) -> None:
    costs = measure_costs(candidate(checkpoint_activations=checkpoint))
    expected = estimate_memory(
        SMALL, batch_size=2, seq_len=TOKENS, optimizer="adamw", checkpoint_activations=checkpoint
    )
    hidden = 2 * TOKENS * 32 * 4  # the formula includes what the loss sees
    assert costs.activation_bytes + hidden == pytest.approx(expected.activations, rel=0.02)
    assert costs.optimizer_bytes == expected.optimizer
    assert costs.weight_bytes == expected.weights


def test_a_model_that_is_too_large_is_counted_by_formula() -> None:
    model = dataclasses.replace(SMALL, dim=2048, hidden_dim=2**15, num_layers=16, vocab_size=2**17)
    costs = measure_costs(candidate(model, seq_len=2**15))
    assert costs.flops_source == "formula"
    assert costs.forward_flops == account(model, 2**15).forward_flops
    assert "too large" in costs.notes[0]


@pytest.mark.slow
def test_a_large_batch_is_counted_on_a_part_of_it() -> None:
    large = dataclasses.replace(SMALL, dim=128, hidden_dim=4096)
    costs = measure_costs(candidate(large, batch_size=64, seq_len=256))
    expected = estimate_memory(large, batch_size=64, seq_len=256, optimizer="adamw")
    hidden = 64 * 256 * 128 * 4
    assert costs.activation_bytes + hidden == pytest.approx(expected.activations, rel=0.02)
    assert costs.forward_flops == account(large, 256).forward_flops
    [note] = costs.notes
    assert "of 64 sequences of 256 tokens" in note


@pytest.mark.slow
def test_times_are_of_the_candidates_in_order() -> None:
    large = dataclasses.replace(SMALL, dim=256, hidden_dim=4096)
    small_seconds, large_seconds = time_steps([candidate(batch_size=1), candidate(large)], rounds=3)
    assert 0 < small_seconds < large_seconds


def test_measuring_draws_nothing_from_the_random_generator() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    measure_costs(candidate())
    assert torch.equal(torch.rand(1), expected)


def test_the_table_shows_the_ratio_of_each_arm_to_the_baseline_beside_which_it_was_timed() -> None:
    fairs = {
        "a": {"baseline": {"step_seconds": 0.1}, "after": {"step_seconds": 0.2}},
        "b": {"baseline": {"step_seconds": 0.4}, "after": {"step_seconds": 0.4}},
    }
    table = costs_table("baseline", fairs)
    assert [next(iter(column.cells)) for column in table.columns][1:] == ["100.0", "200.0", "2.000", "100.0", "1.000"]
