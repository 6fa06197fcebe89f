"""Optimizer groups, Muon beside AdamW, schedules."""

import copy

import pytest
import torch
from torch import Tensor, nn

from moesaic.models import build_decoder, llama4_toy
from moesaic.training.config import OptimizerConfig, ScheduleConfig
from moesaic.training.optimizers import (
    MuonAdamW,
    build_optimizer,
    learning_rate_factor,
    orthogonalizer,
    parameter_groups,
)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_in_exactly_one_group(name: str, tied: bool) -> None:
    model = build_decoder(llama4_toy(tie_embeddings=tied))
    groups = parameter_groups(model, OptimizerConfig(name=name))  # type: ignore[arg-type]
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_decay_and_muon_by_kind_of_parameter() -> None:
    model = build_decoder(llama4_toy())
    config = OptimizerConfig(name="muon", learning_rate=1e-3, muon_learning_rate=2e-3, weight_decay=0.3)
    of = {id(p): group for group in parameter_groups(model, config) for p in group["params"]}
    for name, parameter in model.named_parameters():
        group = of[id(parameter)]
        hidden = "proj" in name
        output = name == "head.weight" or "router" in name
        assert group["muon"] == hidden, name
        assert group["weight_decay"] == (0.3 if hidden or output else 0.0), name
        assert group["lr"] == (2e-3 if hidden else 1e-3), name


def steps_of(optimizer: torch.optim.Optimizer, weights: list[Tensor], gradients: list[list[Tensor]]) -> list[Tensor]:
    for step in gradients:
        for weight, gradient in zip(weights, step, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
    return weights


def test_muon_takes_the_steps_of_torch_muon_on_matrices() -> None:
    shapes = [(24, 8), (8, 24), (16, 16)]
    start = [torch.randn(shape) for shape in shapes]
    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(4)]
    ours = [nn.Parameter(w.clone()) for w in start]
    theirs = [nn.Parameter(w.clone()) for w in start]
    groups = [{"params": ours, "lr": 0.02, "weight_decay": 0.1, "muon": True}]
    steps_of(MuonAdamW(groups, lr=0.02), ours, gradients)  # type: ignore[arg-type]
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    steps_of(reference, theirs, gradients)  # type: ignore[arg-type]
    for w0, mine, other in zip(start, ours, theirs, strict=True):
        moved = (other - w0).norm()
        assert moved > 0.1
        assert (mine - other).norm() < 0.02 * moved  # torch's runs in bf16


def test_stacked_experts_step_like_separate_matrices() -> None:
    stacked, gradient = torch.randn(3, 8, 20), torch.randn(3, 8, 20)
    together = nn.Parameter(stacked.clone())
    apart = [nn.Parameter(w.clone()) for w in stacked]
    steps_of(MuonAdamW([{"params": [together], "muon": True, "lr": 0.1}], lr=0.1), [together], [[gradient]])
    steps_of(MuonAdamW([{"params": apart, "muon": True, "lr": 0.1}], lr=0.1), apart, [list(gradient)])  # type: ignore[arg-type]
    torch.testing.assert_close(together.data, torch.stack([w.data for w in apart]))


def test_groups_without_muon_step_like_adamw() -> None:
    start = torch.randn(6, 5)
    gradients = [[torch.randn(6, 5)] for _ in range(3)]
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    steps_of(MuonAdamW([{"params": [ours], "muon": False, "lr": 0.1}], lr=0.1), [ours], gradients)
    steps_of(torch.optim.AdamW([theirs], lr=0.1), [theirs], gradients)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(4, 32, 12), (4, 12, 32), (1, 9, 9)], ids=str)
def test_orthogonalizer_brings_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    g = 1e-4 * torch.randn(shape, dtype=torch.float64)
    q = orthogonalizer(g)
    torch.testing.assert_close(q, q.mT)
    values = torch.linalg.svdvals(g @ q if shape[1] > shape[2] else q @ g)
    assert values[:, :-1].min() > 0.6
    assert values.max() < 1.3


def test_a_gradient_of_zero_only_decays() -> None:
    weight = nn.Parameter(torch.ones(2, 4, 6))
    group = {"params": [weight], "muon": True, "lr": 0.1, "weight_decay": 0.5}
    steps_of(MuonAdamW([group], lr=0.1), [weight], [[torch.zeros(2, 4, 6)]])
    torch.testing.assert_close(weight.data, torch.full((2, 4, 6), 0.95))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_other_dtypes_take_the_same_steps(dtype: torch.dtype) -> None:
    start, gradient = torch.randn(3, 8, 20), torch.randn(3, 8, 20)
    weights = [nn.Parameter(start.to(each)) for each in (torch.float32, dtype)]
    for weight in weights:
        steps_of(MuonAdamW([{"params": [weight], "muon": True, "lr": 0.1}], lr=0.1), [weight], [[gradient.to(weight)]])
    tolerance = {} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(weights[1].float(), weights[0], **tolerance)


def test_state_survives_saving_and_loading() -> None:
    model = build_decoder(llama4_toy())
    optimizer = build_optimizer(model, OptimizerConfig(name="muon"))
    twin = copy.deepcopy(model)
    tokens = torch.randint(0, 512, (2, 16))

    def step(decoder: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        decoder(tokens).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(model, optimizer)
    restored = build_optimizer(twin, OptimizerConfig(name="muon"))
    twin.load_state_dict(model.state_dict())
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer)
    step(twin, restored)
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ScheduleConfig(name="constant", warmup_steps=2), [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        (ScheduleConfig(name="wsd", warmup_steps=2, decay_fraction=0.5), [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        (
            ScheduleConfig(name="wsd", warmup_steps=0, decay_fraction=0.2, final_factor=0.1),
            [1, 1, 1, 1, 1, 1, 1, 1, 1, 0.55],
        ),
        (ScheduleConfig(name="cosine", warmup_steps=0), [1, None, None, None, None, 0.5, None, None, None, None]),
    ],
)
def test_learning_rate_by_step(config: ScheduleConfig, expected: list[float | None]) -> None:
    factor = learning_rate_factor(config, steps=10)
    for i, value in enumerate(expected):
        if value is not None:
            assert factor(i) == pytest.approx(value), i


def test_cosine_falls_all_the_way() -> None:
    factor = learning_rate_factor(ScheduleConfig(name="cosine", warmup_steps=0, final_factor=0.1), steps=100)
    values = [factor(i) for i in range(100)]
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(0.1, abs=1e-3)
