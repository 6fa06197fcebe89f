"""FP8: rounding against a table of its numbers, products and gradients against a slow reference, whole models."""

import functools
from collections.abc import Callable

import pytest
import torch
from reference.comparing import assert_close, assert_gradients, redraw
from reference.fp8 import grouped_product, nearest, numbers, product_and_gradients, rounded
from torch import Tensor, nn

from moesaic.layers import Experts, Fp8Recipe, MoE, choose_backend, emulating_fp8, run_experts
from moesaic.layers.feed_forward import ACTIVATIONS
from moesaic.layers.fp8 import fp8_product, quantize, round_to_fp8
from moesaic.layers.fp8_emulation import Fp8Linear, hidden_linears
from moesaic.layers.fp8_kernels import MULTIPLE, PaddedGroups, fp8
from moesaic.models import build_decoder, llama4_toy
from moesaic.testing import MoEUnderTest, moe_checks

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
OPERANDS = {"x": "activations", "w": "weights", "d": "gradients"}

# ---- rounding


@pytest.mark.parametrize("name", FORMATS)
def test_the_table_of_the_reference_is_that_of_torch(name: str) -> None:
    codes = torch.arange(len(numbers(name)), dtype=torch.uint8)
    assert codes.view(FORMATS[name]).float().tolist() == numbers(name)
    assert numbers(name)[-1] == torch.finfo(FORMATS[name]).max


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("name", FORMATS)
def test_rounding_equals_the_reference(name: str, dim: int | None, dtype: torch.dtype) -> None:
    x = torch.randn(7, 9) * torch.logspace(-12, 12, 9) * torch.logspace(-6, 6, 7)[:, None]
    x[2] = 0
    x[:, 3] = 0
    x = x.to(dtype)
    assert torch.equal(round_to_fp8(x, dim, FORMATS[name]).double(), rounded(x, dim, name))
    values, factors = quantize(x, dim, FORMATS[name])
    assert torch.equal(values.double() * factors, rounded(x, dim, name))


@pytest.mark.parametrize("name", FORMATS)
def test_scales_at_the_edges_of_the_range(name: str) -> None:
    """Where the largest number is that of the format, a bit more or a bit less, at powers of two and at zero."""
    largest = numbers(name)[-1]
    edges = [largest, largest * (1 + 2**-20), largest * (1 - 2**-20), largest / 2, 1.75, 1.0, 0.0, 2.0**-140, 3e38]
    for edge in edges:
        x = torch.tensor([[edge, -edge / 3, edge / 1000]])
        values, factor = quantize(x, 1, FORMATS[name])
        assert values.float().isfinite().all() and factor.shape == (1, 1)
        assert float(factor).hex().startswith("0x1.0000000000000p"), "a power of two"
        if edge > 1e-30:
            assert largest / 2 <= values.float().abs().max() <= largest
            assert torch.equal(values.float() * factor, rounded(x, 1, name).float())


@pytest.mark.parametrize(("length", "dim"), [(70, 0), (64, 1), (5, 1)])
def test_a_block_of_mxfp8_has_a_scale_of_its_own(length: int, dim: int) -> None:
    x = torch.randn(length, 3) * torch.logspace(-9, 9, length)[:, None]
    x = x if dim == 0 else x.T
    found = Fp8Recipe("mxfp8").round("gradients", x, dim)
    blocks = [rounded(block, dim, "e4m3") for block in x.split(32, dim)]
    assert torch.equal(found.double(), torch.cat(blocks, dim))
    assert torch.equal(found.double(), rounded(x, dim, "e4m3")) == (length <= 32)


@pytest.mark.parametrize("broken", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dim", [0, 1, None])
def test_what_is_not_finite_stays_visible(broken: float, dim: int | None) -> None:
    x = torch.ones(3, 3)
    x[1, 1] = broken
    assert not round_to_fp8(x, dim)[1, 1].isfinite()


def test_ties_go_to_the_even_code() -> None:
    """448 keeps the scale at 1; 17 lies in the middle of 16 and 18, and 19 in that of 18 and 20."""
    assert round_to_fp8(torch.tensor([[448.0, 17.0, 19.0, -17.0]]), 1).tolist() == [[448.0, 16.0, 20.0, -16.0]]
    assert [nearest(x, "e4m3") for x in (17.0, 19.0)] == [16.0, 20.0]


# ---- one product


def run_product(x: Tensor, weight: Tensor, d_y: Tensor, recipe: Fp8Recipe) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = fp8_product(x, weight, recipe)
    y.backward(d_y)
    assert x.grad is not None and weight.grad is not None
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("operands", ["xwd", "x", "w", "d"])
@pytest.mark.parametrize("scaling", ["rowwise", "tensorwise"])
def test_product_and_gradients_equal_the_reference(scaling: str, operands: str, dtype: torch.dtype) -> None:
    x, weight, d_y = (torch.randn(shape).to(dtype) for shape in ((5, 6), (6, 4), (5, 4)))
    recipe = Fp8Recipe(scaling, tuple(OPERANDS[each] for each in operands))
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 0.005)
    expected = product_and_gradients(x, weight, d_y, scaling, tuple(operands))
    for found, exact in zip(run_product(x, weight, d_y, recipe), expected, strict=True):
        assert found.dtype == dtype
        assert_close(found, exact, tolerance, f"{scaling} {operands}")


@pytest.mark.parametrize(
    ("scaling", "most"),
    [
        ("rowwise", (0.045, 0.045, 0.045)),
        ("tensorwise", (0.05, 0.08, 0.08)),
        ("mxfp8", (0.045, 0.045, 0.045)),
    ],
)
def test_each_product_is_off_by_a_few_percent(scaling: str, most: tuple[float, ...]) -> None:
    """Three bits of mantissa leave 2.6% of each operand, so 3.8% of a product; two bits of a gradient leave more."""
    x, weight, d_y = torch.randn(64, 128), torch.randn(128, 96), torch.randn(64, 96)
    exact = x @ weight, d_y @ weight.T, x.T @ d_y
    for found, expected, bound in zip(run_product(x, weight, d_y, Fp8Recipe(scaling)), exact, most, strict=True):
        assert 0.02 < float((found - expected).norm() / expected.norm()) < bound


@pytest.mark.parametrize(
    ("operand", "changed"),
    [("activations", (True, False, True)), ("weights", (True, True, False)), ("gradients", (False, True, True))],
)
def test_an_operand_alone_changes_the_two_products_it_is_in(operand: str, changed: tuple[bool, ...]) -> None:
    x, weight, d_y = torch.randn(8, 16), torch.randn(16, 8), torch.randn(8, 8)
    exact = x @ weight, d_y @ weight.T, x.T @ d_y
    found = run_product(x, weight, d_y, Fp8Recipe(operands=(operand,)))
    for product, expected, is_changed in zip(found, exact, changed, strict=True):
        error = float((product - expected).norm() / expected.norm())
        assert (0.01 < error < 0.04) if is_changed else error < 1e-6


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, weight = torch.randn(3, 4), torch.randn(4, 5, requires_grad=True)
    fp8_product(x, weight, Fp8Recipe()).sum().backward()
    assert weight.grad is not None and x.grad is None
    assert not fp8_product(x, weight.detach(), Fp8Recipe()).requires_grad


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    y = fp8_product(x, torch.randn(4, 5, requires_grad=True), Fp8Recipe())
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scaling": "blockwise"}, r"scaling='blockwise': must be one of rowwise, tensorwise, mxfp8"),
        ({"operands": ()}, r"operands=\(\): must be one or more of activations, weights, gradients"),
        ({"operands": ("biases",)}, r"operands='biases': must be one of activations, weights, gradients"),
    ],
)
def test_bad_recipes(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fp8Recipe(**arguments)


# ---- experts

COUNTS = {
    "uneven": [7, 1, 3, 21],
    "some empty": [5, 0, 0, 4],
    "ends empty": [0, 6, 2, 0],
    "one row": [0, 1, 0, 0],
    "no rows": [0, 0, 0],
}


def run_backend(
    backend: Callable[..., Tensor] | str, counts: list[int], drawn: list[Tensor]
) -> tuple[Tensor, dict[str, Tensor | None]]:
    leaves = [each.clone().requires_grad_() for each in drawn]
    y = run_experts(*leaves, torch.tensor(counts), ACTIVATIONS["silu"], backend)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
    y.backward(upstream.to(y.dtype))
    return y.detach(), dict(zip(("rows", "gate_up", "down"), (leaf.grad for leaf in leaves), strict=True))


def draw(counts: list[int], dim: int, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = [(sum(counts), dim), (len(counts), dim, 2 * hidden), (len(counts), hidden, dim)]
    scales = (1.0, dim**-0.5, hidden**-0.5)
    return [(torch.randn(shape) * scale).to(dtype) for shape, scale in zip(shapes, scales, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", COUNTS)
def test_experts_are_as_if_each_were_alone(shape: str, dtype: torch.dtype) -> None:
    """So what a token and a weight get does not depend on the other experts' rows, and an idle expert gets zeros."""
    counts = COUNTS[shape]
    drawn = draw(counts, 12, 20, dtype)
    y, found = run_backend("fp8_emulated", counts, drawn)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    assert y.dtype == dtype
    for e, span in enumerate(torch.arange(sum(counts)).split(counts)):
        rows, gate_up, down = (each.clone().requires_grad_() for each in (drawn[0][span], drawn[1][e], drawn[2][e]))
        if not len(span):
            assert not found["gate_up"][e].any() and not found["down"][e].any()
            continue
        gate, up = fp8_product(rows, gate_up, Fp8Recipe()).chunk(2, -1)
        alone = fp8_product(ACTIVATIONS["silu"](gate) * up, down, Fp8Recipe())
        alone.backward(upstream[span])
        assert torch.equal(y[span], alone)
        assert_gradients(
            {"rows": found["rows"][span], "gate_up": found["gate_up"][e], "down": found["down"][e]},
            {"rows": rows.grad, "gate_up": gate_up.grad, "down": down.grad},
            0,
        )


def test_experts_are_off_by_a_few_percent_of_the_exact_ones() -> None:
    counts = [40, 0, 100, 12]
    drawn = draw(counts, 64, 96, torch.float32)
    (y, found), (exact, expected) = (run_backend(name, counts, drawn) for name in ("fp8_emulated", "loop"))
    for name, error in {"y": y - exact, **{n: found[n] - expected[n] for n in found}}.items():
        scale = exact if name == "y" else expected[name]
        assert 0.02 < float(error.norm() / scale.norm()) < 0.09, name


def test_under_autocast_gradients_have_the_dtype_of_the_weights() -> None:
    experts, rows = Experts(3, 16, 24, backend="fp8_emulated"), torch.randn(6, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(rows, torch.tensor([1, 0, 5]))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert experts.down_proj.grad is not None and experts.down_proj.grad.dtype == torch.float32
    assert rows.grad is not None and rows.grad.dtype == torch.float32


def test_vmap_is_refused() -> None:
    experts = Experts(2, 16, 16, backend="fp8_emulated")
    with pytest.raises(ValueError, match="under vmap it must be auto or grouped"):
        torch.vmap(lambda x: experts(x, torch.tensor([1, 1])))(torch.randn(3, 2, 16))


@pytest.mark.slow_but_for("arguments0")
@pytest.mark.parametrize("arguments", [{}, {"top_k": 2, "expert_bias": True, "score_function": "softmax"}])
def test_the_conformance_kit_passes_at_the_tolerance_of_8_bits(arguments: dict[str, object]) -> None:
    def make() -> MoEUnderTest:
        moe = MoE.build(16, 24, 4, backend="fp8_emulated", **arguments)
        return MoEUnderTest(moe, compute_dtype=torch.float8_e4m3fn)

    rows = [check.run(make) for check in moe_checks() if check.name != "compile"]
    assert {row.check: row.detail for row in rows if row.status == "fail"} == {}


# ---- the kernel's backend, with a slow kernel in its place


@pytest.mark.parametrize("counts", [[7, 1, 3, 21], [16, 32, 0, 16], [0, 0, 5, 0], [0, 17, 0, 0]])
def test_the_gpu_backend_pads_and_scales_as_the_emulation_does(counts: list[int]) -> None:
    """The reference kernel leaves nan in rows of no group, as torch's leaves anything there."""
    drawn = draw(counts, 32, 48, torch.bfloat16)
    y, found = run_backend(functools.partial(fp8, kernel=grouped_product), counts, drawn)
    expected, gradients = run_backend("fp8_emulated", counts, drawn)
    # a bf16 of the two that differs in its last bit can be another number of 8 bits
    assert_close(y, expected, 0.01, "rows out")
    for name, gradient in found.items():
        error = (gradient - gradients[name]).float().norm() / gradients[name].float().norm()
        assert error < 0.01, name
    idle = [not count for count in counts]
    assert [not bool(g.any()) for g in found["gate_up"]] == idle


def test_groups_are_multiples_of_16_and_no_row_is_lost() -> None:
    counts = torch.tensor([7, 0, 16, 33])
    groups = PaddedGroups.of(counts, 56)
    assert groups.ends.tolist() == [16, 32, 48, 96] and groups.ends.dtype == torch.int32
    assert groups.expert_of.numel() % MULTIPLE == 0
    rows = torch.randn(56, 3)
    padded = groups.pad(rows)
    assert torch.equal(padded[groups.places], rows)
    assert int(padded.any(dim=1).sum()) == 56
    assert torch.equal(groups.expert_of[groups.places], torch.arange(4).repeat_interleave(counts))


def test_torch_takes_the_layout_that_the_kernel_is_given() -> None:
    """On tensors without values, where torch checks shapes, strides and scales as its kernel does."""
    asked: list[tuple[torch.Size, ...]] = []

    def kernel(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, ends: Tensor) -> Tensor:
        asked.append((a.shape, b.shape))
        y: Tensor = torch._scaled_grouped_mm(a, b, scale_a, scale_b, offs=ends, out_dtype=torch.bfloat16)
        return y

    leaves = [each.to("meta").requires_grad_() for each in draw([5, 0, 20], 32, 48, torch.bfloat16)]
    y = fp8(*leaves, torch.tensor([5, 0, 20], device="meta"), ACTIVATIONS["silu"], kernel)
    y.backward(torch.empty_like(y))
    assert y.shape == (25, 32) and len(asked) == 6
    assert [leaf.grad is not None and leaf.grad.shape == leaf.shape for leaf in leaves] == [True] * 3


@pytest.mark.parametrize("autocast", [False, True])
def test_where_there_is_no_kernel_it_is_refused_by_name(autocast: bool) -> None:
    experts = Experts(2, 16, 16, backend="fp8")
    assert "backend=fp8" in repr(experts)
    message = r"backend='fp8': fp8 needs a GPU .*, not cpu; it must be fp8_emulated, which rounds alike on any device"
    with pytest.raises(ValueError, match=message), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        experts(torch.randn(4, 16), torch.tensor([1, 3]))


def test_nobody_gets_eight_bits_without_asking() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for device in ("cpu", "cuda", "mps"):
            assert "fp8" not in choose_backend(torch.device(device), dtype, 16, 16)[0]


# ---- whole models


def test_a_decoder_in_fp8_keeps_head_router_and_norms_exact() -> None:
    decoder = redraw(build_decoder(llama4_toy()))
    before = {name: type(part) for name, part in decoder.named_modules()}
    tokens = torch.randint(512, (2, 9))
    exact, weights = decoder(tokens).logits, list(decoder.state_dict())
    with emulating_fp8(decoder):
        changed = {name for name, part in decoder.named_modules() if isinstance(part, Fp8Linear)}
        assert list(decoder.state_dict()) == weights
        logits = decoder(tokens).logits
        logits.square().mean().backward()
    assert changed and not [name for name in changed if "router" in name or "head" in name or "norm" in name]
    assert {name.split(".")[-1] for name in changed} >= {"q_proj", "o_proj", "gate_proj", "down_proj"}
    assert 0.001 < ((logits - exact).norm() / exact.norm()).item() < 0.5
    assert all(p.grad is not None for p in decoder.parameters())
    assert {name: type(part) for name, part in decoder.named_modules()} == before
    assert torch.equal(decoder(tokens).logits, exact)


def test_each_linear_layer_is_the_product_with_its_transposed_weight_and_its_bias() -> None:
    linear, x = nn.Linear(6, 4), torch.randn(2, 3, 6)
    with emulating_fp8(linear, Fp8Recipe("tensorwise")):
        y = linear(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x).dtype == torch.bfloat16
        assert linear(x[:0]).shape == (0, 3, 4)
    expected = product_and_gradients(x.flatten(0, 1), linear.weight.detach().T, torch.zeros(6, 4), "tensorwise")[0]
    assert_close(y, expected.view(2, 3, 4) + linear.bias, 1e-6, "y")


def test_a_failure_within_leaves_the_model_as_it_was() -> None:
    moe = MoE.build(16, 24, 4)
    with pytest.raises(KeyError), emulating_fp8(moe):
        raise KeyError
    assert moe.experts.backend == "auto"
    assert not [part for part in moe.modules() if isinstance(part, Fp8Linear)]


def test_emulation_within_emulation_counts_inside() -> None:
    moe, x = MoE.build(16, 24, 4), torch.randn(5, 16)
    with emulating_fp8(moe, Fp8Recipe(operands=("weights",))):
        outer = moe(x)
        with emulating_fp8(moe):
            inner = moe(x)
        assert torch.equal(moe(x), outer)
    with emulating_fp8(moe):
        assert torch.equal(moe(x), inner)
    assert not torch.equal(inner, outer)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the tracer warns of what it does itself
def test_compiled_blocks_round_as_others_do() -> None:
    moe, x = MoE.build(16, 24, 4), torch.randn(5, 16)
    with emulating_fp8(moe):
        assert_close(torch.compile(moe, backend="eager")(x), moe(x), 1e-6, "y")


def test_torchao_rounds_alike() -> None:
    """The recipe that GPUs run, with torchao's own emulation."""
    float8 = pytest.importorskip("torchao.float8")
    ours, theirs, x = nn.Linear(32, 48), nn.Sequential(nn.Linear(32, 48)), torch.randn(16, 32)
    theirs[0].load_state_dict(ours.state_dict())
    recipe = float8.Float8LinearConfig.from_recipe_name("rowwise")
    object.__setattr__(recipe, "emulate", True)
    float8.convert_to_float8_training(theirs, config=recipe)
    results = []
    for layer, weight in ((ours, ours.weight), (theirs, theirs[0].weight)):
        leaf = x.clone().requires_grad_()
        with emulating_fp8(ours):
            y = layer(leaf)
            y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
        results.append((y, {"x": leaf.grad, "weight": weight.grad}))
    assert_close(results[0][0], results[1][0], 1e-6, "y")
    assert_gradients(results[0][1], results[1][1], 1e-5)


def test_hidden_linears_are_those_between_hidden_features() -> None:
    names = hidden_linears(build_decoder(llama4_toy()))
    assert "head" not in names and "layers.0.mixer.q_proj" in names
