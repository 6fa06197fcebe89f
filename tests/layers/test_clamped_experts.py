"""The experts of gpt-oss, against those of transformers."""

import pytest
import torch
from reference.comparing import assert_close, assert_gradients, redraw, run_with_gradients
from torch import Tensor
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from moesaic.layers import ClampedExperts, MoE, Parametrization, TopKRouter, emulating_fp8, parameter_kinds
from moesaic.layers.backend_choice import BackendName
from moesaic.layers.clamped_experts import BACKENDS_WITH_BIASES, choose_with_biases

EXPERTS, DIM, HIDDEN = 5, 16, 24
COUNTS = torch.tensor([3, 0, 4, 1, 2])


def build(backend: BackendName = "auto", dtype: torch.dtype = torch.float64) -> ClampedExperts:
    experts = ClampedExperts(EXPERTS, DIM, HIDDEN, alpha=1.3, limit=0.8, backend=backend, dtype=dtype)
    return redraw(experts)  # type: ignore[return-value]


def alternating(x: Tensor) -> Tensor:
    """Columns of gate and up as transformers stores them."""
    return x.unflatten(-1, (2, -1)).transpose(-2, -1).flatten(-2)


def theirs(ours: ClampedExperts) -> GptOssExperts:
    config = GptOssConfig(
        hidden_size=DIM, intermediate_size=HIDDEN, num_local_experts=EXPERTS, swiglu_alpha=1.3, swiglu_limit=0.8
    )
    config._experts_implementation = "eager"
    experts = GptOssExperts(config).to(ours.down_proj.dtype)
    state = ours.state_dict()
    experts.load_state_dict(state | {name: alternating(x) for name, x in state.items() if name.startswith("gate_up")})
    return experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS_WITH_BIASES)
def test_equal_transformers_experts(backend: BackendName, dtype: torch.dtype) -> None:
    ours = build(backend, dtype)
    oracle, rows = theirs(ours), torch.randn(10, DIM, dtype=dtype)
    ids = torch.arange(EXPERTS).repeat_interleave(COUNTS)[:, None]
    found, gradients = run_with_gradients(lambda: ours(rows, COUNTS), ours)
    expected, expected_gradients = run_with_gradients(lambda: oracle(rows, ids, torch.ones(10, 1, dtype=dtype)), oracle)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert_close(found, expected, tolerance, "output")
    named = {
        name: alternating(g) if name.startswith("gate_up") and g is not None else g for name, g in gradients.items()
    }
    assert_gradients(named, expected_gradients, tolerance)


@pytest.mark.parametrize("backend", BACKENDS_WITH_BIASES)
def test_no_rows_give_zero_gradients(backend: BackendName) -> None:
    ours = build(backend)
    ours(torch.randn(0, DIM, dtype=torch.float64), torch.zeros_like(COUNTS)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())


def test_backends_and_what_they_give_way_to() -> None:
    rows = torch.randn(10, DIM)
    chosen = {backend: choose_with_biases(rows, HIDDEN, backend) for backend in BACKENDS_WITH_BIASES}
    assert chosen == {"auto": "grouped", "loop": "loop", "padded": "padded", "grouped": "grouped"}
    assert choose_with_biases(rows[:, :3], HIDDEN, "auto") == "loop"  # 12 bytes are no multiple of 16
    assert choose_with_biases(rows.double(), HIDDEN, "grouped") == "loop"


@pytest.mark.parametrize("backend", ["sliced", "sliced_recompute", "fp8", "fp8_emulated"])
def test_backends_without_place_for_biases_are_refused(backend: BackendName) -> None:
    with pytest.raises(ValueError, match=f"backend='{backend}': must be one of auto, loop, padded, grouped"):
        build(backend)


def test_emulated_fp8_is_refused() -> None:
    ours = build()
    with emulating_fp8(ours), pytest.raises(ValueError, match="must be one of auto, loop, padded, grouped"):
        ours(torch.randn(10, DIM, dtype=torch.float64), COUNTS)


@pytest.mark.parametrize("backend", BACKENDS_WITH_BIASES)
def test_autocast_computes_in_bfloat16(backend: BackendName) -> None:
    ours, rows = build(backend, torch.float32), torch.randn(10, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(rows, COUNTS)
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), ours(rows, COUNTS), 3e-2, "output")
    found.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ours.parameters())


def test_biases_are_vectors_that_begin_at_zero() -> None:
    ours = build()
    ours.initialize(Parametrization(0.02))
    kinds = parameter_kinds(ours)
    for name, parameter in ours.named_parameters():
        assert kinds[name] == ("vector" if name.endswith("bias") else "matrix")
        assert bool(parameter.any()) != name.endswith("bias")


def test_a_layer_with_them_counts_what_a_token_meets() -> None:
    moe = MoE(router=TopKRouter(DIM, EXPERTS, top_k=2, bias=True), experts=build(), score_before_experts=False)
    one = 3 * DIM * HIDDEN + 2 * HIDDEN + DIM
    assert moe.active_parameters() == EXPERTS * (DIM + 1) + 2 * one
    assert moe.flops_per_token(16) == 2 * (EXPERTS * DIM + 2 * 3 * DIM * HIDDEN)
