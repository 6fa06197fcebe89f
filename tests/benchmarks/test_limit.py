"""The limit does the FLOPs it says, and layers are held against it as the rows claim."""

import math
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import limit
from benchmarks.harness import Measurement, Options, parse_options
from benchmarks.limit import PRECISIONS, DenseSwiGLU, Precision, compare
from moesaic.layers import FeedForward

FP32, BF16, MIXED = PRECISIONS


@pytest.fixture
def options() -> Iterator[Options]:
    threads = torch.get_num_threads()
    yield parse_options("", ["--rounds", "3", "--device", "cpu"])[0]
    torch.set_num_threads(threads)


def rows_of(layers: dict[str, nn.Module], precision: Precision, options: Options) -> dict[tuple[str, str], Measurement]:
    x = torch.randn(64, 32, dtype=precision.dtype).requires_grad_()
    row = Measurement("test", "", {}, "", "", flops=100.0)
    rows = compare(layers, x, precision, options, row, notes={"other": "said"}, tell=lambda: None)
    return {(row.variant, row.what): row for row in rows}


def test_the_limit_is_the_sum_of_the_experts_that_a_token_meets() -> None:
    experts = [FeedForward(16, 24), FeedForward(16, 24)]
    dense = DenseSwiGLU(16, 48)
    with torch.no_grad():
        gates_and_ups = [e.gate_proj.weight for e in experts] + [e.up_proj.weight for e in experts]
        dense.gate_up.weight.copy_(torch.cat(gates_and_ups))
        dense.down.weight.copy_(torch.cat([e.down_proj.weight for e in experts], dim=1))
    x = torch.randn(5, 16)
    torch.testing.assert_close(dense(x), experts[0](x) + experts[1](x))


def test_flops_are_those_that_torch_counts(options: Options) -> None:
    dense, x = DenseSwiGLU(32, 48), torch.randn(64, 32).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        limit.forward(dense, x, FP32)
    assert counter.get_total_flops() == dense.flops(64)
    with FlopCounterMode(display=False) as counter:
        dense(x).sum().backward()
    assert counter.get_total_flops() == 3 * dense.flops(64)
    rows = rows_of({"dense": dense}, FP32, options)
    assert rows["dense", "forward+backward"].flops == 3 * rows["dense", "forward"].flops == 300.0  # type: ignore[operator]


def test_gradients_are_made_anew_and_the_precision_is_what_it_says() -> None:
    seen: list[torch.dtype] = []

    class Spy(DenseSwiGLU):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            seen.append(y.dtype)
            return y

    for precision in PRECISIONS:
        layer = Spy(32, 48).to(precision.dtype)
        x = torch.randn(4, 32, dtype=precision.dtype).requires_grad_()
        limit.forward(layer, x, precision)
        limit.forward_backward(layer, x, precision)
        assert [p.grad for p in (x, *layer.parameters())] == [None] * 3
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 4


@pytest.mark.slow_but_for("fp32")
@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda precision: precision.name)
def test_rows_hold_time_memory_and_notes(precision: Precision, options: Options) -> None:
    dense, other = (DenseSwiGLU(32, width).to(precision.dtype) for width in (48, 96))
    rows = rows_of({"dense": dense, "other": other}, precision, options)
    found = {name for name, _ in rows}
    assert found == {"dense", "other"} | ({"dense in fp32"} if precision.autocast else set())
    for name, layer in (("dense", dense), ("other", other)):
        before, after = rows[name, "forward"], rows[name, "forward+backward"]
        assert before.activation_bytes == before.peak_bytes
        assert before.peak_bytes and after.peak_bytes and after.activation_bytes
        assert after.activation_bytes < after.peak_bytes
        if not precision.autocast:  # gate and up, the gate activated, the product; and the output
            kept_per_token = (4 * layer.width + 32) * precision.dtype.itemsize
            assert after.activation_bytes == pytest.approx(kept_per_token * 64, abs=100)
    for what in ("forward", "forward+backward"):
        assert rows["dense", what].ratio == 1
        row = rows["other", what]
        assert row.seconds and row.ratio == pytest.approx(row.seconds[1] / rows["dense", what].seconds[1])  # type: ignore[index]
        assert row.note.startswith("said")
        if precision.autocast:
            in_fp32 = rows["dense in fp32", what]
            assert in_fp32.seconds
            stated = float(row.note.removeprefix("said; ").removesuffix("x the limit in fp32"))
            assert stated == pytest.approx(row.seconds[1] / in_fp32.seconds[1], abs=0.0051)


def test_what_raises_is_a_row_that_says_so(options: Options) -> None:
    class NoBackward(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach()

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise NotImplementedError

    layers = {"dense": DenseSwiGLU(32, 48), "inference only": NoBackward(), "broken": Broken()}
    rows = rows_of(layers, FP32, options)
    assert rows["inference only", "forward"].seconds
    assert rows["inference only", "forward+backward"].seconds is None
    assert "does not require grad" in rows["inference only", "forward+backward"].note
    assert rows["broken", "forward"].note == "not run: NotImplementedError"


@pytest.mark.slow
def test_what_is_slow_is_timed_once(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Slow(DenseSwiGLU):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(time.process_time())
            while time.process_time() < calls[-1] + 0.05:
                pass
            return super().forward(x)

    layers = {"dense": DenseSwiGLU(32, 48), "slow": Slow(32, 48)}
    rows = rows_of(layers, FP32, options)
    assert "timed once" not in rows["slow", "forward"].note, "0.05 s are within patience"
    calls.clear()
    monkeypatch.setattr(limit, "PATIENCE", 0.02)
    rows = rows_of(layers, FP32, options)
    assert len(calls) == 2 * 4 + 1, "once for the peak, twice for warming up, and once; once for what is held"
    row = rows["slow", "forward"]
    assert row.note == "timed once" and row.ratio and row.ratio > 4
    assert row.seconds and math.isclose(row.seconds[0], row.seconds[2])
    assert "timed once" not in rows["dense", "forward"].note
