"""Experts spread over ranks against one process: outputs and every gradient, whatever the routing."""

from typing import Any, NamedTuple

import pytest
import torch
from reference.comparing import redraw
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint

from moesaic.layers import MoE, Routing
from moesaic.layers.all_to_all import AllToAllDispatcher
from moesaic.parallel.workers import Workers

DIM, HIDDEN, EXPERTS, TOKENS = 8, 12, 4, 24


class Chosen(nn.Module):
    """A router whose choice is written down: scores with gradients, and any expert, or none (the id E)."""

    def __init__(self, expert_ids: list[list[int]], dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(EXPERTS, DIM, dtype=dtype))
        self.choices = torch.tensor(expert_ids)

    def forward(self, x: Tensor) -> Routing:
        logits = x @ self.weight.T
        # the last feature numbers the token
        ids = self.choices[x[:, -1].detach().round().long() % len(self.choices)]
        scores = logits.sigmoid().gather(1, ids.clamp(max=EXPERTS - 1)).masked_fill(ids == EXPERTS, 0)
        return Routing(logits, scores, ids)


CASES: dict[str, dict[str, Any]] = {
    "top-1 with shared expert": {"top_k": 1},
    "top-2 softmax": {
        **{"top_k": 2, "score_function": "softmax", "normalize_scores": True, "shared_hidden_dim": 0},
        "score_before_experts": False,
    },
    "one rank's experts alone": {"router": [[0], [1]]},
    "some tokens without expert": {"router": [[4, 2], [4, 4], [1, 3], [0, 4], [3, 0]], "shared_hidden_dim": 0},
    "no token with an expert": {"router": [[4]]},
    "one rank sends nothing": {"router": [[3]] * 12 + [[4]] * 12},
}


class Result(NamedTuple):
    y: Tensor
    x_gradient: Tensor
    experts: tuple[Tensor, Tensor]
    router: Tensor


def build(case: str, dtype: torch.dtype = torch.float64, backend: Any = "loop") -> MoE:
    torch.manual_seed(0)
    arguments = {**CASES[case]}
    if (choices := arguments.get("router")) is not None:
        arguments["router"] = Chosen(choices, dtype)
    return redraw(MoE.build(DIM, HIDDEN, EXPERTS, **arguments, dtype=dtype, backend=backend))  # type: ignore[return-value]


def learn(moe: MoE, x: Tensor, target: Tensor, recompute: bool = False) -> Result:
    x = x.requires_grad_()
    y = checkpoint(moe, x, use_reentrant=False) if recompute else moe(x)
    (y * target).sum().backward()
    experts = (moe.experts.gate_up_proj.grad, moe.experts.down_proj.grad)
    return Result(y.detach(), x.grad, experts, moe.router.weight.grad)  # type: ignore[arg-type]


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    x, target = (torch.randn(TOKENS, DIM, generator=draw, dtype=dtype) for _ in range(2))
    x[:, -1] = torch.arange(TOKENS)
    return x, target


def on_a_rank(case: str, dtype: torch.dtype, backend: str, recompute: bool) -> Result:
    moe = build(case, dtype, backend)
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    for name, weight in list(moe.experts.named_parameters()):
        setattr(moe.experts, name, nn.Parameter(weight.detach().chunk(ranks)[rank].clone()))
    moe.dispatcher = AllToAllDispatcher(distributed.group.WORLD)  # type: ignore[arg-type]
    x, target = (each.chunk(ranks)[rank].clone() for each in data(dtype))
    return learn(moe, x, target, recompute)


def together(results: list[Result]) -> Result:
    """Tokens and experts side by side; the router's gradient is a sum over ranks."""
    y, x_gradient = (torch.cat([result[i] for result in results]) for i in range(2))
    experts = tuple(torch.cat([result.experts[i] for result in results]) for i in range(2))
    return Result(y, x_gradient, experts, torch.stack([result.router for result in results]).sum(0))  # type: ignore[arg-type]


def require_close(found: Result, wanted: Result, tolerance: float) -> None:
    for name in Result._fields:
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), atol=tolerance, rtol=tolerance)


@pytest.mark.slow_but_for("top-1 with shared expert-4")
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_equals_one_process(workers: Workers, case: str, ranks: int) -> None:
    alone = learn(build(case), *data())
    require_close(together(workers.run(on_a_rank, ranks, case, torch.float64, "loop", False)), alone, 1e-12)


@pytest.mark.parametrize("case", ["top-2 softmax", "one rank's experts alone"])
def test_equals_one_process_under_checkpointing(workers: Workers, case: str) -> None:
    plain = workers.run(on_a_rank, 2, case, torch.float64, "loop", False)
    recomputed = workers.run(on_a_rank, 2, case, torch.float64, "loop", True)
    for first, second in zip(plain, recomputed, strict=True):
        require_close(second, first, 0.0)


@pytest.mark.parametrize("case", ["top-1 with shared expert", "one rank's experts alone"])
@pytest.mark.parametrize("backend", ["grouped", "padded", "sliced", "sliced_recompute"])
def test_equals_one_process_on_every_backend(workers: Workers, backend: str, case: str) -> None:
    alone = learn(build(case, torch.float32, backend), *data(torch.float32))
    require_close(together(workers.run(on_a_rank, 2, case, torch.float32, backend, False)), alone, 1e-5)


def uneven() -> None:
    moe = MoE.build(DIM, HIDDEN, 3, dispatcher=AllToAllDispatcher(distributed.group.WORLD))  # type: ignore[arg-type]
    moe(torch.randn(4, DIM))


def test_experts_that_do_not_go_round_are_refused(workers: Workers) -> None:
    with pytest.raises(RuntimeError, match="3 experts: must be a multiple of the 2 ranks that share them"):
        workers.run(uneven, 2)
