"""The pictures of a ladder: loss and worth over compute, and what the laws leave."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

from moesaic.evaluation.plotting import COLORS, GRAY, label_axes, new_figure
from moesaic.ladder.analysis import ASYMPTOTES, Analysis
from moesaic.ladder.config import LadderConfig, name_of
from moesaic.ladder.points import Cell, flops_of
from moesaic.ladder.prediction import Outcome
from moesaic.ladder.rungs import METRIC

__all__ = ["plot_ladder", "plot_residuals"]

OUTSIDE: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}

DASHES = {"pinned": "-", "free": "--"}

BESIDE = 1.08
"""By what factor of compute the intervals of two arms at a rung are drawn apart."""

HIGHEST = 1e6
"""What an end of an interval is drawn as that is further up, or infinite."""


def plot_ladder(ladder: LadderConfig, cells: Sequence[Cell], analysis: Analysis, outcomes: Sequence[Outcome]) -> Figure:
    """Bits per byte over active FLOPs with both laws of each arm, and beside it what the arms are worth."""
    figure, (left, right) = new_figure(1, 2, width=10, height=4.2)
    fitted = {name_of(flops) for flops in ladder.rungs}
    most = max((cell.flops for cell in cells if cell.finished), default=1.0)
    for arm, color in zip(ladder.arms, _colors(ladder), strict=True):
        label: str | None = arm
        for cell in cells:
            if cell.arm == arm and cell.finished:
                flops = [flops_of(row) for row in cell.finished]
                losses = [row["metrics"][METRIC] for row in cell.finished]
                face = color if cell.rung in fitted else "none"
                left.plot(flops, losses, "o", color=color, markerfacecolor=face, markersize=4, label=label)
                label = None
        for which in ASYMPTOTES:
            law = analysis.fit(arm, which).law
            if law is not None:
                x = np.geomspace(ladder.rungs[0], most, 100)
                left.plot(x, law(x), DASHES[which], color=color, linewidth=1.2)
    for outcome in outcomes:
        predicted = outcome.prediction.arms[outcome.arm]
        low, high = predicted.expected.low, predicted.expected.high
        color = dict(zip(ladder.arms, _colors(ladder), strict=True))[outcome.arm]
        left.vlines(predicted.flops, low, high, color=color, linewidth=4, alpha=0.3)
    if outcomes:
        left.plot([], [], "o", color=GRAY, markerfacecolor="none", markersize=4, label="target, measured")
        left.plot([], [], color=GRAY, linewidth=4, alpha=0.3, label="target, predicted")
    _logarithmic(left, both=True)
    label_axes(left, "laws: asymptote pinned (lines) and free (dashes)", "active FLOPs", "bits per byte")
    left.legend(frameon=False, fontsize=8)
    others = [arm for arm in ladder.arms if arm != ladder.baseline]
    for arm, color in zip(ladder.arms, _colors(ladder), strict=True):
        if arm == ladder.baseline or not (worth := analysis.worth(arm, "FLOPs")).values:
            continue
        at = {cell.rung: cell.flops for cell in cells if cell.arm == arm and cell.finished}
        beside = BESIDE ** (others.index(arm) - (len(others) - 1) / 2)  # else equal arms would hide each other
        places = [at[rung] * beside for rung in worth.rungs]
        highs = [min(v.high, HIGHEST) for v in worth.values]
        right.vlines(places, [min(v.low, HIGHEST) for v in worth.values], highs, color=color, alpha=0.8)
        right.plot(places, [v.value for v in worth.values], "o", color=color, markersize=5, label=arm)
    right.axhline(1, color=GRAY, linewidth=1, linestyle="--")
    shown = [v.value for worth in analysis.worths for v in worth.values if worth.measure == "FLOPs"]
    right.set_ylim(0, 2 * max([1.0, *(value for value in shown if math.isfinite(value))]))  # of wider intervals a part
    _logarithmic(right, both=False)
    label_axes(right, f"worth, with 95% intervals; 1: as {ladder.baseline}", "active FLOPs", "times the compute")
    if right.get_legend_handles_labels()[0]:
        right.legend(frameon=False, fontsize=8)
    return figure


def plot_residuals(ladder: LadderConfig, cells: Sequence[Cell], analysis: Analysis) -> Figure:
    """How far each run is from the law of its arm, in percent of the loss; targets are hollow."""
    figure, panels = new_figure(1, len(ASYMPTOTES), width=10, height=3.6)
    fitted = {name_of(flops) for flops in ladder.rungs}
    for panel, which in zip(panels, ASYMPTOTES, strict=True):
        for arm, color in zip(ladder.arms, _colors(ladder), strict=True):
            law, label = analysis.fit(arm, which).law, arm
            for cell in cells if law is not None else ():
                if cell.arm != arm or not cell.finished:
                    continue
                flops = np.array([flops_of(row) for row in cell.finished])
                losses = np.array([row["metrics"][METRIC] for row in cell.finished])
                assert law is not None
                left_over = 100 * (losses / law(flops) - 1)
                face = color if cell.rung in fitted else "none"
                panel.plot(flops, left_over, "o", color=color, markerfacecolor=face, markersize=4, label=label)
                label = "_nolegend_"
        panel.axhline(0, color=GRAY, linewidth=1, linestyle="--")
        _logarithmic(panel, both=False)
        label_axes(panel, f"asymptote {which}", "active FLOPs", "measured less fitted (% of the loss)")
    for panel in panels:
        if panel.get_legend_handles_labels()[0]:  # beside the panels: inside, its marks would pass for runs
            panels[-1].legend(*panel.get_legend_handles_labels(), frameon=False, fontsize=8, **OUTSIDE)
            break
    return figure


def _colors(ladder: LadderConfig) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(ladder.arms))]


def _logarithmic(panel: Axes, both: bool) -> None:
    panel.set_xscale("log")
    if both:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(MaxNLocator(6))
        panel.yaxis.set_major_formatter(ScalarFormatter())
        panel.yaxis.set_minor_locator(NullLocator())
