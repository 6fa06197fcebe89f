"""What all pictures share: colors, a figure without display or global state, labels, and the file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moesaic.files import atomic

__all__ = [
    "BLUE",
    "COLORS",
    "DEPTH",
    "FEW",
    "GRAY",
    "ORANGE",
    "Floats",
    "draw_by_layer",
    "in_panels",
    "label_axes",
    "mark_chance",
    "new_card",
    "new_figure",
    "pixels",
    "save_figure",
    "with_unit",
]

BLUE, ORANGE, GRAY = "#0072B2", "#D55E00", "#666666"  # Okabe-Ito: told apart by everyone
COLORS = [BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]

DEPTH = "viridis"
"""Color map of what has an order: shares, accuracies, the depth of a layer. What has a middle is in RdBu_r."""

FEW = len(COLORS)
"""Lines that a panel can have and still be read, one for each color."""

Floats = npt.NDArray[np.float64]


def new_figure(
    rows: int, columns: int, *, width: float, height: float, heights: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    """Make a figure of width x height inches with a grid of panels, which come row by row.

    Args:
        heights: of the rows, relative to each other.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows, columns, height_ratios=heights)
    axes = [figure.add_subplot(grid[i // columns, i % columns]) for i in range(rows * columns)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def new_card() -> tuple[Figure, Axes]:
    """Make a figure of one panel that can be read at the size of a card in TensorBoard, about 500 x 375 pixels."""
    figure, [axis] = new_figure(1, 1, width=5, height=3.75)
    return figure, axis


def pixels(figure: Figure) -> npt.NDArray[np.uint8]:
    """Draw a figure; (height, width, 4) RGBA."""
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)  # `new_figure` made it
    canvas.draw()
    return np.asarray(canvas.buffer_rgba()).copy()


def in_panels(names: Sequence[str], always: Sequence[str] = ()) -> list[list[str]]:
    """Split names over panels of at most `FEW` lines; those of `always` are in every one."""
    rest = [name for name in names if name not in always]
    room = FEW - len(always)
    return [[*always, *rest[i : i + room]] for i in range(0, max(1, len(rest)), room)]


def draw_by_layer(axis: Axes, found: Mapping[str, tuple[Floats, Floats]], label: str, **scale: Any) -> None:
    """Draw a measure of every layer over steps: a line for each of a few layers, a heat map of more.

    Args:
        found: layer -> (steps, values).
        label: of the values, with their unit.
        scale: of the heat map, such as vmin.
    """
    if len(found) <= FEW:
        for (layer, (steps, values)), shade in zip(
            found.items(), colormaps[DEPTH](np.linspace(0, 0.8, len(found))), strict=True
        ):
            marker = "o" if len(steps) < 50 else None
            axis.plot(steps, values, color=shade, marker=marker, markersize=3, linewidth=1.4, label=layer)
        axis.set_ylabel(label)
        axis.legend(frameon=False, fontsize=8)
        return
    at = sorted({float(step) for steps, _ in found.values() for step in steps})
    table = np.full((len(found), len(at)), np.nan)
    for row, (steps, values) in enumerate(found.values()):
        table[row, [at.index(float(step)) for step in steps]] = values
    first = max(0.0, 2 * at[0] - at[1]) if len(at) > 1 else 0.0
    image = axis.pcolormesh([first, *at], np.arange(len(found) + 1) - 0.5, table, cmap=DEPTH, **scale)
    ticks = np.unique(np.linspace(0, len(found) - 1, 8).round().astype(int))
    axis.set_yticks(ticks, [list(found)[tick] for tick in ticks], fontsize=8)
    axis.invert_yaxis()  # the first layer on top
    axis.grid(False)
    assert axis.figure is not None
    axis.figure.colorbar(image, ax=axis, label=label)


def with_unit(metric: str) -> str:
    """Return the name of a metric with its unit, where the name does not say it."""
    last = metric.rpartition("/")[2]
    if last == "loss" or last == "gain":
        return f"{metric}, nats per token"
    return f"{metric}, share of answers" if metric.startswith("recall/accuracy") else metric


def mark_chance(axis: Axes, chance: float) -> None:
    """Draw the level that a guess reaches, with its number."""
    axis.axhline(chance, color=GRAY, linestyle=":", linewidth=1)
    axis.annotate(
        f"chance {chance:.3g}", (0, chance), xycoords=("axes fraction", "data"), xytext=(4, 3),
        textcoords="offset points", color=GRAY, fontsize=8,
    )  # fmt: skip


def label_axes(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=11)
    axis.set_xlabel(x)
    axis.set_ylabel(y)


def save_figure(figure: Figure, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic(out) as partial:
        figure.savefig(partial, dpi=120, format="png")
