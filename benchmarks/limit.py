"""The limit for a MoE layer, and how layers are held against it; shared by several benchmarks.

The limit ("dense") is one SwiGLU as wide as what a token meets in the MoE layer, top_k * F + shared F, on the same
tokens: two matmuls, gate and up in one, eager. It does the active FLOPs of the layer and neither routes nor sorts.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .harness import (
    Measurement,
    Options,
    bf16_obstacle,
    held_memory,
    peak_memory,
    print_table,
    quantiles,
    time_in_turn,
)

__all__ = [
    "DENSE",
    "PASSES",
    "PRECISIONS",
    "DenseSwiGLU",
    "Precision",
    "compare",
    "forward",
    "forward_backward",
    "output_of",
    "precisions_to_time",
    "print_ratios",
    "reason",
]

DENSE, DENSE_FP32 = "dense", "dense in fp32"

PATIENCE = 0.3
"""Seconds: what takes longer in one call, and four times as long as the limit, is timed once."""


@dataclasses.dataclass(frozen=True)
class Precision:
    name: str
    dtype: torch.dtype
    """Of parameters and tokens."""
    autocast: bool = False
    """Matmuls in bf16 all the same."""
    tolerance: float = 0.05
    """Relative error at which an output is still the same."""

    def __call__(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.autocast)


FP32 = Precision("fp32", torch.float32, tolerance=1e-4)
PRECISIONS = (FP32, Precision("bf16", torch.bfloat16), Precision("mixed", torch.float32, autocast=True))


def precisions_to_time(options: Options) -> tuple[Precision, ...]:
    """`PRECISIONS` without what `bf16_obstacle` is in the way of."""
    return (FP32,) if bf16_obstacle(options) else PRECISIONS


class DenseSwiGLU(nn.Module):
    """x (..., dim) -> (..., dim)."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.gate_up = nn.Linear(dim, 2 * width, bias=False)
        self.down = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)

    def flops(self, tokens: int) -> float:
        """Of a forward pass; a multiply-add counts as two."""
        return 6.0 * tokens * self.gate_up.in_features * self.width


def output_of(layer: nn.Module, x: Tensor) -> Tensor:
    y = layer(x)
    return y[0] if isinstance(y, tuple) else y


def forward(layer: nn.Module, x: Tensor, precision: Precision) -> Tensor:
    with torch.no_grad(), precision(x.device):
        return output_of(layer, x)


def with_graph(layer: nn.Module, x: Tensor, precision: Precision) -> Tensor:
    with precision(x.device):
        return output_of(layer, x)


def forward_backward(layer: nn.Module, x: Tensor, precision: Precision) -> None:
    """Gradients of everything that wants one, in new memory."""
    y = with_graph(layer, x, precision)
    wanted = [tensor for tensor in (x, *layer.parameters()) if tensor.requires_grad]
    torch.autograd.grad(y, wanted, torch.ones_like(y), allow_unused=True)  # an expert without tokens may be unused


PASSES: dict[str, Callable[[nn.Module, Tensor, Precision], Any]] = {
    "forward": forward,
    "forward+backward": forward_backward,
}


def compare(
    layers: Mapping[str, nn.Module],
    x: Tensor,
    precision: Precision,
    options: Options,
    row: Measurement,
    *,
    notes: Mapping[str, str],
    tell: Callable[[], None],
) -> Iterator[Measurement]:
    """Time and memory of the layers, one of them "dense", as ratios to it; both passes.

    In mixed precision the limit runs in fp32 as well, and every note says how the layer stands to that. What raises is
    a row that says so.

    Args:
        row: what is the same in all rows; its `flops` are those of a forward pass.
        notes: by name, where there is something to say.
    """
    for what, run in PASSES.items():
        calls = {name: functools.partial(run, layer, x, precision) for name, layer in layers.items()}
        if precision.autocast:
            calls[DENSE_FP32] = functools.partial(run, layers[DENSE], x, FP32)
        row = dataclasses.replace(row, dtype=precision.name, what=what, ratio_to=DENSE)
        peaks: dict[str, int] = {}
        kept: dict[str, int] = {}
        took: dict[str, float] = {}
        for name in list(calls):
            began = time.perf_counter()
            try:
                peaks[name] = kept[name] = peak_memory(calls[name], options.device)
                if what != "forward":
                    kept[name] = held_memory(functools.partial(with_graph, *calls[name].args), options.device)
            except Exception as error:  # whatever a layer raises is the answer
                del calls[name]
                yield dataclasses.replace(row, variant=name, flops=None, note=f"not run: {reason(error)}")
            took[name] = time.perf_counter() - began
        slow = {name: call for name, call in calls.items() if took[name] > max(PATIENCE, 4 * took[DENSE])}
        quick = {name: call for name, call in calls.items() if name not in slow}
        samples = time_in_turn(quick, options, min_seconds=0.02, tell=tell)
        if slow:
            samples |= time_in_turn(slow, dataclasses.replace(options, rounds=1), min_seconds=0.02, tell=tell)
        medians = {name: quantiles(seconds)[1] for name, seconds in samples.items()}
        for name in calls:
            said = [notes.get(name, "")]
            if name in slow and options.rounds > 1:
                said.append("timed once")
            if precision.autocast and name != DENSE_FP32:
                said.append(f"{medians[name] / medians[DENSE_FP32]:.2f}x the limit in fp32")
            yield dataclasses.replace(
                row,
                variant=name,
                seconds=quantiles(samples[name]),
                ratio=medians[name] / medians[DENSE],
                peak_bytes=peaks[name],
                activation_bytes=kept[name],
                flops=None if row.flops is None else row.flops * (1 if what == "forward" else 3),
                note="; ".join(filter(None, said)),
            )


def reason(error: Exception) -> str:
    """The first line of what an exception says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def print_ratios(title: str, rows: Sequence[Measurement], keys: Sequence[str]) -> None:
    """Two tables, of time and of memory: a line for every shape, precision and pass, a column for every layer.

    Args:
        keys: the entries of the shape to show.
    """
    names = list(dict.fromkeys(row.variant for row in rows if row.variant != DENSE))
    cells: dict[tuple[str, ...], dict[str, Measurement]] = {}
    for row in rows:
        line = (*(str(row.shape[key]) for key in keys), row.dtype, row.what)
        cells.setdefault(line, {})[row.variant] = row

    def share(row: Measurement | None, dense: Measurement) -> str:
        if row is None or row.activation_bytes is None:
            return ""
        return f"{row.activation_bytes / max(1, dense.activation_bytes or 0):.2f}"

    header = [*keys, "dtype", "", *names]
    times = [[*line, *(_ratio(of.get(name)) for name in names)] for line, of in cells.items()]
    print_table(f"{title}: time / limit", header, times)
    memory = [[*line, *(share(of.get(name), of[DENSE]) for name in names)] for line, of in cells.items()]
    print_table(f"{title}: memory (forward: peak; with backward: held between the two) / limit", header, memory)
    for said in dict.fromkeys(f"{row.variant}: {row.note}" for row in rows if row.seconds is None):
        print(said)


def _ratio(row: Measurement | None) -> str:
    return "" if row is None or row.ratio is None else f"{row.ratio:.2f}"
