"""Every expert backend against `loop`, and `loop` against one row at a time."""

from collections.abc import Callable
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from reference.comparing import OutputSizes, assert_close, assert_gradients, redraw
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moesaic.layers import (
    ACTIVATIONS,
    BACKENDS,
    ActivationName,
    BackendName,
    Experts,
    MoE,
    choose_backend,
    run_experts,
)
from moesaic.layers.backend_choice import ROUNDING_BACKENDS

DIM, HIDDEN = 16, 24

SHAPES = {
    "balanced": [4, 4, 4, 4],
    "uneven": [7, 1, 3, 5],
    "some experts empty": [5, 0, 0, 4],
    "first and last expert empty": [0, 6, 2, 0],
    "all rows on one expert": [0, 0, 16, 0],
    "one row": [0, 1, 0, 0],
    "one expert": [9],
    "no rows": [0, 0, 0],
}
EXACT = [name for name in BACKENDS if name not in ROUNDING_BACKENDS]  # the others are in test_fp8.py
FLOAT64 = [name for name in EXACT if name != "grouped"]  # grouped_mm has no fp64 kernel


def test_the_literal_types_are_the_names_there_are() -> None:
    assert get_args(BackendName) == ("auto", *BACKENDS)
    assert get_args(ActivationName) == tuple(ACTIVATIONS)


def run(experts: Experts, counts: list[int], rows: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    rows = rows.to(experts.down_proj.dtype).requires_grad_()
    experts.zero_grad()
    y = experts(rows, torch.tensor(counts))
    upstream = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view_as(y)
    y.backward(upstream.to(y.dtype))
    gradients = {name: parameter.grad for name, parameter in experts.named_parameters()}
    return y.detach(), {"rows": rows.grad, **gradients}


def pair(
    name: str, counts: list[int], dtype: torch.dtype, oracle_dtype: torch.dtype
) -> tuple[Experts, Experts, Tensor]:
    oracle = Experts(len(counts), DIM, HIDDEN, backend="loop", dtype=oracle_dtype)
    redraw(oracle)
    experts = Experts(len(counts), DIM, HIDDEN, backend=name, dtype=dtype)
    experts.load_state_dict(oracle.state_dict())
    oracle.load_state_dict(experts.state_dict())  # what the rounding to `dtype` has left of the weights
    rows = torch.randn(sum(counts), DIM).to(dtype)
    return experts, oracle, rows.to(oracle_dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", EXACT)
def test_equals_loop_in_float32(name: str, shape: str) -> None:
    experts, oracle, rows = pair(name, SHAPES[shape], torch.float32, torch.float64)
    found, found_gradients = run(experts, SHAPES[shape], rows)
    expected, expected_gradients = run(oracle, SHAPES[shape], rows)
    assert found.dtype == torch.float32
    assert_close(found, expected, 1e-6, "rows out")
    assert_gradients(found_gradients, expected_gradients, 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FLOAT64)
def test_equals_loop_in_float64(name: str, shape: str) -> None:
    experts, oracle, rows = pair(name, SHAPES[shape], torch.float64, torch.float64)
    found, found_gradients = run(experts, SHAPES[shape], rows)
    expected, expected_gradients = run(oracle, SHAPES[shape], rows)
    assert_close(found, expected, 1e-13, "rows out")
    assert_gradients(found_gradients, expected_gradients, 1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", EXACT)
def test_equals_float32_loop_in_bfloat16(name: str, shape: str) -> None:
    experts, oracle, rows = pair(name, SHAPES[shape], torch.bfloat16, torch.float32)
    found, found_gradients = run(experts, SHAPES[shape], rows)
    expected, expected_gradients = run(oracle, SHAPES[shape], rows)
    assert found.dtype == torch.bfloat16
    assert_close(found, expected, 0.02, "rows out")
    assert_gradients(found_gradients, expected_gradients, 0.03)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_loop_equals_one_row_at_a_time(activation: str) -> None:
    """Gate first, up second, in the (in, out) layout of the weights."""
    oracles: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": lambda x: x / (1 + torch.exp(-x)),
        "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
        "relu": lambda x: x * (x > 0),
        "gelu_tanh": lambda x: x * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
        "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
        "relu2": lambda x: x * x * (x > 0),
        "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
        "linear": lambda x: x,
    }
    counts = [2, 0, 3]
    experts = redraw(Experts(3, DIM, HIDDEN, activation=activation, backend="loop", dtype=torch.float64))
    rows = torch.randn(5, DIM, dtype=torch.float64)
    expected = []
    for row, e in zip(rows, [0, 0, 2, 2, 2], strict=True):
        gate = row @ experts.gate_up_proj[e, :, :HIDDEN]
        up = row @ experts.gate_up_proj[e, :, HIDDEN:]
        expected.append((oracles[activation](gate) * up) @ experts.down_proj[e])
    assert_close(experts(rows, torch.tensor(counts)), torch.stack(expected), 1e-13, "rows out")


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("name", EXACT)
def test_moe_is_the_same_on_every_backend(name: str, top_k: int) -> None:
    oracle = redraw(MoE.build(DIM, HIDDEN, 4, top_k=top_k, backend="loop"))
    moe = MoE.build(DIM, HIDDEN, 4, top_k=top_k, backend=name)
    moe.load_state_dict(oracle.state_dict())
    x = torch.randn(2, 5, DIM)
    results = []
    for layer in (moe, oracle):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.square().sum().backward()
        results.append((y, {"x": leaf.grad, **{n: p.grad for n, p in layer.named_parameters()}}))
    assert_close(results[0][0], results[1][0], 1e-6, "output")
    assert_gradients(results[0][1], results[1][1], 1e-5)


@pytest.mark.slow_but_for("sliced-True", "padded-False")
@pytest.mark.parametrize("score_before", [True, False])
@pytest.mark.parametrize("name", FLOAT64)
def test_gradcheck(name: str, score_before: bool) -> None:
    moe = MoE.build(4, 3, 3, top_k=2, score_before_experts=score_before, backend=name, dtype=torch.float64)
    redraw(moe)
    x = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    names = [n for n, _ in moe.named_parameters()]

    def layer(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(moe, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(layer, (x, *moe.parameters()))


@pytest.mark.parametrize("name", [*EXACT, "fp8_emulated", "auto"])
def test_sum_backward(name: str) -> None:
    """The gradient of a sum is an expanded scalar, which the backward of grouped_mm refuses by itself."""
    experts = Experts(3, DIM, HIDDEN, backend=name)
    rows = torch.randn(6, DIM, requires_grad=True)
    experts(rows, torch.tensor([3, 0, 3])).sum().backward()
    assert rows.grad is not None and rows.grad.abs().sum() > 0


@pytest.mark.parametrize("name", [*EXACT, "fp8_emulated", "auto"])
def test_idle_experts_have_a_zero_gradient(name: str) -> None:
    """Not None: DistributedDataParallel would wait for it forever. Not garbage either."""
    experts = Experts(4, DIM, HIDDEN, backend=name)
    experts(torch.randn(5, DIM), torch.tensor([0, 5, 0, 0])).square().sum().backward()
    for parameter in (experts.gate_up_proj, experts.down_proj):
        assert parameter.grad is not None
        assert [bool(g.any()) for g in parameter.grad] == [False, True, False, False]


CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


@pytest.mark.parametrize(
    ("device", "dtype", "dim", "hidden_dim", "asked", "name", "reason"),
    [
        (CPU, torch.float32, 16, 24, "auto", "sliced", "the least memory"),
        (CPU, torch.float64, 6, 10, "auto", "sliced", "the least memory"),
        (CUDA, torch.bfloat16, 16, 24, "auto", "grouped", "no padding"),
        (CUDA, torch.float32, 16, 24, "auto", "padded", "wants bfloat16"),
        (CUDA, torch.bfloat16, 16, 4, "auto", "padded", "hidden_dim=4"),
        (MPS, torch.float32, 16, 24, "auto", "padded", "mps"),
        (CPU, torch.float32, 16, 24, "grouped", "grouped", "as asked for"),
        (CPU, torch.float64, 16, 24, "grouped", "sliced", "no torch.float64 kernel"),
        (CPU, torch.float32, 6, 24, "grouped", "sliced", "dim=6"),
        (CPU, torch.bfloat16, 12, 24, "grouped", "sliced", "dim=12"),  # 24 bytes, where fp32 has 48
        (CPU, torch.float32, 12, 24, "grouped", "grouped", "as asked for"),
        (CPU, torch.float64, 6, 10, "padded", "padded", "as asked for"),
        (CPU, torch.float64, 6, 10, "loop", "loop", "as asked for"),
    ],
)
def test_choose_backend(
    device: torch.device, dtype: torch.dtype, dim: int, hidden_dim: int, asked: str, name: str, reason: str
) -> None:
    """What a backend cannot do falls to one that can, and the reason is told."""
    found, why = choose_backend(device, dtype, dim, hidden_dim, asked)
    assert found == name
    assert reason in why


def test_an_activation_that_cannot_be_repeated_is_not_given_to_sliced() -> None:
    """Its backward calls the activation again: parameters would get no gradient, random numbers would differ."""
    trained, random = nn.PReLU(dtype=torch.float64), nn.RReLU()
    for activation, reason in ((trained, "parameters that train"), (random, "random numbers")):
        found, why = choose_backend(CPU, torch.float64, 16, 16, "sliced", activation)
        assert found not in ("sliced", "sliced_recompute") and reason in why
    assert choose_backend(CPU, torch.float64, 16, 16, "sliced", nn.ReLU())[0] == "sliced"
    weights = [torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)]
    rows, counts = torch.randn(5, 3, dtype=torch.float64), torch.tensor([2, 3])
    run_experts(rows, *weights, counts, trained).sum().backward()
    assert trained.weight.grad is not None and trained.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize(("dim", "hidden_dim"), [(6, 10), (16, 6), (10, 16), (16, 16), (12, 12)])
def test_auto_runs_whatever_the_widths(dim: int, hidden_dim: int, dtype: torch.dtype) -> None:
    experts = redraw(Experts(2, dim, hidden_dim, dtype=dtype))
    oracle = Experts(2, dim, hidden_dim, backend="loop", dtype=torch.float64)
    oracle.load_state_dict(experts.state_dict())
    rows = torch.randn(5, dim).to(dtype).requires_grad_()
    y = experts(rows, torch.tensor([3, 2]))
    y.sum().backward()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.03)
    assert_close(y, oracle(rows.double(), torch.tensor([3, 2])), tolerance, "rows out")


def test_auto_runs_the_chosen_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name, function in list(BACKENDS.items()):
        monkeypatch.setitem(
            BACKENDS, name, lambda *a, name=name, function=function: (ran.append(name), function(*a))[1]
        )
    counts = torch.tensor([2, 2])
    Experts(2, 16, 16)(torch.randn(4, 16), counts)
    Experts(2, 16, 16, backend="padded")(torch.randn(4, 16), counts)
    Experts(2, 6, 16, backend="grouped")(torch.randn(4, 6), counts)
    with torch.autocast("cpu", torch.bfloat16):  # 12 columns are enough for grouped_mm in fp32, not in bf16
        Experts(2, 12, 16, backend="grouped")(torch.randn(4, 12), counts)
    assert ran == ["sliced", "padded", "sliced", "sliced"]


SLICED = [name for name in BACKENDS if name.startswith("sliced")]


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "in place", "no derivative at 0"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", SLICED)
def test_any_activation(name: str, dtype: torch.dtype, activation: str) -> None:
    others: dict[str, Callable[[Tensor], Tensor]] = {
        "in place": lambda x: x.mul_(2).add_(1),
        "no derivative at 0": lambda x: x.abs().sqrt(),
    }
    function = {**ACTIVATIONS, **others}[activation]
    oracle = (lambda x: 2 * x + 1) if activation == "in place" else function
    drawn = [torch.randn(5, DIM), torch.randn(3, DIM, 2 * HIDDEN) * DIM**-0.5, torch.randn(3, HIDDEN, DIM)]
    drawn = [x.to(dtype) for x in drawn]
    results = []
    for backend, f in ((name, function), ("loop", oracle)):
        leaves = [x.clone().requires_grad_() for x in (drawn if backend == name else [x.double() for x in drawn])]
        y = run_experts(*leaves, torch.tensor([1, 0, 4]), f, backend)
        y.sum().backward()
        results.append((y, dict(zip(("rows", "gate_up", "down"), (leaf.grad for leaf in leaves), strict=True))))
    tolerance = 1e-12 if dtype == torch.float64 else 0.05
    assert_close(results[0][0], results[1][0], tolerance, "rows out")
    assert_gradients(results[0][1], results[1][1], tolerance)


@pytest.mark.slow_but_for("sliced-silu")
@pytest.mark.parametrize("activation", [F.silu, F.gelu, torch.tanh])
@pytest.mark.parametrize("name", SLICED)
def test_gradcheck_of_the_function(name: str, activation: Callable[[Tensor], Tensor]) -> None:
    shapes = [(5, 4), (3, 4, 6), (3, 3, 4)]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    counts = torch.tensor([1, 0, 4])
    assert torch.autograd.gradcheck(lambda *x: run_experts(*x, counts, activation, name), leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", SLICED)
def test_rows_need_not_be_contiguous(name: str, dtype: torch.dtype) -> None:
    experts, counts = Experts(3, DIM, HIDDEN, backend=name, dtype=dtype), torch.tensor([1, 0, 4])
    rows = torch.randn(DIM, 5, dtype=dtype).t()
    assert torch.equal(experts(rows, counts), experts(rows.contiguous(), counts))
    assert torch.equal(experts(rows[:1].expand(5, -1), counts), experts(rows[:1].repeat(5, 1), counts))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", SLICED)
def test_under_activation_checkpointing(name: str, reentrant: bool) -> None:
    experts, counts = Experts(3, DIM, HIDDEN, backend=name), torch.tensor([1, 0, 4])
    rows = torch.randn(5, DIM, requires_grad=True)
    results = []
    for checkpointed in (False, True):
        experts.zero_grad()
        rows.grad = None
        y = checkpoint(experts, rows, counts, use_reentrant=reentrant) if checkpointed else experts(rows, counts)
        y.square().sum().backward()
        results.append({"rows": rows.grad, **{n: p.grad for n, p in experts.named_parameters()}})
    assert_gradients(results[1], results[0], 0)


@pytest.mark.parametrize("name", SLICED)
def test_functional_gradients(name: str) -> None:
    experts, counts = Experts(3, DIM, HIDDEN, backend=name, dtype=torch.float64), torch.tensor([1, 0, 4])
    rows = torch.randn(5, DIM, dtype=torch.float64)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(experts, weights, (rows, counts)).square().sum()

    found = torch.func.grad(loss)({n: p.detach() for n, p in experts.named_parameters()})
    experts(rows, counts).square().sum().backward()
    assert_gradients(found, {n: p.grad for n, p in experts.named_parameters()}, 1e-12)


@pytest.mark.parametrize("name", SLICED)
def test_nothing_is_kept_without_gradients(name: str) -> None:
    experts, counts = Experts(3, DIM, HIDDEN, backend=name), torch.tensor([800, 0, 600])
    rows = torch.randn(1400, DIM)
    with torch.inference_mode(), OutputSizes() as sizes:
        y = experts(rows, counts)
    assert sizes.largest < 1400 * 2 * HIDDEN  # the pre-activations of all rows
    assert torch.equal(y, experts(rows, counts))


@pytest.mark.parametrize("name", SLICED)
def test_memory_grows_with_rows_not_with_experts(name: str) -> None:
    experts, counts = Experts(64, 4, 3, backend=name), torch.tensor([0] * 10 + [200] + [0] * 53)
    rows = torch.randn(200, 4, requires_grad=True)
    with OutputSizes() as sizes:
        experts(rows, counts).sum().backward()
    assert sizes.largest <= 64 * 4 * 6  # the weights; rows of all experts would be 64 * 200 * 4


@pytest.mark.parametrize("name", SLICED)
def test_what_keeps_the_pre_activations_and_what_does_not(name: str) -> None:
    saved: list[tuple[int, ...]] = []
    experts, rows = Experts(2, DIM, HIDDEN, backend=name), torch.randn(8, DIM)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(tuple(x.shape)), lambda _: None):
        experts(rows, torch.tensor([3, 5]))
    own = {"sliced": [(8, 2 * HIDDEN)], "sliced_recompute": []}[name]
    assert sorted(saved) == sorted([(8, DIM), (2, DIM, 2 * HIDDEN), (2, HIDDEN, DIM), *own])


@pytest.mark.parametrize("name", SLICED)
@pytest.mark.parametrize(
    ("counts", "message"),
    [([2, 2], "counts the rows of 2 experts: gate_up has 3"), ([2, 2, 2], "sums to 6: there are 5 rows")],
)
def test_counts_that_do_not_fit(name: str, counts: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Experts(3, DIM, HIDDEN, backend=name)(torch.randn(5, DIM), torch.tensor(counts))


@pytest.mark.parametrize("name", [*EXACT, "fp8_emulated", "auto"])
def test_rows_and_weights_of_different_dtypes(name: str) -> None:
    with pytest.raises(ValueError, match=r"rows torch\.bfloat16, gate_up torch\.float32, .*: must be of one dtype"):
        Experts(3, DIM, HIDDEN, backend=name)(torch.randn(5, DIM).bfloat16(), torch.tensor([1, 0, 4]))


def test_under_compilation_sliced_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for dtype, name in ((torch.float32, "padded"), (torch.bfloat16, "grouped")):
        for asked in ("auto", *SLICED):
            found, why = choose_backend(CPU, dtype, 16, 24, asked)
            assert found == name
            assert asked == "auto" or "torch.compile would compile anew" in why


def test_the_printed_module_says_what_runs() -> None:
    assert "backend=grouped (runs sliced: grouped_mm has no torch.float64" in repr(
        Experts(2, 16, 16, backend="grouped", dtype=torch.float64)
    )
    assert "backend=grouped)" in repr(Experts(2, 16, 16, backend="grouped"))


@pytest.mark.parametrize("name", SLICED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_transposed_weights_and_their_gradients(name: str, dtype: torch.dtype) -> None:
    """Stacked (E, out, in), as in Mixtral: no copy is made, and gradients have the layout of the weights."""
    gate_up, down = torch.randn(3, 2 * HIDDEN, DIM, dtype=dtype), torch.randn(3, DIM, HIDDEN, dtype=dtype)
    counts = torch.tensor([2, 0, 5])
    rows = torch.randn(7, DIM, dtype=dtype)
    results = []
    for backend in (name, "loop"):
        leaves = [x.clone().requires_grad_() for x in (rows, gate_up, down)]
        y = run_experts(leaves[0], leaves[1].mT, leaves[2].mT, counts, F.silu, backend)
        y.sum().backward()
        results.append((y, {n: leaf.grad for n, leaf in zip(("rows", "gate_up", "down"), leaves, strict=True)}))
    tolerance = 1e-12 if dtype == torch.float64 else 0.03
    assert_close(results[0][0], results[1][0], tolerance, "rows out")
    assert_gradients(results[0][1], results[1][1], tolerance)


@pytest.mark.parametrize("frozen", ["rows", "gate_up", "down", "weights", "everything"])
@pytest.mark.parametrize("name", SLICED)
def test_only_what_needs_a_gradient_gets_one(name: str, frozen: str) -> None:
    needed = {"rows", "gate_up", "down"} - {frozen}
    if frozen in ("weights", "everything"):
        needed = {"rows"} if frozen == "weights" else set()
    shapes = {"rows": (7, DIM), "gate_up": (3, DIM, 2 * HIDDEN), "down": (3, HIDDEN, DIM)}
    drawn = {n: torch.randn(shape, dtype=torch.float64) for n, shape in shapes.items()}
    results = []
    for backend in (name, "loop"):
        leaves = {n: x.clone().requires_grad_(n in needed) for n, x in drawn.items()}
        y = run_experts(*leaves.values(), torch.tensor([2, 0, 5]), F.silu, backend)
        assert y.requires_grad == bool(needed)
        if needed:
            y.square().sum().backward()
        results.append({n: leaf.grad for n, leaf in leaves.items() if n in needed})
        assert all(leaf.grad is None for n, leaf in leaves.items() if n not in needed)
    assert_gradients(results[0], results[1], 1e-12)


@pytest.mark.parametrize("name", SLICED)
def test_second_derivatives_are_refused(name: str) -> None:
    experts = Experts(2, DIM, HIDDEN, backend=name)
    rows = torch.randn(4, DIM, requires_grad=True)
    (first,) = torch.autograd.grad(experts(rows, torch.tensor([1, 3])).sum(), rows, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only: use backend='loop'"):
        first.sum().backward()


@pytest.mark.parametrize("name", SLICED)
def test_gradients_accumulate(name: str) -> None:
    experts, oracle = Experts(3, DIM, HIDDEN, backend=name), Experts(3, DIM, HIDDEN, backend="loop")
    oracle.load_state_dict(experts.state_dict())
    for counts in ([1, 0, 4], [0, 5, 0]):
        rows = torch.randn(5, DIM)
        for layer in (experts, oracle):
            layer(rows, torch.tensor(counts)).square().sum().backward()
    found, expected = ({n: p.grad for n, p in layer.named_parameters()} for layer in (experts, oracle))
    assert_gradients(found, expected, 1e-5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", SLICED)
def test_many_rows_of_one_expert_are_worked_on_in_pieces(name: str, autocast: bool) -> None:
    experts, oracle = Experts(2, 4, 3, backend=name), Experts(2, 4, 3, backend="loop")
    oracle.load_state_dict(experts.state_dict())
    rows, counts = torch.randn(2500, 4), torch.tensor([2300, 200])
    results = []
    for layer in (experts, oracle):
        leaf = rows.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and layer is experts):
            y = layer(leaf, counts)
        y.float().square().mean().backward()
        results.append((y, {"rows": leaf.grad, **{n: p.grad for n, p in layer.named_parameters()}}))
    assert_close(results[0][0], results[1][0], 0.03 if autocast else 1e-5, "rows out")
    assert_gradients(results[0][1], results[1][1], 0.05 if autocast else 1e-4)


@pytest.mark.parametrize("name", SLICED)
def test_the_backward_makes_nothing_as_large_as_the_pre_activations(name: str) -> None:
    experts, rows = Experts(8, DIM, HIDDEN, backend=name), torch.randn(4000, DIM, requires_grad=True)
    y = experts(rows, torch.full((8,), 500))
    with OutputSizes() as sizes:
        y.sum().backward()
    assert sizes.largest <= 4000 * DIM  # gradients of rows


@pytest.mark.parametrize("name", SLICED)
def test_no_cast_of_a_whole_stacked_weight(name: str) -> None:
    """Under autocast fp32 weights become bf16 one expert at a time, forward and backward."""
    experts = Experts(8, DIM, HIDDEN, backend=name)
    rows, counts = torch.randn(8, DIM, requires_grad=True), torch.full((8,), 1)
    with OutputSizes() as sizes, torch.autocast("cpu", torch.bfloat16):
        y = experts(rows, counts)
    with sizes:
        y.float().sum().backward()
    whole = {(8, DIM, 2 * HIDDEN), (8, HIDDEN, DIM)}
    assert sizes.calls["aten::_to_copy"] <= 4  # rows, their gradient, the result and its gradient
    casts = {shape for shape in sizes.shapes if shape in whole}
    assert casts == whole  # the weights' gradients, and nothing else of that size
    assert experts.gate_up_proj.grad is not None and experts.gate_up_proj.grad.dtype == torch.float32


def test_half_precision_matmuls_meet_few_shapes() -> None:
    """oneDNN compiles a matmul for every new shape, which takes longer than running it."""
    experts = Experts(4, DIM, HIDDEN, dtype=torch.bfloat16)
    shapes = set()
    for i in range(12):
        counts = torch.tensor([30 + i, 40 - i, 17 + 2 * i, 1 + i])
        with OutputSizes() as sizes, torch.no_grad():
            experts(torch.randn(int(counts.sum()), DIM, dtype=torch.bfloat16), counts)
        shapes |= {shape for shape in sizes.shapes if len(shape) == 2 and shape[1] == 2 * HIDDEN}
    assert len(shapes) <= 12


@pytest.mark.parametrize("name", [*EXACT, "auto"])
def test_autocast_reaches_the_experts(name: str) -> None:
    experts = redraw(Experts(3, DIM, HIDDEN, backend=name))
    rows, counts = torch.randn(6, DIM, requires_grad=True), torch.tensor([1, 2, 3])
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(rows, counts)
    assert y.dtype == torch.bfloat16
    assert_close(y, experts(rows, counts), 0.03, "rows out")
    y.sum().backward()
    assert rows.grad is not None and rows.grad.dtype == torch.float32
    assert experts.down_proj.grad is not None and experts.down_proj.grad.dtype == torch.float32


def test_one_expert_is_a_feed_forward_network() -> None:
    experts = Experts(1, DIM, HIDDEN)
    x = torch.randn(5, DIM)
    gate, up = experts.gate_up_proj[0, :, :HIDDEN], experts.gate_up_proj[0, :, HIDDEN:]
    torch.testing.assert_close(experts(x, torch.tensor([5])), (F.silu(x @ gate) * (x @ up)) @ experts.down_proj[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": "swish"}, r"activation='swish': must be one of silu, gelu, relu"),
        ({"backend": "fast"}, r"backend='fast': must be one of auto, loop, padded, grouped, sliced, sliced_recompute"),
    ],
)
def test_bad_arguments(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Experts(2, DIM, HIDDEN, **arguments)


@pytest.mark.parametrize("name", SLICED)
@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, False), (torch.float32, True)])
@pytest.mark.parametrize("counts", [[1, 0, 17, 15, 31, 600], [5, 3, 1, 1, 0, 2], [0, 0, 0, 0, 0, 7], [513, 1, 0, 15]])
def test_rounding_row_counts_up_leaves_no_trace(
    name: str, dtype: torch.dtype, autocast: bool, counts: list[int]
) -> None:
    """In half precision an expert's matmuls reach into the rows of the next ones, and beyond the last row."""
    experts = redraw(Experts(len(counts), DIM, HIDDEN, backend=name, dtype=dtype))
    oracle = Experts(len(counts), DIM, HIDDEN, backend="loop", dtype=torch.float64)
    oracle.load_state_dict({key: value.double() for key, value in experts.state_dict().items()})
    rows, d_y = torch.randn(sum(counts), DIM, dtype=dtype, requires_grad=True), torch.randn(sum(counts), DIM)
    exact_rows = rows.detach().double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = experts(rows, torch.tensor(counts))
    y.backward(d_y.to(y.dtype))
    expected = oracle(exact_rows, torch.tensor(counts))
    expected.backward(d_y.to(y.dtype).double())
    assert_close(y, expected, 0.02, "rows out")
    assert rows.grad is not None and exact_rows.grad is not None
    assert_close(rows.grad, exact_rows.grad, 0.02, "gradient of rows")
    for (parameter_name, found), exact in zip(experts.named_parameters(), oracle.parameters(), strict=True):
        assert found.grad is not None and exact.grad is not None
        for expert, count in enumerate(counts):
            if count:
                what = f"gradient of {parameter_name}[{expert}]"
                assert_close(found.grad[expert], exact.grad[expert], 0.02, what)
            else:
                assert not found.grad[expert].any()
