"""All benchmarks that answer a question about this machine, one after the other: `make bench`, or python -m benchmarks.

    python -m benchmarks [--smoke] [--only experts peers ...] [--directory outputs/bench]

Rows go to DIRECTORY/rows.jsonl, pictures beside it if matplotlib is there. Under ten minutes on two cores.
"""

import argparse
import importlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["main"]

NAMES = ("experts", "peers", "scaling", "attention", "loss", "training_step", "decoding")


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
        print(f"\n[{i}/{len(given.only)}] {name}", flush=True)
        module = importlib.import_module(f"benchmarks.{name}")
        module.main([*(["--smoke"] if given.smoke else []), "--output", str(rows)])
    pictures = plot([json.loads(line) for line in rows.read_text().splitlines()], directory)
    print(f"\n{time.perf_counter() - began:.0f} s; written {rows}{''.join(f', {path}' for path in pictures)}")


def plot(rows: Sequence[dict[str, Any]], directory: Path) -> list[Path]:
    """Time over the dense limit against rows per expert, and against the number of experts."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError:
        return []
    pictures = {
        "experts": ("rows per expert", "rows_each", {"part": "layer", "load": "even"}),
        "scaling": ("experts, at fixed active FLOPs", "experts", {"sweep": "experts"}),
    }
    written = []
    for question, (label, x, wanted) in pictures.items():
        ours = [row for row in rows if (row["benchmark"], row["variant"]) == (question, "MoE") and row["ratio"]]
        ours = [row for row in ours if wanted.items() <= row["shape"].items()]
        if not ours:
            continue
        figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
        for axis, what in zip(axes, ("forward", "forward+backward"), strict=True):
            for dtype in sorted({row["dtype"] for row in ours}):
                points = sorted((r["shape"][x], r["ratio"]) for r in ours if (r["dtype"], r["what"]) == (dtype, what))
                axis.plot([a for a, _ in points], [b for _, b in points], marker="o", label=dtype)
            axis.axhline(1, color="grey", linewidth=1)
            axis.set_xscale("log", base=2)
            axis.set(xlabel=label, title=what)
        axes[0].set_ylabel("time / dense layer of equal active FLOPs")
        axes[0].legend()
        written.append(directory / f"{question}.png")
        figure.savefig(written[-1], dpi=120, bbox_inches="tight")
        pyplot.close(figure)
    return written


if __name__ == "__main__":
    main()
