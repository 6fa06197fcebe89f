"""One training on several processes is the training of one process."""

import dataclasses
import math

import pytest
import torch

from moesaic.parallel.workers import Workers
from moesaic.training.parallel_check import (
    CASES,
    COLUMNS,
    LAYOUTS,
    LEFT_OUT,
    Compared,
    Trained,
    Training,
    deviations,
    train_on,
)

SEVERAL = [name for name in LAYOUTS if name != "one process"]
QUICK = {
    ("shards on 2", "Muon"),
    ("experts on 2", "starved, recomputed"),
    ("matrices on 2", "odd sizes"),
}

_alone: dict[Training, Trained] = {}


def alone(workers: Workers, training: Training) -> Trained:
    if training not in _alone:
        _alone[training] = train_on(workers, training, LAYOUTS["one process"])
    return _alone[training]


@pytest.mark.parametrize(
    ("layout", "case"),
    [
        pytest.param(layout, case, marks=[] if (layout, case) in QUICK else pytest.mark.slow)
        for layout in SEVERAL
        for case in CASES
        if (layout, case) not in LEFT_OUT
    ],
)
def test_equals_one_process(workers: Workers, layout: str, case: str) -> None:
    found = deviations(train_on(workers, CASES[case], LAYOUTS[layout]), alone(workers, CASES[case]))
    assert {name for names in COLUMNS.values() for name in names} <= found.keys()
    assert Compared(layout, case, "64-true", found).exceeding == {}


@pytest.mark.slow_but_for("shards")
@pytest.mark.parametrize("layout", ["shards on 2", "experts on 2", "matrices on 2"])
def test_equals_one_process_in_fp32(workers: Workers, layout: str) -> None:
    training = dataclasses.replace(CASES["uneven"], precision="32-true")
    found = deviations(train_on(workers, training, LAYOUTS[layout]), alone(workers, training))
    assert Compared(layout, "uneven", "32-true", found).exceeding == {}


MIXED = [("shards on 2", "accumulated, uneven"), ("shards on 2", "starved, recomputed"), ("experts on 2", "Muon")]


@pytest.mark.slow_but_for("Muon")
@pytest.mark.parametrize(("layout", "case"), MIXED)
def test_mixed_precision_rounds_what_one_process_rounds(workers: Workers, layout: str, case: str) -> None:
    """Weights that are gathered in bf16 give what autocast gives, which is what copies on as many ranks have."""
    training = dataclasses.replace(CASES[case], precision="bf16-mixed")
    found = train_on(workers, training, LAYOUTS[layout])
    apart = deviations(found, alone(workers, training))
    assert apart["train/loss"] < 1e-3 and apart["weights"] < 3e-3
    if layout == "shards on 2":
        copies = deviations(found, train_on(workers, training, LAYOUTS["copies on 2"]))
        assert Compared(layout, case, "32-true", copies).exceeding == {}
    assert all(weight.dtype == torch.float32 for weight in found.weights.values() if weight.is_floating_point())


def test_a_number_that_is_none_is_told() -> None:
    """What is no number is not small, neither in a log nor among weights."""
    good = Trained([{"train/loss": 1.0}], {"head.weight": torch.ones(2)})
    assert deviations(good, good) == {"train/loss": 0.0, "weights": 0.0}
    for bad in (
        Trained([{"train/loss": math.nan}], good.weights),
        Trained([{"train/loss": 1.0}, {"train/loss": math.nan}], good.weights),
        Trained(good.steps, {"head.weight": torch.tensor([1.0, math.nan])}),
        Trained([{"train/loss": 1.0001}], good.weights),
    ):
        wanted = Trained(good.steps * len(bad.steps), good.weights)
        assert Compared("", "", "32-true", deviations(bad, wanted)).exceeding
