"""The plots of a study: effects, curves, the end over parameters or FLOPs, loss by position."""

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from moesaic.evaluation.plotting import COLORS, GRAY, Floats, in_panels, label_axes, mark_chance, new_figure, with_unit
from moesaic.overrides import apply_overrides
from moesaic.studies.config import StudyConfig
from moesaic.studies.jobs import Row, prepared_names
from moesaic.studies.results import ArmResult, processors, scored_windows

__all__ = ["plot_by_position", "plot_curves", "plot_effects", "plot_parameters", "plot_total_flops", "total_flops"]

DASHES = ("-", "--", ":", "-.")
MARKERS = {"-": "o", "--": "s", ":": "^", "-.": "D"}


STUDENTS = 10
"""Number of students that share the cost of one teacher in a plot."""


BUCKET = re.compile(r"loss_by_position/as_trained/loss/(\d+)-(\d+)")


def plot_effects(study: StudyConfig, arms: Sequence[ArmResult]) -> Figure | None:
    """Paired differences to the baseline, dot and 95% bar; None if there is none.

    Arm below arm, or with axes a panel for each axis.
    """
    found = {(arm.arm, arm.axis): arm.difference for arm in arms if arm.difference is not None and arm.difference.n}
    names = [name for name in (*study.arms, *study.variants) if any(name == arm for arm, _ in found)]
    if not names:
        return None
    better = f"{'higher' if study.higher_is_better else 'lower'} is better"
    title = f"difference to {study.shown(study.baseline)}, 95% interval"
    if not study.axes:
        figure, (panel,) = new_figure(1, 1, width=8.5, height=1.6 + 0.3 * len(names))
        for place, name in enumerate(names):
            interval, color = found[name, None], _style(study, name)["color"]
            panel.hlines(place, interval.low, interval.high, color=color, linewidth=2, alpha=0.8)
            panel.plot(interval.mean, place, "o", color=color, markersize=7)
        panel.axvline(0, color=GRAY, linewidth=1, linestyle="--")
        panel.set_yticks(range(len(names)), [textwrap.fill(study.shown(name), 30) for name in names])
        panel.invert_yaxis()
        panel.margins(y=0.5 / len(names))
        panel.grid(axis="y", visible=False)
        label_axes(panel, title, f"{_metric(study, arms)}\n({better})", "")
        return figure
    widths = [max(4.0, 1.0 + 1.1 * len(axis.values)) for axis in study.axes.values()]
    figure, panels = new_figure(1, len(study.axes), width=max(6.0, sum(widths)), height=4.2)
    for panel, (axis, points) in zip(panels, study.axes.items(), strict=True):
        for i, name in enumerate(names):
            for at, label in enumerate(points.values):
                difference = found.get((name, study.result_cell(name, (axis, label)).axis))
                if difference is None:
                    continue
                x, color = at + 0.6 * (i - (len(names) - 1) / 2) / len(names), _style(study, name)["color"]
                panel.vlines(x, difference.low, difference.high, color=color, linewidth=2, alpha=0.8)
                panel.plot(x, difference.mean, "o", color=color, markersize=7)
        panel.axhline(0, color=GRAY, linewidth=1, linestyle="--")
        panel.annotate(
            study.shown(study.baseline), (1, 0), xycoords=("axes fraction", "data"), xytext=(4, 0),
            textcoords="offset points", va="center", color=GRAY, fontsize=8, annotation_clip=False,
        )  # fmt: skip
        panel.set_xticks(range(len(points.values)), [textwrap.fill(label, 12) for label in points.values])
        panel.set_xlim(-0.6, len(points.values) - 0.4)
        panel.margins(y=0.15)
        panel.grid(axis="x", visible=False)
        label_axes(panel, title, axis, "")
    panels[0].set_ylabel(f"{_in_lines(_metric(study, arms))}\n({better})")
    _legend(study, figure, panels[0], names)
    return figure


def _in_lines(label: str) -> str:
    """A label beside an axis, which is not as long as one below."""
    return label.replace(" on ", "\non ")


def _metric(study: StudyConfig, arms: Sequence[ArmResult]) -> str:
    """The metric, and on how many windows of how many if that is not all."""
    return " ".join(filter(None, [with_unit(study.metric), scored_windows(row for arm in arms for row in arm.rows)]))


def plot_curves(study: StudyConfig, arms: Sequence[ArmResult]) -> Figure | None:
    """The checks during training over tokens, seconds and active FLOPs: mean over seeds, band from lowest to highest.

    One row of panels for each point of an axis; None if no row has a curve. The first quarter of the
    training may leave the panel, so that the end can be told apart. No seconds if they are of several processors.
    """
    curves = {(arm.arm, arm.axis): [row["curve"] for row in arm.rows if row["curve"]] for arm in arms}
    names = [name for name in study.arms if any(name == arm and found for (arm, _), found in curves.items())]
    if not names:
        return None
    metric = next(found[0]["metric"] for found in curves.values() if found)
    columns = {"tokens": "tokens", "seconds": "training seconds", "active_flops": "active FLOPs"}
    if len(processors(row for arm in arms for row in arm.rows)) > 1:
        del columns["seconds"]
    lines = [(point, few) for point in study.points for few in _few(study, names)]
    figure, panels = new_figure(len(lines), len(columns), width=4.5 * len(columns), height=0.6 + 3.0 * len(lines))
    for line, (point, few) in enumerate(lines):
        of_point = {name: found for name in names if (found := curves.get((name, study.cell(name, point).axis)))}
        late = [_late(found) for found in of_point.values()]
        for i, (column, label) in enumerate(columns.items()):
            panel = panels[len(columns) * line + i]
            for name in few:
                if name in of_point:
                    _band(panel, of_point[name], column, _style(study, name))
            if late:
                values = np.concatenate(late)
                margin = 0.05 * max(float(values.max() - values.min()), 1e-3)
                panel.set_ylim(float(values.min()) - margin, float(values.max()) + margin)
            panel.locator_params(axis="x", nbins=6)
            if column != "seconds":  # 500m would be read as minutes
                panel.xaxis.set_major_formatter(EngFormatter(sep=""))
            panel.set_title(f"{f'{point[0]}={point[1]}: ' if point else ''}over {label}", fontsize=11)
        panels[len(columns) * line].set_ylabel(f"{with_unit(metric)}\n(checks on a part of it)")
    _legend(study, figure, panels[0], names)
    return figure


def _few(study: StudyConfig, names: Sequence[str]) -> list[list[str]]:
    """Names in as many panels as they need, the baseline in each."""
    return in_panels(names, [name for name in names if name == study.baseline])


def plot_parameters(study: StudyConfig, arms: Sequence[ArmResult]) -> Figure | None:
    """The metric at the end over all parameters, a point per arm with its 95% interval, a panel for each axis.

    None if all models are of one size, within 1%.
    """
    sizes = [size for axis in study.axes or [None] for _, size in _sizes(study, arms, axis)]
    if not sizes or max(sizes) <= 1.01 * min(sizes):
        return None
    figure, panels = new_figure(1, max(1, len(study.axes)), width=max(9.0, 6.0 * len(study.axes)), height=4.6)
    for panel, axis in zip(panels, study.axes or [None], strict=True):
        points = _sizes(study, arms, axis)
        highest: dict[tuple[str, float], float] = {}  # the label of a value stands once, above all arms
        for arm, size in points:
            _draw_level(panel, study, arm, size)
            if arm.axis is not None:
                label = arm.axis.partition("=")[2], size
                highest[label] = max(arm.level.mean, highest.get(label, -math.inf))
        for (value, size), mean in highest.items():
            panel.annotate(
                value, (size, mean), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8, color=GRAY
            )
        if study.metric.startswith("recall/accuracy"):
            chances = {row["metrics"].get("recall/chance") for arm, _ in points for row in arm.rows} - {None}
            for chance in sorted(chances):
                mark_chance(panel, chance)
        _log_scale(panel)
        panel.set_xlabel("parameters")
        panel.set_title("at the end of training" if axis is None else f"over {axis}", fontsize=11)
    better = "higher is better" if study.higher_is_better else "lower is better"
    panels[0].set_ylabel(f"{_in_lines(_metric(study, arms))}\n({better})")
    _legend_of_levels(study, figure, panels[0], arms, columns=4)
    return figure


def _sizes(study: StudyConfig, arms: Sequence[ArmResult], axis: str | None) -> list[tuple[ArmResult, float]]:
    """Trained arms on an axis, with those that it does not change, and their parameters; without axes all of them."""
    here = [
        arm
        for arm in arms
        if arm.arm in study.arms and arm.level.n and (arm.axis or f"{axis}=").startswith(f"{axis}=")
        if arm.axis is not None or axis is None or arm.arm in study.axes[axis].fixed
    ]
    sizes = [(arm, arm.mean_of("parameters/total")) for arm in here]
    return [(arm, size) for arm, size in sizes if not math.isnan(size)]


def plot_by_position(study: StudyConfig, arms: Sequence[ArmResult], seq_len: int) -> Figure | None:
    """Loss over position: the arms, and for each what was switched at evaluation beside it.

    Mean over seeds, band from lowest to highest, from a quarter of the training length on: before it nothing differs.
    None if no row has the buckets of `loss_by_position_evaluation`, or if there is an axis.
    """
    found = {arm.arm: curve for arm in arms if (curve := _over_position(arm, seq_len // 4)) is not None}
    if not found or study.axes:
        return None
    trained = _few(study, [name for name in study.arms if name in found])
    panels_of = {f"as trained{_part(i, trained)}": few for i, few in enumerate(trained)}
    for own in study.arms:
        switched = [name for name, variant in study.variants.items() if variant.arm == own and name in found]
        if own in found and switched:
            parts = in_panels([own, *switched], [own])
            title = f"{study.shown(own)}: switched at evaluation only"
            panels_of |= {f"{title}{_part(i, parts)}": few for i, few in enumerate(parts)}
    columns = min(2, len(panels_of))
    rows = -(-len(panels_of) // columns)
    figure, panels = new_figure(rows, columns, width=6.5 * columns, height=4.2 * rows)
    for panel in panels[len(panels_of) :]:
        panel.set_visible(False)
    colors = [GRAY, *COLORS]
    for panel, (title, names) in zip(panels, panels_of.items(), strict=False):
        for i, name in enumerate(names):
            x, values = found[name]
            style = {"color": colors[i], "linestyle": "-"}
            if title.startswith("as trained"):
                style = _style(study, name)
            is_own = title.startswith("as trained") or name == names[0]
            label = study.shown(name) if is_own else name.removeprefix(f"{names[0]}, ")
            panel.plot(x, values.mean(axis=0), marker="o", markersize=3, label=label, **style)  # type: ignore[arg-type]
            panel.fill_between(x, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.1, linewidth=0)
        panel.axvline(seq_len, color=GRAY, linewidth=1, linestyle=":", label="training length")
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda position, _: f"{position:.0f}")
        label_axes(panel, title, "position in the text, tokens", "nats per token")
        panel.legend(frameon=False, fontsize=8)
    return figure


def _part(i: int, parts: Sequence[Any]) -> str:
    """Which panel this is of several with one title."""
    return f" ({i + 1} of {len(parts)})" if len(parts) > 1 else ""


def _over_position(arm: ArmResult, first: int) -> tuple[Floats, Floats] | None:
    """Centres of the buckets from position `first` on (n,), geometric, and the losses (seeds, n); None without.

    Runs that diverged have none.
    """
    by_seed = []
    for row in arm.rows:
        found = ((BUCKET.fullmatch(key), value) for key, value in row["metrics"].items())
        buckets = sorted((int(match[1]), int(match[2]), value) for match, value in found if match)
        if beyond := [bucket for bucket in buckets if bucket[0] >= first]:
            by_seed.append(beyond)
    if not by_seed:
        return None
    centers = np.array([math.sqrt(start * end) for start, end, _ in by_seed[0]])
    return centers, np.array([[value for _, _, value in buckets] for buckets in by_seed])


def total_flops(
    base: Mapping[str, Any], arm: ArmResult, rows: Mapping[str, Row], *, training: bool, students: int
) -> float:
    """FLOPs per run of an arm: the student's, the teacher's passes, and what was prepared; nan without finished runs.

    Args:
        training: count the training of a teacher that was prepared. One that trains along counts always.
        students: that share one teacher: its training, the pass that filled a cache, and a teacher that trains along.
            A frozen teacher passes over the data of each student anew.
    """
    total, passes = arm.mean_of("active_flops"), arm.mean_of("teacher_flops")
    if math.isnan(total):
        return math.nan
    config = apply_overrides(base, arm.rows[0]["overrides"], f"study.arms.{arm.arm}")
    along = (config.get("distillation") or {}).get("source") == "joint"
    total += 0.0 if math.isnan(passes) else passes / (students if along else 1)
    prepared = {row["arm"]: row for row in rows.values() if row["purpose"] == "prepare"}
    names = prepared_names(config)
    for name in names:  # grows: a cache has a teacher
        if name not in prepared:
            return math.nan
        row = prepared[name]
        names += [below for below in prepared_names(row["overrides"]) if below not in names]
        of_cache = row["metrics"].get("teacher_flops", 0.0)
        total += (of_cache + (row["metrics"].get("active_flops", 0.0) if training else 0.0)) / students
    return total


def plot_total_flops(
    study: StudyConfig, base: Mapping[str, Any], arms: Sequence[ArmResult], rows: Mapping[str, Row]
) -> Figure | None:
    """The metric at the end over all FLOPs, a point per arm with its 95% interval; None without teachers."""
    if not any(row["purpose"] == "prepare" or "teacher_flops" in row["metrics"] for row in rows.values()):
        return None
    panels_of = {
        "with the teacher's passes": (False, 1),
        "and with its training": (True, 1),
        f"teacher shared by {STUDENTS} students": (True, STUDENTS),
    }
    shown = [arm for arm in arms if arm.level.n and arm.arm in study.arms]
    if not shown:
        return None
    figure, panels = new_figure(1, len(panels_of), width=13.5, height=4.6)
    for panel, (title, (training, students)) in zip(panels, panels_of.items(), strict=True):
        for arm in shown:
            _draw_level(panel, study, arm, total_flops(base, arm, rows, training=training, students=students))
        _log_scale(panel)
        panel.set_xlabel("FLOPs per student")
        panel.set_title(title, fontsize=11)
    panels[0].set_ylabel(_in_lines(_metric(study, arms)))
    _legend_of_levels(study, figure, panels[0], shown, columns=5)
    return figure


def _log_scale(panel: Axes) -> None:
    """Make the x axis logarithmic, with ticks like 200k."""
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.margins(x=0.12)


def _draw_level(panel: Axes, study: StudyConfig, arm: ArmResult, x: float) -> None:
    """The metric of an arm at x, with its interval if it has one."""
    style = _point(study, arm.arm)
    if arm.level.n > 1:
        panel.vlines(x, arm.level.low, arm.level.high, color=style["color"], linewidth=1.5, alpha=0.6)
    panel.plot(x, arm.level.mean, markersize=7, **style)  # type: ignore[arg-type]


def _legend_of_levels(
    study: StudyConfig, figure: Figure, panel: Axes, arms: Sequence[ArmResult], *, columns: int
) -> None:
    names = [name for name in study.arms if any(arm.arm == name and arm.level.n for arm in arms)]
    handles = [panel.plot([], [], **_point(study, name))[0] for name in names]  # type: ignore[arg-type]
    shown, ncols = list(map(study.shown, names)), min(columns, len(names))
    figure.legend(handles, shown, loc="outside lower center", ncols=ncols, frameon=False, fontsize=9)


def _point(study: StudyConfig, arm: str) -> dict[str, str]:
    style = _style(study, arm)
    return {"color": style["color"], "marker": MARKERS[style["linestyle"]], "linestyle": "none"}


def _band(panel: Axes, curves: Sequence[Mapping[str, Any]], column: str, style: Mapping[str, str]) -> None:
    """Draw one arm."""
    shared = min(len(curve["values"]) for curve in curves)
    x = np.mean([np.array(curve[column][:shared], dtype=float) for curve in curves], axis=0)
    values = np.array([curve["values"][:shared] for curve in curves])
    panel.plot(x, values.mean(axis=0), linewidth=1.8, marker="o", markersize=3, **style)  # type: ignore[arg-type]
    panel.fill_between(x, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.15, linewidth=0)


def _late(curves: Sequence[Mapping[str, Any]]) -> Floats:
    """Values of an arm without those of the first quarter."""
    shared = min(len(curve["values"]) for curve in curves)
    return np.array([curve["values"][shared // 4 : shared] for curve in curves]).ravel()


def _style(study: StudyConfig, arm: str) -> dict[str, str]:
    """The same for an arm in every plot; another dash each time the colors are used up."""
    i = [*study.arms, *study.variants].index(arm)
    return {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i // len(COLORS) % len(DASHES)]}


def _legend(study: StudyConfig, figure: Figure, panel: Axes, names: Sequence[str]) -> None:
    handles = [panel.plot([], [], marker="o", **_style(study, name))[0] for name in names]  # type: ignore[arg-type]
    shown = list(map(study.shown, names))
    figure.legend(handles, shown, loc="outside lower center", ncols=min(4, len(names)), frameon=False, fontsize=9)
