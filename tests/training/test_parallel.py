"""One training on several processes is the training of one process."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from moesaic.models import LayerConfig
from moesaic.parallel.workers import Workers
from moesaic.training.parallel_check import (
    CASES,
    COLUMNS,
    LAYOUTS,
    LEFT_OUT,
    MODELS,
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


# ---- custom modules


class Choosy(nn.Module):
    """A mixture of our own, which leaves out an expert that no token of its rank has chosen."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.router = nn.Linear(dim, 5, bias=False)
        self.experts = nn.ModuleList(nn.Linear(dim, dim) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        score, chosen = self.router(x).softmax(-1)[..., :4].max(-1)  # nobody chooses the last one
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mine = chosen == i
            if mine.any():
                out[mine] = expert(x[mine]) * score[mine].unsqueeze(-1)
        return out


class Remembering(nn.Module):
    """A layer that keeps a mean of its tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        self.register_buffer("mean", torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.flatten(0, 1).mean(0).to(self.mean.dtype), 0.1)
        return (x - self.mean) * self.scale


class Scaled(nn.Module):
    """A layer with a weight of no dimension."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.linear(x)


def with_layer(layer: type[nn.Module]) -> str:
    """The name of a model with a layer of our own."""
    name, [first, *_] = f"Llama 4 with {layer.__name__}", MODELS
    pattern = LayerConfig("chunked_rope", {"type": f"{__name__}.{layer.__name__}"}), LayerConfig("nope", "moe")
    changes = {"pattern": pattern, "interleave_moe_layer_step": None, "nope_layer_interval": None}
    MODELS[name] = dataclasses.replace(MODELS[first], **changes)
    return name


CHOOSY, REMEMBERING, SCALED = with_layer(Choosy), with_layer(Remembering), with_layer(Scaled)


@pytest.mark.slow_but_for("shards on 2")
@pytest.mark.parametrize("layout", ["copies on 2", "shards on 2"])
def test_a_weight_that_only_some_ranks_need(workers: Workers, layout: str) -> None:
    training = dataclasses.replace(CASES["AdamW"], model=CHOOSY)
    found = deviations(train_on(workers, training, LAYOUTS[layout]), alone(workers, training))
    assert Compared(layout, CHOOSY, "64-true", found).exceeding == {}


@pytest.mark.slow_but_for("copies on 2")
@pytest.mark.parametrize("layout", ["copies on 2", "shards on 2"])
def test_a_module_that_keeps_something_of_its_tokens_is_refused(workers: Workers, layout: str) -> None:
    training = dataclasses.replace(CASES["AdamW"], model=REMEMBERING)
    with pytest.raises(
        RuntimeError, match=r"Remembering: its buffer layers\.0\.ffn\.mean follows the tokens of a rank"
    ):
        train_on(workers, training, LAYOUTS[layout])


@pytest.mark.slow
def test_a_weight_without_a_dimension_is_refused_where_it_would_be_in_parts(workers: Workers) -> None:
    training = dataclasses.replace(CASES["Muon"], model=SCALED)
    with pytest.raises(
        RuntimeError, match=r"Scaled: its weight layers\.0\.ffn\.scale has no dimension; scale must have"
    ):
        train_on(workers, training, LAYOUTS["shards on 2"])
    copies = deviations(train_on(workers, training, LAYOUTS["copies on 2"]), alone(workers, training))
    assert Compared("copies on 2", SCALED, "64-true", copies).exceeding == {}


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
