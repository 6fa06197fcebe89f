"""The picture of a coordinate check."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from moesaic.evaluation.plotting import COLORS, label_axes, new_figure, save_figure
from moesaic.training.coordinates import QUANTITIES, Curve

__all__ = ["draw"]


COLUMNS = 4
"""Checks beside each other; more than that could not be read at the width of a page."""


def draw(found: Mapping[str, Sequence[Curve]], out: Path) -> None:
    """Draw one row of panels per axis and one panel per check: each quantity over the size, beside the smallest one."""
    axes_of = list(dict.fromkeys(curve.axis for curves in found.values() for curve in curves))
    names = list(found)
    lines = [(names[i : i + COLUMNS], axis) for i in range(0, len(names), COLUMNS) for axis in axes_of]
    columns = min(COLUMNS, len(names))
    figure, axes = new_figure(len(lines), columns, width=3.2 * columns, height=2.8 * len(lines))
    reach = {axis: [1.0] for axis in axes_of}  # of all values along an axis: its panels share a scale
    for row, (checks, axis) in enumerate(lines):
        panels = axes[row * columns : (row + 1) * columns]
        for panel, name in zip(panels, checks, strict=False):
            for curve in found[name]:
                if curve.axis == axis:
                    relative = [value / curve.values[0] for value in curve.values]
                    color = COLORS[QUANTITIES.index(curve.quantity)]
                    reach[axis] += [value for value in relative if math.isfinite(value)]
                    panel.plot(curve.sizes, relative, color=color, marker="o", markersize=3, label=curve.quantity)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log", base=2)
            label_axes(panel, name, axis, "times the smallest" if panel is panels[0] else "")
        for panel in panels[len(checks) :]:
            panel.set_visible(False)
    for row, (_, axis) in enumerate(lines):
        for panel in axes[row * columns : (row + 1) * columns]:
            panel.set_ylim(min(reach[axis]) / 1.2, max(reach[axis]) * 1.2)
    axes[0].legend(frameon=False, fontsize=7)
    save_figure(figure, out)
