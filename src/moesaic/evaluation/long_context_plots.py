"""Pictures of the long-context evaluations: loss by position of several variants, and needle heat maps."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from moesaic.evaluation.long_context import LossByPosition
from moesaic.evaluation.needle import NeedleCell, NeedleConfig, summarize_needles
from moesaic.evaluation.plotting import COLORS, DEPTH, GRAY, Floats, in_panels, label_axes, new_figure, save_figure

__all__ = ["plot_needles", "plot_variants_by_position"]


def plot_variants_by_position(found: Mapping[str, LossByPosition], out: Path, train_length: int) -> None:
    """Loss by position with its standard error; beside it the paired difference to the first variant, or, for one
    variant alone, the loss up to a position."""
    rows = in_panels(list(found), list(found)[:1])
    figure, axes = new_figure(len(rows), 2, width=13.5, height=4.2 * len(rows))
    for i, names in enumerate(rows):
        _draw_variants(axes[2 * i : 2 * i + 2], {name: found[name] for name in names}, train_length)
    save_figure(figure, out)


def _draw_variants(axes: Sequence[Axes], found: Mapping[str, LossByPosition], train_length: int) -> None:
    """Draw one row of `plot_variants_by_position`."""
    left, right = axes
    first = next(iter(found.values()))
    edges = np.array(first.edges, dtype=float)
    # the bucket of position 0 lies at 1 token of context
    middles = np.sqrt((edges[:-1] + 1) * edges[1:])
    pairs = list(zip(first.edges, first.edges[1:], strict=False))
    for (name, result), color in zip(found.items(), COLORS, strict=False):
        _band(left, middles, [result.loss(*pair) for pair in pairs], color, name)
        if len(found) == 1:
            _band(right, edges[1:], [result.loss(0, end) for _, end in pairs], color, name)
        elif result is not first:
            _band(right, middles, [result.difference(first, *pair) for pair in pairs], color, name)
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axis.axvline(train_length, color=GRAY, linestyle="--", linewidth=1)
    left.annotate(
        f"training length {train_length}", (train_length, 0.98), xycoords=("data", "axes fraction"), xytext=(4, 0),
        textcoords="offset points", va="top", color=GRAY, fontsize=8,
    )  # fmt: skip
    count = len(first.nats)
    error = "± standard error" if count > 1 else "no error known"
    label_axes(
        left, f"Loss by position ({count} stretch{'es' * (count > 1)}, {error})", "tokens of context", "nats per token"
    )
    if len(found) == 1:
        label_axes(right, "Loss up to a position", "tokens so far", "mean nats per token")
    else:
        right.axhline(0, color=COLORS[0], linewidth=1)
        label_axes(
            right, f"Difference to {next(iter(found))}, paired by stretch", "tokens of context", "nats per token"
        )
    handles, labels = left.get_legend_handles_labels()
    shown = [textwrap.fill(label, 36) for label in labels]
    right.legend(handles, shown, loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, fontsize=8)


def plot_needles(found: Mapping[str, Sequence[NeedleCell]], out: Path, config: NeedleConfig, train_length: int) -> None:
    """One heat map of accuracy per variant, depth against context length, with the number in every cell."""
    columns = min(2, len(found))
    rows = -(-len(found) // columns)
    figure, axes = new_figure(rows, columns, width=1 + 6 * columns, height=0.6 + 3.2 * rows)
    image = None
    for axis, (name, cells) in zip(axes, found.items(), strict=False):
        lengths = sorted({cell.length for cell in cells})
        depths = sorted({cell.depth for cell in cells})
        table = np.full((len(depths), len(lengths)), np.nan)
        for cell in cells:
            mean = summarize_needles([cell], config.distractors)["accuracy"]
            table[depths.index(cell.depth), lengths.index(cell.length)] = mean
        image = axis.imshow(table, cmap=DEPTH, vmin=0, vmax=1, aspect="auto")
        for y, x in np.ndindex(table.shape):
            axis.text(
                x, y, f"{table[y, x]:.2f}", ha="center", va="center", fontsize=8,
                color="white" if table[y, x] < 0.6 else "black",
            )  # fmt: skip
        axis.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        axis.set_yticks(range(len(depths)), [f"{100 * depth:g}%" for depth in depths])
        within = sum(length <= train_length for length in lengths)
        if 0 < within < len(lengths):
            axis.axvline(within - 0.5, color="white", linestyle="--", linewidth=1.5)
        label_axes(axis, name, "tokens of context", "depth of the needle (0%: start)")
        axis.grid(False)
    for axis in axes[len(found) :]:
        axis.set_visible(False)
    assert image is not None
    bar = figure.colorbar(image, ax=list(axes), label=f"accuracy among {config.distractors + 1} values")
    chance, copied = 1 / (config.distractors + 1), 1 / (config.planted + 1)
    bar.ax.axhline(chance, color="white", linewidth=2)
    bar.ax.annotate(
        "chance", (0, chance), xycoords=("axes fraction", "data"), xytext=(-3, 0), textcoords="offset points",
        ha="right", va="center", color=GRAY, fontsize=8, annotation_clip=False,
    )  # fmt: skip
    title = f"Needles: chance {chance:.2f}, any planted value {copied:.2f}; dashed: training length {train_length}"
    figure.suptitle(title, fontsize=11)
    save_figure(figure, out)


def _band(axis: Axes, x: Floats, points: Sequence[tuple[float, float]], color: str, name: str) -> None:
    mean = np.array([point[0] for point in points])
    axis.plot(x, mean, color=color, marker="o", markersize=3, label=name)
    error = np.array([point[1] for point in points])
    if not any(math.isnan(value) for value in error):
        axis.fill_between(x, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)
