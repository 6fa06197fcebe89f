"""Pictures of a run and of a sweep. The object API of matplotlib on the Agg canvas: no global state, no display."""

import csv
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from moesaic.evaluation.plotting import (
    BLUE,
    COLORS,
    FEW,
    GRAY,
    ORANGE,
    Floats,
    draw_by_layer,
    in_panels,
    label_axes,
    new_figure,
    save_figure,
    with_unit,
)
from moesaic.reading import read_csv, reading

__all__ = [
    "draw_drift",
    "draw_fullest",
    "draw_loss_by_position",
    "plot_curves",
    "plot_distillation",
    "plot_drift",
    "plot_expert_load",
    "plot_loss",
    "plot_loss_by_position",
    "read_columns",
    "read_drift",
    "read_fullest",
]


def read_columns(path: Path, *names: str) -> tuple[Floats, ...]:
    """Columns of a metrics.csv, only the rows in which all of them have a value.

    Raises:
        InputError: it is no table, or one of these values is no number.
    """
    rows = [row for row in read_csv(path) if all(row.get(name) for name in names)]
    with reading(path):
        return tuple(np.array([float(row[name]) for row in rows]) for name in names)


def plot_loss(
    metrics_csv: Path,
    out: Path,
    baselines: Mapping[str, float],
    final: float | None = None,
    scored: str = "all of it",
) -> None:
    """Training loss in nats per token, and validation bits per byte beside the baselines (name -> bits per byte).

    The checks during a run see a part of the validation split; `final` is the value at the end, on what `scored` says.
    """
    figure, (left, right) = new_figure(1, 2, width=11, height=4)
    steps, loss = read_columns(metrics_csv, "step", "train/loss")
    last = steps[-1]
    left.plot(steps, loss, color=BLUE, alpha=0.3, linewidth=1, label="as logged")
    if len(loss) > 40:
        window = np.ones(len(loss) // 20)  # narrower at both ends
        smooth = np.convolve(loss, window, mode="same") / np.convolve(np.ones_like(loss), window, mode="same")
        over = round(float(steps[-1] - steps[0]) / (len(steps) - 1) * len(window))
        left.plot(steps, smooth, color=BLUE, linewidth=1.8, label=f"mean over {over} steps")
        left.legend(frameon=False)
    label_axes(left, "Training loss", "optimizer step", "nats per token")

    steps, bits = read_columns(metrics_csv, "step", "validation/bits_per_byte")
    if len(bits):
        right.plot(steps, bits, color=BLUE, marker="o", markersize=3, label="checks on a part of it")
        low, high = min(bits), max(bits)
        if final is not None:
            low, high = min(low, final), max(high, final)
            label = f"{scored}, at the end: {final:.3f}"
            right.plot(last, final, color=BLUE, marker="*", markersize=13, linestyle="", label=label)
        right.legend(frameon=False)
        for name, value in baselines.items():
            if value <= high + 0.5:
                low, high = min(low, value), max(high, value)
                right.axhline(value, color=ORANGE, linestyle="--", linewidth=1)
                right.annotate(
                    f"{name} {value:.3f}", (1, value), xycoords=("axes fraction", "data"), xytext=(-4, 3),
                    textcoords="offset points", ha="right", color=ORANGE, fontsize=8,
                )  # fmt: skip
        margin = 0.08 * max(high - low, 0.1)
        right.set_ylim(low - margin, high + 2 * margin)
        label_axes(right, "Held-out text", "optimizer step", "bits per byte")
    else:
        steps, loss = read_columns(metrics_csv, "step", "validation/loss")
        right.plot(steps, loss, color=BLUE, marker="o", markersize=3)
        label_axes(right, "Held-out text", "optimizer step", "nats per token")
    save_figure(figure, out)


def plot_distillation(metrics_csv: Path, out: Path) -> None:
    """Weight of the soft targets, running loss gap, and losses of student and teacher, over the student's tokens."""
    figure, (left, middle, right) = new_figure(1, 3, width=14, height=4)

    def draw(axis: Axes, column: str, color: str, label: str) -> None:
        tokens, values = read_columns(metrics_csv, "tokens", column)
        if len(tokens):
            axis.plot(tokens, values, color=color, linewidth=1.4, label=label)

    draw(left, "distillation/soft_weight", BLUE, "mean over tokens")
    draw(left, "distillation/agreement", GRAY, "agreement on the most likely token")
    left.set_ylim(-0.02, 1.02)
    label_axes(left, "Weight of the soft targets", "tokens", "share")
    draw(middle, "distillation/loss_gap", BLUE, "student's loss minus teacher's")
    middle.axhline(0, color=GRAY, linestyle=":", linewidth=1)
    label_axes(middle, "Loss gap, running mean", "tokens", "nats per token")
    draw(right, "train/loss", BLUE, "student, hard")
    draw(right, "distillation/teacher_loss", ORANGE, "teacher, hard")
    draw(right, "distillation/soft", COLORS[2], "student, soft")
    label_axes(right, "Training losses", "tokens", "nats per token")
    for axis in (left, middle, right):
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.legend(frameon=False, fontsize=8)
    save_figure(figure, out)


def plot_expert_load(routing_csv: Path, out: Path) -> bool:
    """Heat maps of load over ideal, experts against steps, one per MoE layer; False (no file) without any row."""
    rows = read_csv(routing_csv)
    if not rows:
        return False
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    columns = 1 if len(layers) < 4 else 2 if len(layers) < 13 else 4
    lines = -(-len(layers) // columns)
    figure, axes = new_figure(lines, columns, width=9 if columns == 1 else 12, height=max(3.0, 2.3 * lines))
    image = None
    for layer, axis in zip(layers, axes, strict=False):
        mine = [row for row in rows if row["layer"] == layer]
        steps = sorted({int(row["step"]) for row in mine})
        experts = 1 + max(int(row["expert"]) for row in mine)
        load = np.full((experts, len(steps)), np.nan)
        place = {step: i for i, step in enumerate(steps)}
        for row in mine:
            load[int(row["expert"]), place[int(row["step"])]] = float(row["load"])
        log_load = np.log2(np.clip(load, 0.25, 4.0))
        edges = np.array([2 * steps[0] - steps[1] if len(steps) > 1 else 0, *steps], dtype=float)
        image = axis.pcolormesh(
            np.maximum(edges, 0), np.arange(experts + 1) - 0.5, log_load, cmap="RdBu_r", vmin=-2, vmax=2
        )
        label_axes(axis, f"{layer}: load of each expert over time", "optimizer step", "expert")
        axis.grid(False)
    for axis in axes[len(layers) :]:
        axis.set_visible(False)
    assert image is not None
    bar = figure.colorbar(image, ax=list(axes), ticks=[-2, -1, 0, 1, 2], label="load over ideal")
    bar.ax.set_yticklabels(["≤ 1/4", "1/2", "1", "2", "≥ 4"])
    save_figure(figure, out)
    return True


def plot_drift(metrics_csv: Path, out: Path) -> bool:
    """Share of changed choices at each validation, by MoE layer; False (no file) with fewer than two checks."""
    drifts = read_drift(metrics_csv)
    if not drifts:
        return False
    figure, (axis,) = new_figure(1, 1, width=8, height=4)
    draw_drift(axis, drifts)
    save_figure(figure, out)
    return True


def read_drift(metrics_csv: Path) -> dict[str, tuple[Floats, Floats]]:
    """Steps of the validations, and the share of choices that changed since the one before, by MoE layer."""
    with metrics_csv.open(newline="", encoding="utf-8") as file:
        names = [name for name in next(csv.reader(file), []) if name.startswith("router/") and name.endswith("/drift")]
    found = {}
    for name in names:
        steps, shares = read_columns(metrics_csv, "step", name)
        if len(steps):
            found[name.removeprefix("router/").removesuffix("/drift")] = steps, shares
    return found


def draw_drift(axis: Axes, drifts: Mapping[str, tuple[Floats, Floats]]) -> None:
    """Draw what `read_drift` found."""
    percent = {layer: (steps, 100 * shares) for layer, (steps, shares) in drifts.items()}
    axis.set_title("Choices changed since the previous validation", fontsize=11)
    axis.set_xlabel("optimizer step")
    draw_by_layer(axis, percent, "changed choices, %", vmin=0)
    if len(drifts) <= FEW:
        axis.set_ylim(bottom=0)


def read_fullest(routing_csv: Path) -> dict[str, tuple[Floats, Floats]]:
    """Steps, and the load of the fullest expert over the ideal load, by MoE layer."""
    by_layer: dict[str, dict[float, float]] = {}
    for row in read_csv(routing_csv):
        at = by_layer.setdefault(row["layer"], {})
        step = float(row["step"])
        at[step] = max(float(row["load"]), at.get(step, 0.0))
    return {layer: (np.array(list(at)), np.array(list(at.values()))) for layer, at in by_layer.items()}


def draw_fullest(axis: Axes, found: Mapping[str, tuple[Floats, Floats]]) -> None:
    """Draw what `read_fullest` found."""
    axis.set_title("The fullest expert of each layer (1: balanced)", fontsize=11)
    axis.set_xlabel("optimizer step")
    draw_by_layer(axis, found, "load over ideal load", vmin=1)
    if len(found) <= FEW:
        axis.axhline(1, color=GRAY, linestyle=":", linewidth=1)


def plot_loss_by_position(nats: Sequence[float], out: Path, train_length: int, chunk: int | None) -> None:
    """Mean nats per token by position in the window, in log-spaced buckets, with the training length marked."""
    figure, (axis,) = new_figure(1, 1, width=8, height=4)
    draw_loss_by_position(axis, nats, train_length, chunk)
    save_figure(figure, out)


def draw_loss_by_position(axis: Axes, nats: Sequence[float], train_length: int, chunk: int | None) -> None:
    """Draw what `plot_loss_by_position` plots."""
    values = np.array(nats)
    edges = np.unique(np.round(np.geomspace(1, len(values) + 1, 33)).astype(int))
    middles = [float(np.sqrt(a * (b - 1))) for a, b in itertools.pairwise(edges)]
    means = [values[a - 1 : b - 1].mean() for a, b in itertools.pairwise(edges)]
    axis.plot(middles, means, color=BLUE, marker="o", markersize=3)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    if train_length <= len(values):
        axis.axvline(train_length, color=ORANGE, linestyle="--", linewidth=1)
        axis.annotate(
            f"training length {train_length}", (train_length, 0.97), xycoords=("data", "axes fraction"),
            xytext=(-4, 0), textcoords="offset points", ha="right", va="top", color=ORANGE, fontsize=8,
        )  # fmt: skip
    if chunk is not None and chunk < len(values):
        axis.axvline(chunk, color=GRAY, linestyle=":", linewidth=1)
        axis.annotate(
            f"chunk {chunk}", (chunk, 0.88), xycoords=("data", "axes fraction"), xytext=(-4, 0),
            textcoords="offset points", ha="right", va="top", color=GRAY, fontsize=8,
        )  # fmt: skip
    label_axes(axis, "Loss by position on held-out text", "position in the window (tokens)", "nats per token")


def plot_curves(groups: Mapping[str, Mapping[str, Sequence[Mapping[str, Floats]]]], out: Path, metric: str) -> None:
    """A metric against steps, tokens, active FLOPs and seconds; one color per label, one thin line per seed.

    Every group has rows of panels of its own, each with a few labels and their names beside it. The first quarter of
    the training may leave the panel.

    Args:
        groups: name -> label -> seeds -> columns "step", "tokens", "active_flops", "seconds" and `metric`, equally
            long.
    """
    drawn = {name: {label: seeds for label, seeds in curves.items() if seeds} for name, curves in groups.items()}
    rows = [
        (name, {label: curves[label] for label in few})
        for name, curves in drawn.items()
        for few in in_panels(list(curves))
    ]
    if not rows:  # a sweep of failures
        rows = [("", {})]
    figure, axes = new_figure(len(rows), 4, width=17, height=3.6 * len(rows))
    for i, (name, curves) in enumerate(rows):
        panels = axes[4 * i : 4 * i + 4]
        _draw_curves(panels, curves, metric)
        low, high = _late_range([seed[metric] for seeds in drawn.get(name, {}).values() for seed in seeds])
        for panel in panels:
            panel.set_ylim(low, high)
        if len(drawn) > 1:
            panels[0].set_title(f"{name}: over steps", fontsize=11)
    save_figure(figure, out)


def _late_range(found: Sequence[Floats]) -> tuple[float, float] | tuple[None, None]:
    """Limits of an axis without the first quarter of each training, so that the ends can be told apart."""
    if not found:
        return None, None
    late = np.concatenate([values[len(values) // 4 :] for values in found])
    margin = 0.05 * max(float(late.max() - late.min()), 1e-3)
    return float(late.min()) - margin, float(late.max()) + margin


AXES = {"step": "optimizer steps", "tokens": "tokens", "active_flops": "active FLOPs", "seconds": "training seconds"}


def _draw_curves(panels: Sequence[Axes], curves: Mapping[str, Sequence[Mapping[str, Floats]]], metric: str) -> None:
    """Draw one row of `plot_curves`."""
    for axis, (column, name) in zip(panels, AXES.items(), strict=True):
        for (label, seeds), color in zip(curves.items(), COLORS, strict=False):
            for seed in seeds:
                alone = len(seeds) == 1
                axis.plot(
                    seed[column], seed[metric], color=color, linewidth=1.8 if alone else 0.8,
                    alpha=1 if alone else 0.4, label=label if alone else None,
                )  # fmt: skip
            if len(seeds) > 1:
                shared = min(len(seed[column]) for seed in seeds)
                mean_x = np.mean([seed[column][:shared] for seed in seeds], axis=0)
                mean_y = np.mean([seed[metric][:shared] for seed in seeds], axis=0)
                axis.plot(mean_x, mean_y, color=color, linewidth=1.8, label=f"{label} (mean of {len(seeds)})")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        label_axes(
            axis, f"over {name}", name, f"{with_unit(metric)}\n(checks during training)" if column == "step" else ""
        )
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        shown = [textwrap.fill(label, 42) for label in labels]
        panels[-1].legend(handles, shown, loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, fontsize=8)
