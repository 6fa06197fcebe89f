"""The picture of a coordinate check."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from moesaic.evaluation.plotting import COLORS, label_axes, new_figure, save_figure
from moesaic.training.coordinates import QUANTITIES, Curve

__all__ = ["draw"]


def draw(found: Mapping[str, Sequence[Curve]], out: Path) -> None:
    """Draw one row of panels per axis and one panel per check: each quantity over the size, beside the smallest one."""
    axes_of = list(dict.fromkeys(curve.axis for curves in found.values() for curve in curves))
    figure, axes = new_figure(len(axes_of), len(found), width=3.2 * len(found), height=2.8 * len(axes_of))
    for row, axis_name in enumerate(axes_of):
        panels = axes[row * len(found) : (row + 1) * len(found)]
        lowest, highest = 1.0, 1.0
        for panel, (name, curves) in zip(panels, found.items(), strict=True):
            for curve in curves:
                if curve.axis == axis_name:
                    relative = [value / curve.values[0] for value in curve.values]
                    color = COLORS[QUANTITIES.index(curve.quantity)]
                    finite = [value for value in relative if math.isfinite(value)]
                    lowest, highest = min(lowest, *finite), max(highest, *finite)
                    panel.plot(curve.sizes, relative, color=color, marker="o", markersize=3, label=curve.quantity)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log", base=2)
            label_axes(panel, name, axis_name, "times the smallest" if panel is panels[0] else "")
        for panel in panels:
            panel.set_ylim(lowest / 1.2, highest * 1.2)
    axes[0].legend(frameon=False, fontsize=7)
    save_figure(figure, out)
