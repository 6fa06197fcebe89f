"""Sizes that make costs equal, and sentences about what stays unequal."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from moesaic.comparison.costs import Candidate, Costs, measure_costs
from moesaic.comparison.fairness import make_fair, solve_width, unequal, with_sizes
from moesaic.errors import InputError
from moesaic.models import AttentionConfig, DecoderConfig, LayerConfig, MoEConfig

SMALL = DecoderConfig(
    vocab_size=20,
    dim=32,
    num_layers=1,
    attention=AttentionConfig(num_heads=2),
    hidden_dim=64,
    moe=MoEConfig(num_experts=8, hidden_dim=192, shared_hidden_dim=0),
    interleave_moe_layer_step=1,
    nope_layer_interval=0,
)
WIDTH, EXPERTS = "model.moe.hidden_dim", "model.moe.num_experts"


def candidate(moe: Mapping[str, Any] | None = None, **changes: Any) -> Candidate:
    assert SMALL.moe is not None
    model = dataclasses.replace(SMALL, moe=dataclasses.replace(SMALL.moe, **(moe or {})), **changes)
    return Candidate(model, 2, 32, "adamw", lambda decoder: torch.optim.AdamW(decoder.parameters()))


def test_two_experts_per_token_are_half_as_wide() -> None:
    fair = make_fair(candidate(), candidate({"top_k": 2}), "active_flops", rounds=0)
    assert fair.overrides == {WIDTH: 96}
    assert fair.after.forward_flops == fair.baseline.forward_flops < fair.before.forward_flops
    assert fair.reason == (
        "Changes the width of each expert from 192 to 96, so that active FLOPs are equal (1.75 times the active FLOPs "
        "before)."
    )
    fewer = 1 - fair.after.parameters / fair.baseline.parameters
    assert fair.unequal[0] == f"{fewer:.0%} fewer parameters"


@pytest.mark.slow
def test_both_solves_the_number_of_experts_too() -> None:
    fair = make_fair(candidate(), candidate({"top_k": 2}), "both", rounds=0)
    assert fair.overrides == {WIDTH: 96, EXPERTS: 16}
    for quantity in ("forward_flops", "parameters"):  # the router of 16 is larger
        assert getattr(fair.after, quantity) == pytest.approx(getattr(fair.baseline, quantity), rel=0.011)
    assert "the number of experts from 8 to 16" in fair.reason


@pytest.mark.slow
def test_parameters() -> None:
    fair = make_fair(candidate(), candidate({"num_experts": 16}), "parameters", rounds=0)
    assert fair.overrides == {WIDTH: 96}
    assert fair.after.parameters == pytest.approx(fair.baseline.parameters, rel=0.01)
    assert any("active FLOPs" in each for each in fair.unequal)


def test_dense_layers_have_a_width_too() -> None:
    fair = make_fair(candidate(), candidate(interleave_moe_layer_step=0), "active_flops", rounds=0)
    assert fair.overrides == {"model.hidden_dim": 192}
    assert fair.after.forward_flops == pytest.approx(fair.baseline.forward_flops, rel=0.02), "but for the router"


def test_a_router_that_computes_more_is_made_narrower() -> None:
    """By what was counted: each of 8 experts takes half of the tokens, so each is a quarter as wide."""
    choice = candidate({"router": {"type": "costly_parts.ExpertChoice"}})
    fair = make_fair(candidate(), choice, "active_flops", rounds=0)
    assert fair.overrides == {WIDTH: 48}
    assert fair.after.forward_flops == pytest.approx(fair.baseline.forward_flops, rel=0.01)


def test_what_is_equal_already_stays() -> None:
    fair = make_fair(candidate(), candidate({"score_function": "softmax"}), "both", rounds=0)
    assert (fair.overrides, fair.unequal) == ({}, ())
    assert fair.reason.startswith("Equal already: ")
    assert fair.after == fair.before


@pytest.mark.slow
def test_a_size_that_the_user_set_stays() -> None:
    new = candidate({"top_k": 2, "hidden_dim": 160})
    fair = make_fair(candidate(), new, "active_flops", given={WIDTH}, rounds=0)
    assert (fair.overrides, fair.reason) == ({}, "You set model.moe.hidden_dim=160, so it stays.")
    assert any("active FLOPs" in each for each in fair.unequal)
    fair = make_fair(candidate(), new, "both", given={WIDTH, EXPERTS}, rounds=0)
    assert fair.reason == "You set model.moe.hidden_dim=160 and model.moe.num_experts=8, so they stay."
    fair = make_fair(candidate(), candidate({"top_k": 2}), "both", given={EXPERTS}, rounds=0)
    assert list(fair.overrides) == [WIDTH]
    assert fair.reason.endswith("You set model.moe.num_experts=8, so it stays.")


def test_none_solves_nothing() -> None:
    fair = make_fair(candidate(), candidate({"top_k": 2}), "none", rounds=0)
    assert fair.overrides == {}
    assert any("active FLOPs" in each for each in fair.unequal)


@pytest.mark.slow
def test_what_cannot_be_solved_is_no_error() -> None:
    deep = candidate(num_layers=6)
    fair = make_fair(candidate(), deep, "active_flops", rounds=0)
    assert fair.overrides == {}
    assert fair.reason.startswith("Out of reach: even with model.moe.hidden_dim=8 the new model has ")
    own = LayerConfig("rope", {"type": "costly_parts.Squared"})
    pattern: dict[str, Any] = {"pattern": (own,), "interleave_moe_layer_step": None, "nope_layer_interval": None}
    fair = make_fair(candidate(), candidate(**pattern), "active_flops", rounds=0)
    assert (fair.overrides, fair.reason) == ({}, "No layer of the new model has a width that could be solved.")


def test_experts_of_another_class_may_have_no_width() -> None:
    new = candidate({"experts": {"type": "costly_parts.Scaled"}})
    fair = make_fair(candidate(), new, "active_flops", rounds=0)
    assert fair.overrides == {}
    assert fair.reason == "The costs of the new model do not depend on the width of each expert."
    assert fair.baseline.forward_flops - fair.after.forward_flops == 2 * (3 * 32 * 192 - 32 * 32)
    assert fair.notes == ()


@pytest.mark.slow
def test_seconds() -> None:
    fair = make_fair(candidate(num_layers=2), candidate({"hidden_dim": 3072}, num_layers=2), "seconds", rounds=5)
    assert 8 <= fair.overrides[WIDTH] < 3072
    assert fair.after.step_seconds is not None
    assert fair.baseline.step_seconds is not None
    assert 0.3 < fair.after.step_seconds / fair.baseline.step_seconds < 3
    with pytest.raises(InputError, match="rounds=0: equal=seconds needs measured steps"):
        make_fair(candidate(), candidate(), "seconds", rounds=0)


def test_seconds_are_told_beside_the_rest() -> None:
    costs = measure_costs(candidate())

    def told(**changes: Any) -> tuple[str, ...]:
        baseline = dataclasses.replace(costs, step_seconds=1.0)
        return unequal(baseline, dataclasses.replace(baseline, **changes))

    assert told(step_seconds=1.31) == ("1.31 times the seconds per step",)
    assert told(step_seconds=1.04) == told(activation_bytes=round(costs.activation_bytes * 1.009)) == ()
    assert told(parameters=round(costs.parameters * 0.78)) == ("22% fewer parameters",)
    assert told(forward_flops=costs.forward_flops * 1.014) == ("1.4% more active FLOPs",)
    assert told(activation_bytes=round(costs.activation_bytes * 0.9)) == ("10% less activation memory",)
    assert told(active_parameters=costs.active_parameters // 4) == ("0.25 times the active parameters",)


def test_what_nobody_counts_is_said() -> None:
    pattern = (LayerConfig({"type": "costly_parts.Orthogonal"}, "moe"),)
    new = candidate({"top_k": 2}, pattern=pattern, interleave_moe_layer_step=None, nope_layer_interval=None)
    fair = make_fair(candidate(), new, "active_flops", rounds=0)
    assert fair.overrides
    assert fair.reason.endswith(
        "FLOPs of aten::linalg_qr, aten::linalg_solve_triangular are not counted, so active FLOPs are at least these."
    )


def test_sizes_are_set_by_key() -> None:
    changed = with_sizes(SMALL, {WIDTH: 8, EXPERTS: 4, "model.hidden_dim": 16})
    assert changed.moe is not None
    assert (changed.moe.hidden_dim, changed.moe.num_experts, changed.hidden_dim) == (8, 4, 16)
    assert with_sizes(SMALL, {}) == SMALL


def test_the_search_by_measurement() -> None:
    tried: list[int] = []

    def measure(width: int) -> float:
        tried.append(width)
        return float(width)

    assert solve_width(measure, 1000, start=64, most=8000, tolerance=0.1) == (1024, 1024.0)
    assert tried == [64, 128, 256, 512, 1024]
    assert solve_width(float, 500, start=64, most=8000) == (496, 496.0)
    with pytest.raises(InputError, match="8 even at width 8, the smallest that is tried, against 5"):
        solve_width(float, 5, start=64, most=1000)
    with pytest.raises(InputError, match="800 even at width 800, the largest that is tried, against 5000"):
        solve_width(float, 5000, start=64, most=800)


def test_costs_can_be_stored() -> None:
    """As JSON, and read again."""
    costs = measure_costs(candidate())
    stored = json.loads(json.dumps(dataclasses.asdict(costs)))
    assert Costs(**{**stored, "notes": tuple(stored["notes"]), "unknown_operators": ()}) == costs
