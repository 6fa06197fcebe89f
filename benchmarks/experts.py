"""What do the expert backends and the whole MoE layer cost against a dense layer, and what do uneven loads do to them?

    python -m benchmarks.experts [--smoke] [--device cuda] [--output results.jsonl]

"experts": every exact backend of `moesaic.layers.BACKENDS` on rows sorted by expert; "layer": a top-1 MoE with a shared
expert, router and dispatch included, on the backend that it chooses. Both over the number of experts, which falls as
the rows of each one rise, and over loads: every expert as many rows, Zipf's (the i-th expert 1/i), one expert 40 % of
the rows, one expert all of them (on a CPU the layer in fp32 only, to save time). Ratios are to the limit, see
`benchmarks.limit`; notes give those to the even load.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from moesaic.layers import BACKENDS, Experts, FeedForward, MoE, TopKRouter, choose_backend
from moesaic.layers.backend_choice import ROUNDING_BACKENDS

from .harness import Measurement, Options, Progress, finish, parse_options
from .limit import (
    PASSES,
    DenseSwiGLU,
    Precision,
    compare,
    forward,
    precisions_to_time,
    print_ratios,
)

__all__ = ["EXACT", "LOADS", "Shape", "main", "measure"]

EXACT = [name for name in BACKENDS if name not in ROUNDING_BACKENDS]


def even(rows: int, experts: int) -> Tensor:
    return spread(torch.ones(experts), rows)


def zipf(rows: int, experts: int) -> Tensor:
    return spread(1 / torch.arange(1, experts + 1), rows)


def one_with_40_percent(rows: int, experts: int) -> Tensor:
    return spread(torch.tensor([0.4] + [0.6 / (experts - 1)] * (experts - 1)), rows)


def collapsed(rows: int, experts: int) -> Tensor:
    return spread(torch.tensor([1.0] + [0.0] * (experts - 1)), rows)


def spread(shares: Tensor, rows: int) -> Tensor:
    """Whole numbers (E,) in proportion to `shares` that sum to `rows`; what rounding leaves goes to the first ones."""
    counts = (shares / shares.sum() * rows).long()
    counts[: rows - int(counts.sum())] += 1
    return counts


LOADS: dict[str, Callable[[int, int], Tensor]] = {
    "even": even,
    "zipf": zipf,
    "one with 40%": one_with_40_percent,
    "collapsed": collapsed,
}


@dataclasses.dataclass(frozen=True)
class Shape:
    part: str  # "experts" or "layer"
    experts: int
    rows: int
    dim: int
    hidden_dim: int
    load: str = "even"

    def rows_per_expert(self) -> Tensor:
        return LOADS[self.load](self.rows, self.experts)

    def described(self) -> dict[str, object]:
        return {**dataclasses.asdict(self), "rows_each": self.rows // self.experts}


class SortedRows(nn.Module):
    """Experts on rows that a dispatcher has sorted: rows (R, D) -> (R, D)."""

    def __init__(self, experts: Experts, rows_per_expert: Tensor) -> None:
        super().__init__()
        self.experts, self.rows_per_expert = experts, nn.Buffer(rows_per_expert)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.rows_per_expert)


class GivenLoad(TopKRouter):
    """Top-1, chooses as any router does, and then sends as many tokens to each expert as it was told to."""

    def __init__(self, dim: int, rows_per_expert: Tensor) -> None:
        super().__init__(dim, rows_per_expert.numel())
        ids = torch.arange(rows_per_expert.numel()).repeat_interleave(rows_per_expert)
        order = torch.randperm(ids.numel(), generator=torch.Generator().manual_seed(0))
        self.expert_ids = nn.Buffer(ids[order][:, None])

    def select(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        super().select(logits, probabilities)
        return self.expert_ids


def build(shape: Shape, precision: Precision, device: torch.device) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers by name, and why others are missing."""
    dim, hidden_dim, counts = shape.dim, shape.hidden_dim, shape.rows_per_expert()
    layers: dict[str, nn.Module] = {}
    missing: dict[str, str] = {}
    if shape.part == "layer":
        layers["dense"] = DenseSwiGLU(dim, 2 * hidden_dim)
        layers["MoE"] = MoE(
            router=GivenLoad(dim, counts),
            experts=Experts(shape.experts, dim, hidden_dim),
            shared_expert=FeedForward(dim, hidden_dim),
        )
    else:
        layers["dense"] = DenseSwiGLU(dim, hidden_dim)
        weights = Experts(shape.experts, dim, hidden_dim)
        matmul_dtype = torch.bfloat16 if precision.autocast else precision.dtype
        for name in EXACT:
            runs, why = choose_backend(device, matmul_dtype, dim, hidden_dim, name)
            if runs != name:
                missing[name] = why
                continue
            experts = copy.deepcopy(weights, {id(p): p for p in weights.parameters()})  # the same parameters
            experts.backend = name
            layers[name] = SortedRows(experts, counts)
    # one call for all, so that what is shared stays shared
    nn.ModuleList(layers.values()).to(device=device, dtype=precision.dtype)
    return layers, missing


@torch.no_grad()
def require_agreement(layers: dict[str, nn.Module], x: Tensor, precision: Precision) -> None:
    """A ratio between different results would mean nothing; the oracle is the loop over experts in float64."""
    expected = None
    for name, layer in layers.items():
        if isinstance(layer, DenseSwiGLU):
            continue
        if expected is None:
            oracle = copy.deepcopy(layer).double()
            oracle.experts.backend = "loop"  # type: ignore[union-attr]
            expected = oracle(x.double())
        error = ((forward(layer, x, precision).double() - expected).norm() / expected.norm()).item()
        if not error < precision.tolerance:
            raise SystemExit(f"{name} is off by {error:.1e} (relative): not a benchmark")


def measure(options: Options) -> Iterator[Measurement]:
    cells = {precision: shapes_for(options, precision) for precision in precisions_to_time(options)}
    total = sum(len(PASSES) * (1 + len(EXACT)) * len(shapes) for shapes in cells.values())
    progress = Progress("experts", total * options.rounds)
    even_ratios: dict[tuple[object, ...], float] = {}
    for precision, shapes in cells.items():
        for shape in shapes:
            torch.manual_seed(0)
            layers, missing = build(shape, precision, options.device)
            x = torch.randn(shape.rows, shape.dim, device=options.device, dtype=precision.dtype).requires_grad_()
            require_agreement(layers, x, precision)
            limit = layers["dense"]
            assert isinstance(limit, DenseSwiGLU)
            row = Measurement("experts", "", shape.described(), precision.name, "", flops=limit.flops(shape.rows))
            for measured in compare(layers, x, precision, options, row, notes={}, tell=progress):
                key = (shape.part, shape.experts, shape.rows, measured.dtype, measured.what, measured.variant)
                note = measured.note
                if measured.ratio is not None and shape.load == "even":
                    even_ratios[key] = measured.ratio
                elif measured.ratio is not None and key in even_ratios and not measured.variant.startswith("dense"):
                    note = "; ".join(filter(None, [note, f"{measured.ratio / even_ratios[key]:.2f}x its even load"]))
                yield dataclasses.replace(measured, note=note)
            for name, why in missing.items():
                for what in PASSES:
                    yield dataclasses.replace(row, variant=name, what=what, flops=None, note=f"not run: {why}")


def shapes_for(options: Options, precision: Precision) -> list[Shape]:
    """The even load of a shape comes before its others."""
    if options.smoke:
        rows, dim, hidden_dim, numbers, loaded = 64, 32, 48, [4, 8], 8
    elif options.device.type == "cuda":
        rows, dim, hidden_dim, numbers, loaded = 16_384, 2048, 4096, [128, 64, 32, 16, 8], 16
    else:
        rows, dim, hidden_dim, numbers, loaded = 2048, 256, 1024, [128, 64, 32, 16, 8], 16
    alone = [e // 2 for e in numbers[1::2]]  # half of the rows and experts: the same rows for each, in half of the time
    shapes = [Shape("layer", e, rows, dim, hidden_dim) for e in numbers]
    shapes += [Shape("experts", e, rows // 2, dim, hidden_dim) for e in alone]
    # do more tokens do what fewer experts do?
    shapes.append(Shape("layer", 4 * loaded, 4 * rows, dim, hidden_dim))
    if options.smoke or options.device.type == "cuda" or precision.name == "fp32":
        sizes = [("layer", loaded, rows)]
        if options.smoke or options.device.type == "cuda":
            sizes.append(("experts", alone[len(alone) // 2], rows // 2))
        uneven = [load for load in LOADS if load != "even"]
        shapes += [Shape(part, e, r, dim, hidden_dim, load) for part, e, r in sizes for load in uneven]
    return shapes


def report(rows: Sequence[Measurement]) -> None:
    for part in ("experts", "layer"):
        print_ratios(
            "sorted rows through the experts" if part == "experts" else "top-1 MoE with a shared expert",
            [row for row in rows if row.shape["part"] == part],
            ["experts", "rows", "rows_each", "load"],
        )


def main(arguments: Sequence[str] | None = None) -> list[Measurement]:
    options, _ = parse_options(__doc__ or "", arguments)
    rows = finish(measure(options), options)
    report(rows)
    return rows


if __name__ == "__main__":
    main()
