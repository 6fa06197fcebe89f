"""All benchmarks that answer a question about this machine, one after the other: `make bench`, or python -m benchmarks.

    python -m benchmarks [--smoke] [--only experts peers ...] [--directory outputs/bench]

Rows go to DIRECTORY/rows.jsonl, pictures beside it if matplotlib is there. Under ten minutes on two cores.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import SMOKE

__all__ = ["main"]

NAMES = ("experts", "peers", "scaling", "roofline", "attention", "loss", "training_step", "decoding")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: does everything run?")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--directory", type=Path, help="default: outputs/bench/<time>")
    given = parser.parse_args(arguments)
    directory = given.directory or Path("outputs") / "bench" / time.strftime("%Y%m%d-%H%M%S")
    rows = directory / "rows.jsonl"
    if rows.exists():
        parser.error(f"{rows} exists: rows of another run would be mixed with these; choose another directory")
    began = time.perf_counter()
    for i, name in enumerate(given.only, start=1):
        print(f"\n[{i}/{len(given.only)}] {name}, after {time.perf_counter() - began:.0f} s", flush=True)
        # a process for each: threads and allocator settings of one are not those of the next
        smoke = ["--smoke"] if given.smoke else []
        done = subprocess.run([sys.executable, "-m", f"{__package__}.{name}", *smoke, "--output", str(rows)])
        if done.returncode:
            sys.exit(f"{name} failed; what was measured before is in {rows}")
    pictures = plot([json.loads(line) for line in rows.read_text().splitlines()], directory)
    if given.smoke:
        print(f"\n{SMOKE}.")
    print(f"\n{time.perf_counter() - began:.0f} s; written {rows}{''.join(f', {path}' for path in pictures)}")


def plot(rows: Sequence[dict[str, Any]], directory: Path) -> list[Path]:
    """Time over the dense limit against rows per expert and number of experts, memory over tokens, the roofline."""
    try:
        from moesaic.evaluation.plotting import new_figure, save_figure
    except ImportError:  # without matplotlib
        return []
    written = []
    for name, draw in PICTURES.items():
        figure, axes = new_figure(1, 2, width=11, height=4)
        axes[1].sharey(axes[0])
        if draw(axes, [row for row in rows if row["seconds"]]):
            written.append(directory / f"{name}.png")
            save_figure(figure, written[-1])
    return written


COLORS = {"fp32": "#0072B2", "bf16": "#D55E00", "mixed": "#009E73", "dense": "#666666", "MoE": "#0072B2"}
"""The colors of all pictures (`moesaic.evaluation.plotting`), by what they mean here."""

PRECISIONS = {"fp32": "fp32", "bf16": "bf16", "mixed": "mixed: fp32 weights, bf16 arithmetic"}


def legend(axis: Any, found: Sequence[str]) -> None:
    """Name the precisions that were measured."""
    handles = [axis.plot([], [], marker="o", color=COLORS[name], label=PRECISIONS[name])[0] for name in found]
    axis.legend(handles=handles, frameon=False, fontsize=8)


def draw_rows_each(axes: Any, rows: Sequence[dict[str, Any]]) -> bool:
    wanted = {"part": "layer", "load": "even"}
    return draw_ratio(axes, rows, "experts", "rows_each", "rows per expert (tokens / experts)", wanted)


def draw_experts(axes: Any, rows: Sequence[dict[str, Any]]) -> bool:
    return draw_ratio(axes, rows, "scaling", "experts", "experts, at fixed active FLOPs", {"sweep": "experts"})


def draw_ratio(
    axes: Any, rows: Sequence[dict[str, Any]], benchmark: str, x: str, label: str, wanted: dict[str, Any]
) -> bool:
    ours = [row for row in rows if (row["benchmark"], row["variant"]) == (benchmark, "MoE")]
    ours = [row for row in ours if wanted.items() <= row["shape"].items()]
    if not ours:
        return False
    numbers = [row["shape"].get("rows") for row in ours]
    ours = [row for row in ours if row["shape"].get("rows") == max(numbers, key=numbers.count)]  # one line, one size
    for axis, what in zip(axes, ("forward", "forward+backward"), strict=True):
        for dtype in sorted({row["dtype"] for row in ours}):
            points = sorted((r["shape"][x], r["ratio"]) for r in ours if (r["dtype"], r["what"]) == (dtype, what))
            axis.plot([a for a, _ in points], [b for _, b in points], marker="o", color=COLORS[dtype])
        axis.axhline(1, color=COLORS["dense"], linewidth=1, linestyle="--")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set(xlabel=label, title=what)
    axes[0].set_ylabel("time / dense of equal active FLOPs")
    legend(axes[0], sorted({row["dtype"] for row in ours}))
    return True


def draw_memory(axes: Any, rows: Sequence[dict[str, Any]]) -> bool:
    ours = [row for row in rows if row["benchmark"] == "scaling" and row["shape"]["sweep"] == "tokens"]
    ours = [row for row in ours if row["what"] == "forward+backward" and row["variant"] in ("MoE", "dense")]
    if not ours:
        return False
    for axis, dtype in zip(axes, ("fp32", "bf16"), strict=True):
        for variant in ("dense", "MoE"):
            found = [row for row in ours if (row["variant"], row["dtype"]) == (variant, dtype)]
            points = sorted((row["shape"]["tokens"], row["activation_bytes"] / 1e6) for row in found)
            axis.plot([a for a, _ in points], [b for _, b in points], marker="o", color=COLORS[variant], label=variant)
        axis.set(xlabel="tokens", title=dtype)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
    axes[0].set_ylabel("held between forward and backward, MB")
    axes[0].legend(frameon=False)
    return True


def draw_roofline(axes: Any, rows: Sequence[dict[str, Any]]) -> bool:
    ours = [row for row in rows if row["benchmark"] == "roofline"]
    copies = [row for row in ours if row["what"] == "copy"]
    if not copies:
        return False
    bandwidth = copies[0]["shape"]["bytes"] / copies[0]["seconds"][1]
    for axis, what in zip(axes, ("forward", "forward+backward"), strict=True):
        for dtype in ("fp32", "bf16"):
            rates = [r["flops"] / r["seconds"][1] for r in ours if (r["what"], r["dtype"]) == ("matmul", dtype)]
            x = [2.0 ** (i / 8) for i in range(24, 96)] if rates else []  # a CPU without bf16
            axis.plot(x, [min(max(rates), a * bandwidth) / 1e9 for a in x], color=COLORS[dtype], linewidth=1)
        for row in ours:
            if row["what"] == what:
                place = row["flops"] / row["shape"]["bytes"], row["flops"] / row["seconds"][1] / 1e9
                axis.plot(*place, marker="s" if row["variant"] == "dense" else "o", color=COLORS[row["dtype"]])
                label = row["variant"].removeprefix("MoE of ")
                axis.annotate(label, place, (4, -8), textcoords="offset points", fontsize=7)
        axis.set(xlabel="FLOPs per byte that must be moved; numbers: experts", title=what, xscale="log", yscale="log")
    axes[0].set_ylabel("GFLOP/s; lines: fastest matmul and copy")
    legend(axes[0], [name for name in PRECISIONS if any(row["dtype"] == name for row in ours)])
    return True


PICTURES: dict[str, Callable[[Any, Sequence[dict[str, Any]]], bool]] = {
    "experts": draw_rows_each,
    "scaling": draw_experts,
    "memory": draw_memory,
    "roofline": draw_roofline,
}


if __name__ == "__main__":
    main()
