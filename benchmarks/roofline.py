"""How far from what the machine can do: matmul rates by rows, bandwidth, and where the layers stand between them.

    python -m benchmarks.roofline [--smoke] [--output results.jsonl]

"matmul": (rows, 256) @ (256, 2048), new weights at every call, as experts have them: below about 256 rows a product of
matrices is slower per row, whoever calls it. "copy": bytes read and written per second. Then the dense limit and the
MoE layer, forward and with backward; ratio is the time over the floor of the roofline, max(FLOPs / fastest matmul,
bytes / copy rate), with the bytes that no implementation can avoid: weights, tokens in and out; with a backward weights
once more, and all gradients.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .harness import Measurement, Options, Progress, finish, parse_options, print_table, quantiles, time_in_turn
from .layer import benchmark_layer
from .limit import PASSES, DenseSwiGLU, Precision, precisions_to_time

__all__ = ["main", "measure"]


@dataclasses.dataclass(frozen=True)
class Sizes:
    dim: int
    hidden_dim: int
    tokens: int
    experts: list[int]
    rows: list[int]
    copied: int
    """Elements of the tensor to copy."""


def sizes_for(options: Options) -> Sizes:
    if options.smoke:
        return Sizes(32, 32, 64, [2, 4], [16, 64], 10_000)
    if options.device.type == "cuda":
        return Sizes(2048, 4096, 16_384, [8, 16, 32, 64, 128], [128, 256, 512, 1024, 2048, 16_384], 500_000_000)
    return Sizes(256, 1024, 2048, [4, 8, 16, 32, 64, 128], [16, 32, 64, 128, 256, 512, 2048], 50_000_000)


def measure(options: Options) -> Iterator[Measurement]:
    sizes = sizes_for(options)
    progress = Progress("roofline", (len(sizes.rows) * 3 + 1 + (len(sizes.experts) + 1) * 2 * 3) * options.rounds)
    source = torch.zeros(sizes.copied, device=options.device)
    target = torch.zeros_like(source)
    samples = time_in_turn({"copy": functools.partial(target.copy_, source)}, options, tell=progress)["copy"]
    bandwidth = 2 * source.nbytes / quantiles(samples)[1]
    note = f"{bandwidth / 1e9:.1f} GB/s read and written"
    yield Measurement("roofline", "copy", {"bytes": 2 * source.nbytes}, "fp32", "copy", quantiles(samples), note=note)
    del source, target
    peaks: dict[torch.dtype, float] = {}
    for precision in precisions_to_time(options):
        dtype = torch.bfloat16 if precision.autocast else precision.dtype
        if dtype not in peaks:
            rows = list(matmul_rates(options, sizes, dtype, progress))
            yield from rows
            peaks[dtype] = max((row.flops or 0) / row.seconds[1] for row in rows if row.seconds)
        for row in layers(options, sizes, precision, progress):
            assert row.seconds and row.flops
            floor = max(row.flops / peaks[dtype], row.shape["bytes"] / bandwidth)
            yield dataclasses.replace(row, ratio=row.seconds[1] / floor, ratio_to="roofline")


def matmul_rates(options: Options, sizes: Sizes, dtype: torch.dtype, tell: Callable[[], None]) -> Iterator[Measurement]:
    calls: dict[str, Callable[[], Any]] = {}
    number = 2 if options.smoke else 12  # more than caches hold
    weights = torch.randn(number, sizes.dim, 2 * sizes.hidden_dim, device=options.device, dtype=dtype)

    def all_weights(x: Tensor, out: Tensor) -> None:
        for weight in weights:
            torch.mm(x, weight, out=out)

    for rows in sizes.rows:
        x = torch.randn(rows, sizes.dim, device=options.device, dtype=dtype)
        calls[str(rows)] = functools.partial(all_weights, x, x.new_empty(rows, 2 * sizes.hidden_dim))
    measured = time_in_turn(calls, options, min_seconds=0.02, tell=tell)
    for rows in sizes.rows:
        flops = 4.0 * rows * sizes.dim * sizes.hidden_dim
        seconds = [s / number for s in quantiles(measured[str(rows)])]
        shape = {"rows": rows, "dim": sizes.dim, "hidden_dim": sizes.hidden_dim}
        note = f"{flops / seconds[1] / 1e9:.0f} GFLOP/s"
        name = "fp32" if dtype == torch.float32 else "bf16"
        yield Measurement("roofline", f"matmul of {rows} rows", shape, name, "matmul", seconds, flops=flops, note=note)


def layers(options: Options, sizes: Sizes, precision: Precision, tell: Callable[[], None]) -> Iterator[Measurement]:
    torch.manual_seed(0)
    made: dict[str, torch.nn.Module] = {"dense": DenseSwiGLU(sizes.dim, 2 * sizes.hidden_dim).to(precision.dtype)}
    for experts in sizes.experts:
        made[f"MoE of {experts}"] = benchmark_layer(sizes.dim, sizes.hidden_dim, experts, dtype=precision.dtype)
    x = torch.randn(sizes.tokens, sizes.dim, device=options.device, dtype=precision.dtype).requires_grad_()
    for what, run in PASSES.items():
        calls = {n: functools.partial(run, layer.to(options.device), x, precision) for n, layer in made.items()}
        samples = time_in_turn(calls, options, min_seconds=0.02, tell=tell)
        for name, layer in made.items():
            weights = sum(p.nbytes for p in layer.parameters())
            moved = weights + 2 * x.nbytes if what == "forward" else 3 * weights + 5 * x.nbytes
            flops = DenseSwiGLU.flops(made["dense"], sizes.tokens) * (1 if what == "forward" else 3)  # type: ignore[arg-type]
            shape = {"dim": sizes.dim, "hidden_dim": sizes.hidden_dim, "tokens": sizes.tokens, "bytes": moved}
            yield Measurement("roofline", name, shape, precision.name, what, quantiles(samples[name]), flops=flops)


def report(rows: Sequence[Measurement]) -> None:
    print_table(
        "matmuls and copies",
        ["", "dtype", "rate"],
        [[row.variant, row.dtype, row.note] for row in rows if row.ratio is None],
    )
    lines = []
    for row in rows:
        if row.ratio is not None and row.seconds and row.flops:
            intensity, rate = row.flops / row.shape["bytes"], row.flops / row.seconds[1]
            cells = [f"{intensity:.0f}", f"{rate / 1e9:.0f}", f"{row.ratio:.2f}"]
            lines.append([row.variant, row.dtype, row.what, *cells])
    print_table("layers", ["", "dtype", "", "FLOPs per byte", "GFLOP/s", "time / floor"], lines)


def main(arguments: Sequence[str] | None = None) -> list[Measurement]:
    options, _ = parse_options(__doc__ or "", arguments)
    rows = finish(measure(options), options)
    report(rows)
    return rows


if __name__ == "__main__":
    main()
