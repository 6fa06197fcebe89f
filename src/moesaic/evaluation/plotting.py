"""What all pictures share: colors, a figure without display or global state, labels, and the file."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moesaic.files import atomic

__all__ = ["BLUE", "COLORS", "GRAY", "ORANGE", "Floats", "label_axes", "new_figure", "save_figure"]

BLUE, ORANGE, GRAY = "#0072B2", "#D55E00", "#666666"  # Okabe-Ito: told apart by everyone
COLORS = [BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]

Floats = npt.NDArray[np.float64]


def new_figure(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def label_axes(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=11)
    axis.set_xlabel(x)
    axis.set_ylabel(y)


def save_figure(figure: Figure, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic(out) as partial:
        figure.savefig(partial, dpi=120, format="png")
