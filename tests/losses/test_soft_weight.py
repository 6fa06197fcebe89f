"""The policy that weights soft targets: schedules, control by the loss gap, gates, state."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moesaic.config import from_mapping, to_mapping
from moesaic.errors import InputError
from moesaic.losses import SoftWeight, SoftWeightConfig, TokenStatistics

SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {"value": 0.7},
    "linear": {"start": 0.2, "end": 0.8},
    "cosine": {"start": 0.9, "end": 0.5},
    "wsd": {"value": 0.8, "warmup_fraction": 0.25, "decay_fraction": 0.5},
    "piecewise": {"points": ((0.25, 0.2), (0.5, 1.0), (0.75, 0.0))},
}


def weight(progress: float, **fields: Any) -> float:
    return float(SoftWeight(SoftWeightConfig(**fields)).weight(progress))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", (0.7, 0.7, 0.7, 0.7, 0.7)),
        ("linear", (0.2, 0.35, 0.5, 0.65, 0.8)),
        ("cosine", (0.9, 0.7 + 0.2 * math.sqrt(0.5), 0.7, 0.7 - 0.2 * math.sqrt(0.5), 0.5)),
        ("wsd", (0.0, 0.8, 0.8, 0.4, 0.0)),
        ("piecewise", (0.2, 0.2, 1.0, 0.0, 0.0)),
    ],
)
def test_schedules_by_hand(schedule: str, expected: tuple[float, ...]) -> None:
    found = [weight(x, schedule=schedule, **SCHEDULES[schedule]) for x in (0, 0.25, 0.5, 0.75, 1)]
    assert found == pytest.approx(expected, abs=1e-12)


def test_between_the_points() -> None:
    assert weight(0.375, schedule="piecewise", **SCHEDULES["piecewise"]) == pytest.approx(0.6)
    assert weight(0.125, schedule="wsd", **SCHEDULES["wsd"]) == pytest.approx(0.4)


def test_wsd_without_ramps_is_constant() -> None:
    for progress in (0.0, 0.5, 1.0):
        assert weight(progress, schedule="wsd", value=0.8, warmup_fraction=0.0, decay_fraction=0.0) == 0.8


@given(
    schedule=st.sampled_from(sorted(SCHEDULES)),
    numbers=st.lists(st.floats(0, 1), min_size=3, max_size=3),
    ramps=st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)),
    bounds=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    progress=st.floats(0, 1),
    gap=st.none() | st.floats(0.01, 2),
    losses=st.tuples(st.floats(0, 10), st.floats(0, 10)),
)
def test_in_range(
    schedule: str,
    numbers: list[float],
    ramps: tuple[float, float],
    bounds: list[float],
    progress: float,
    gap: float | None,
    losses: tuple[float, float],
) -> None:
    value, start, end = numbers
    policy = SoftWeight(
        SoftWeightConfig(
            schedule=schedule,  # type: ignore[arg-type]
            value=value,
            start=start,
            end=end,
            warmup_fraction=ramps[0],
            decay_fraction=ramps[1],
            points=((0.1, start), (0.9, end)),
            gap=gap,
            minimum=bounds[0],
            maximum=bounds[1],
        )
    )
    policy.update(*losses)
    assert bounds[0] - 1e-6 <= float(policy.weight(progress)) <= bounds[1] + 1e-6


@pytest.mark.parametrize("progress", [-0.01, 1.01, math.nan, "0.5", None])
def test_progress_outside_the_run_is_refused(progress: float) -> None:
    with pytest.raises((TypeError, ValueError), match="progress="):
        weight(progress)


# ---- the gap


def test_gap_by_hand() -> None:
    """Running means of 2.0 and 2.4, then 1.0 and 1.2, at ema .5: weights 1/3 and 2/3 with Adam's correction."""
    policy = SoftWeight(SoftWeightConfig(value=0.8, gap=0.5, gap_relative=False, ema=0.5))
    assert float(policy.weight(0.5)) == 0 and policy.loss_gap() == 0
    policy.update(torch.tensor(2.4), torch.tensor(2.0))
    assert float(policy.loss_gap()) == pytest.approx(0.4)
    assert float(policy.weight(0.5)) == pytest.approx(0.8 * 0.4 / 0.5)
    policy.update(1.2, 1.0)
    gap = (2.4 + 2 * 1.2) / 3 - (2.0 + 2 * 1.0) / 3
    assert float(policy.loss_gap()) == pytest.approx(gap)
    assert float(policy.weight(0.5)) == pytest.approx(0.8 * gap / 0.5)


def test_relative_gap_by_hand() -> None:
    policy = SoftWeight(SoftWeightConfig(value=0.8, gap=0.1))
    policy.update(2.1, 2.0)  # half of .1 * 2.0
    assert float(policy.weight(0.5)) == pytest.approx(0.4, rel=1e-5)


@pytest.mark.parametrize("relative", [True, False])
def test_a_better_teacher_counts_in_full_and_a_worse_one_not_at_all(relative: bool) -> None:
    for student, teacher, expected in ((3.0, 2.0, 0.9), (2.0, 2.0, 0.0), (2.0, 3.0, 0.0)):
        policy = SoftWeight(SoftWeightConfig(value=0.9, gap=0.1, gap_relative=relative))
        policy.update(student, teacher)
        assert float(policy.weight(0.5)) == pytest.approx(expected)


def test_without_gap_updates_change_nothing() -> None:
    policy = SoftWeight(SoftWeightConfig(value=0.9))
    policy.update(2.0, 3.0)
    assert policy.weight(0.5) == 0.9


def test_the_weight_has_no_graph() -> None:
    policy = SoftWeight(SoftWeightConfig(gap=0.1))
    policy.update(torch.tensor(2.1, requires_grad=True), torch.tensor(2.0, requires_grad=True))
    found = policy.weight(0.5)
    assert isinstance(found, Tensor) and not found.requires_grad and found.dim() == 0


def test_the_state_round_trips() -> None:
    config = SoftWeightConfig(value=0.8, gap=0.5, gap_relative=False)
    first, second = SoftWeight(config), SoftWeight(config)
    first.update(2.1, 2.0)
    first.update(1.9, 1.7)
    second.load_state_dict(first.state_dict())
    for policy in (first, second):
        policy.update(1.5, 1.2)
    assert first.weight(0.5) == second.weight(0.5) != 0
    assert not list(first.parameters())


def test_the_running_means_stay_fp32() -> None:
    """A step of 1 % of 1 % would be lost in bf16."""
    policy = SoftWeight(SoftWeightConfig(gap=0.1))
    policy.update(2.123456, 2.0)
    before = policy.loss_gap()
    policy.to(torch.bfloat16)
    assert policy.student_loss.dtype == torch.float32
    assert policy.loss_gap() == before


# ---- gates


def statistics() -> TokenStatistics:
    return TokenStatistics(
        student_entropy=torch.tensor([0.0, math.log(8), math.log(64)]),
        teacher_entropy=torch.tensor([0.1, 0.5, 2.0]),
        student_log_prob=torch.tensor([0.5, 0.5, 0.1]).log(),
        teacher_log_prob=torch.tensor([0.5, 0.25, 0.4]).log(),
        vocab_size=64,
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"gate": "entropy", "gate_threshold": 0.5}, [0.0, 1.0, 1.0]),
        ({"gate": "confidence", "gate_power": 2.0}, [0.25, 0.0625, 0.16]),
        (  # sigmoid(2 log r + log 3) = 3 r^2 / (1 + 3 r^2), r the ratio of the probabilities
            {"gate": "agreement", "gate_slope": 2.0, "gate_offset": math.log(3)},
            [3 / 4, 0.75 / 1.75, 48 / 49],
        ),
        ({"gate": "student_uncertainty"}, [0.0, 0.5, 1.0]),
    ],
)
def test_gates_by_hand(fields: dict[str, Any], expected: list[float]) -> None:
    gate = SoftWeight(SoftWeightConfig(**fields)).gate
    assert gate is not None
    torch.testing.assert_close(gate(statistics()), torch.tensor(expected))


def test_no_gate() -> None:
    assert SoftWeight(SoftWeightConfig()).gate is None


# ---- the config


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("schedule", {"schedule": "exponential"}),
        ("gate", {"gate": "magic"}),
        ("value", {"value": 1.1}),
        ("value", {"value": math.nan}),
        ("value", {"value": "0.5"}),
        ("gap", {"gap": True}),
        ("gate_slope", {"gate_slope": None}),
        ("points", {"points": (("0", 1),)}),
        ("points", {"points": 3}),
        ("gate", {"gate": 3}),
        ("start", {"start": -0.1}),
        ("end", {"end": 2.0}),
        ("warmup_fraction", {"warmup_fraction": -0.1}),
        ("decay_fraction", {"decay_fraction": 1.5}),
        ("decay_fraction", {"warmup_fraction": 0.6, "decay_fraction": 0.6}),
        ("points", {"schedule": "piecewise"}),
        ("points", {"points": ((0.5, 0.1), (0.5, 0.2))}),
        ("points", {"points": ((0.5, 1.1),)}),
        ("points", {"points": ((0.5, 0.1, 0.2),)}),
        ("gap", {"gap": 0.0}),
        ("gap", {"gap": math.inf}),
        ("ema", {"ema": 1.0}),
        ("gate_threshold", {"gate_threshold": -1.0}),
        ("gate_power", {"gate_power": 0.0}),
        ("gate_slope", {"gate_slope": math.inf}),
        ("gate_offset", {"gate_offset": math.nan}),
        ("minimum", {"minimum": -0.1}),
        ("maximum", {"minimum": 0.5, "maximum": 0.4}),
    ],
)
def test_an_impossible_value_is_named(name: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{name}=.*: must be"):
        SoftWeightConfig(**fields)


def test_from_a_mapping() -> None:
    config = SoftWeightConfig(schedule="piecewise", points=((0.0, 0.5), (1.0, 0.9)), gap=0.1)
    assert from_mapping(SoftWeightConfig, to_mapping(config)) == config
    with pytest.raises(InputError, match=r"codistillation\.soft_weight\.gap=-1\.0"):
        from_mapping(SoftWeightConfig, {"gap": -1}, "codistillation.soft_weight")
