"""How does a MoE grow with the number of experts, of tokens and of blocks, at fixed active FLOPs per token?

    python -m benchmarks.scaling [--smoke] [--device cuda] [--output results.jsonl]

Four sweeps: the number of experts on the same tokens (each gets fewer) and with as many tokens for each expert (the
batch grows), the number of tokens on the same experts, and the depth of a decoder of MoE blocks against its dense twin
of equal active FLOPs (`dense_twin=True`). One layer is top-1 with a shared expert, its limit as in `benchmarks.limit`.
Ideal is a flat line: the ratio to the limit does not change along a sweep, nor does the time per token and block (which
compares points measured one after the other, not in turn).
"""

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from moesaic.models import DecoderConfig, MoEConfig, account, build_decoder, llama4_toy

from .harness import Measurement, Options, Progress, finish, parse_options, print_table
from .layer import benchmark_layer
from .limit import PASSES, DenseSwiGLU, Precision, compare, forward, precisions_to_time

__all__ = ["SWEEPS", "Point", "main", "measure"]

SWEEPS = ("experts", "experts and tokens", "tokens", "depth")


@dataclasses.dataclass(frozen=True)
class Point:
    sweep: str  # one of SWEEPS
    experts: int
    tokens: int
    dim: int
    hidden_dim: int
    depth: int = 0
    """Blocks of a decoder; 0: one layer by itself."""
    length: int = 0
    """Of a decoder's sequences."""

    def config(self) -> DecoderConfig:
        """The toy in this size, every block with a MoE."""
        toy = llama4_toy()
        head_dim = self.dim // toy.attention.num_heads
        return dataclasses.replace(
            toy,
            dim=self.dim,
            num_layers=self.depth,
            attention=dataclasses.replace(toy.attention, head_dim=head_dim, attention_chunk_size=self.length),
            moe=MoEConfig(num_experts=self.experts, hidden_dim=self.hidden_dim),
            interleave_moe_layer_step=1,
        )

    def build(self, device: torch.device, dtype: torch.dtype) -> tuple[dict[str, nn.Module], Tensor, float]:
        """The MoE and its limit, an input, and the active FLOPs of a forward pass of the limit."""
        torch.manual_seed(0)
        limit: nn.Module
        moe: nn.Module
        if self.depth:
            config = self.config()
            twin = dataclasses.replace(config, dense_twin=True)
            moe, limit = build_decoder(config, dtype=dtype), build_decoder(twin, dtype=dtype)
            x = torch.randint(config.vocab_size, (self.tokens // self.length, self.length))
            flops = account(twin, self.length).forward_flops * self.tokens
        else:
            moe = benchmark_layer(self.dim, self.hidden_dim, self.experts, dtype=dtype)
            limit = DenseSwiGLU(self.dim, 2 * self.hidden_dim).to(dtype)
            x = torch.randn(self.tokens, self.dim, dtype=dtype).requires_grad_()
            flops = limit.flops(self.tokens)
        x = x.to(device).detach().requires_grad_(x.requires_grad)
        return {"dense": limit.to(device), "MoE": moe.to(device)}, x, flops


def require_finite(layers: dict[str, nn.Module], x: Tensor, precision: Precision) -> None:
    """All that two different functions can be held to; the tests hold the layers to more."""
    for name, layer in layers.items():
        if not bool(forward(layer, x, precision).isfinite().all()):
            raise SystemExit(f"{name} is not finite: not a benchmark")


def measure(options: Options) -> Iterator[Measurement]:
    points = points_for(options)
    precisions = precisions_to_time(options)
    progress = Progress("scaling", len(points) * len(precisions) * len(PASSES) * 2 * options.rounds)
    for precision in precisions:
        for point in points:
            layers, x, flops = point.build(options.device, precision.dtype)
            require_finite(layers, x, precision)
            row = Measurement("scaling", "", dataclasses.asdict(point), precision.name, "", flops=flops)
            yield from compare(layers, x, precision, options, row, notes={}, tell=progress)


def points_for(options: Options) -> list[Point]:
    if options.smoke:
        dim, hidden_dim, tokens, numbers, fixed = 32, 32, 32, [2, 4], 4
        depths, decoder = [1, 2], {"experts": 4, "tokens": 32, "dim": 32, "hidden_dim": 32, "length": 16}
    elif options.device.type == "cuda":
        dim, hidden_dim, tokens, numbers, fixed = 2048, 4096, 16_384, [4, 8, 16, 32, 64], 16
        depths = [1, 2, 4, 8]
        decoder = {"experts": 16, "tokens": 16_384, "dim": 1024, "hidden_dim": 2048, "length": 2048}
    else:
        dim, hidden_dim, tokens, numbers, fixed = 256, 512, 1024, [2, 4, 8, 16, 32], 8
        depths, decoder = [1, 2, 4, 8], {"experts": 4, "tokens": 512, "dim": 128, "hidden_dim": 256, "length": 128}
    middle = len(numbers) // 2
    layer = {"dim": dim, "hidden_dim": hidden_dim}
    points = [Point("experts", e, tokens, **layer) for e in numbers]
    # as many for each expert as the middle of the sweep before has
    points += [Point("experts and tokens", e, tokens // numbers[middle] * e, **layer) for e in numbers[: middle + 2]]
    points += [Point("tokens", fixed, tokens * 2**i // 4, **layer) for i in range(4)]
    return points + [Point("depth", depth=depth, **decoder) for depth in depths]


def report(rows: Sequence[Measurement]) -> None:
    lines = []
    first: dict[tuple[str, str, str], float] = {}
    limits = {(*row.shape.items(), row.dtype, row.what): row for row in rows if row.variant == "dense"}
    for row in rows:
        if row.variant != "MoE" or row.seconds is None or row.ratio is None:
            continue
        limit = limits[(*row.shape.items(), row.dtype, row.what)]
        each = row.seconds[1] / row.shape["tokens"] / max(1, row.shape["depth"])
        slope = each / first.setdefault((row.shape["sweep"], row.dtype, row.what), each)
        memory = (row.activation_bytes or 0) / max(1, limit.activation_bytes or 0)
        sizes = [str(row.shape[key]) for key in ("experts", "tokens", "depth")]
        cells = [f"{row.ratio:.2f}", f"{memory:.2f}", f"{slope:.2f}"]
        lines.append([row.shape["sweep"], row.dtype, row.what, *sizes, *cells])
    groups = list(first)
    lines.sort(key=lambda line: (SWEEPS.index(line[0]), groups.index(tuple(line[:3]))))
    header = [
        "sweep",
        "dtype",
        "",
        "experts",
        "tokens",
        "depth",
        "time / limit",
        "memory / limit",
        "per token and block",
    ]
    print_table("ideal is a flat line; the last column is relative to the first point of its sweep", header, lines)


def main(arguments: Sequence[str] | None = None) -> list[Measurement]:
    options, _ = parse_options(__doc__ or "", arguments)
    rows = finish(measure(options), options)
    report(rows)
    return rows


if __name__ == "__main__":
    main()
