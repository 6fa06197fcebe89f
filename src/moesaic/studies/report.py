"""What a study leaves to be read: table.md, summary.json and plots, all made from rows.jsonl alone."""

import dataclasses
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from rich.console import Console
from rich.table import Table

from moesaic.config import flatten
from moesaic.evaluation.plotting import COLORS, GREY, Floats, label_axes, new_figure, save_figure
from moesaic.files import write_atomically, write_json
from moesaic.overrides import apply_overrides
from moesaic.studies.config import StudyConfig
from moesaic.studies.jobs import Row, prepared_names, row_key
from moesaic.studies.statistics import ArmResult, Interval, summarise

__all__ = [
    "PICTURES",
    "plot_by_position",
    "plot_curves",
    "plot_effects",
    "plot_parameters",
    "plot_total_flops",
    "total_flops",
    "write_study_report",
]

PICTURES = {
    "effect.png": "differences to the baseline with 95% intervals",
    "curves.png": "checks during training over what was spent",
    "parameters.png": "the end of training over the parameters of the model",
    "by_position.png": "loss over the position in the text, as trained and switched at evaluation",
    "total_flops.png": "the end of training over FLOPs, those of the teacher counted in",
}
"""Those that a study can have, in their order in table.md."""

EDGE = "†"
DASHES = ("-", "--", ":", "-.")
STUDENTS = 10
"""Of one teacher, where its cost is shared."""


def write_study_report(
    study: StudyConfig, base: Mapping[str, Any], rows: Mapping[str, Row], results: Path, command: str, console: Console
) -> None:
    """Print table and verdict, and write table.md, summary.json and plots into `results`.

    They are of every seed that was asked for or has a row: a run of fewer seeds must not hide what is known.
    """
    measured = {row["seed"] for row in rows.values() if row["purpose"] == "measure" and row["arm"] in study.arms}
    study = dataclasses.replace(study, seeds=tuple(sorted({*study.seeds, *measured})))
    arms = summarise(study, rows)
    title = f"{base['name']}: {study.metric}, {'higher' if study.higher_is_better else 'lower'} is better"
    columns, lines = _table(study, base, arms)
    table = Table(*columns, title=title)
    for line in lines:
        table.add_row(*line)
    console.print(table)
    verdicts = [arm.verdict for arm in arms if arm.verdict]
    notes = _notes(study, arms, rows)
    for text in [*verdicts, *notes]:
        console.print(f"- {text}", markup=False, highlight=False, soft_wrap=True)
    paragraphs = [
        f"# {base['name']}",
        f"**Question.** {study.question}",
        f"**Held equal.** {study.equal}",
        f"**Command.** `{command}`",
        "\n".join(["**Verdict**, made from the numbers:", "", *(f"- {text}" for text in verdicts)]),
        f"{study.metric}, {title.rpartition(', ')[2]}:",
        "\n".join(_markdown(line) for line in (columns, ["---"] + ["---:"] * (len(columns) - 1), *lines)),
        "\n".join(f"- {note}" for note in notes),
    ]
    drawn = (
        plot_effects(study, arms),
        plot_curves(study, arms),
        plot_parameters(study, arms),
        plot_by_position(study, arms, base["training"]["seq_len"]),
        plot_total_flops(study, base, arms, rows),
    )
    for (name, caption), figure in zip(PICTURES.items(), drawn, strict=True):
        if figure is None:
            (results / name).unlink(missing_ok=True)  # of what the study no longer has
        else:
            save_figure(figure, results / name)
            paragraphs.append(f"![{caption}]({name})")
    write_atomically(results / "table.md", "\n\n".join(paragraphs) + "\n")
    write_json(results / "summary.json", _summary(study, base, arms, rows, command, notes))


def _table(study: StudyConfig, base: Mapping[str, Any], arms: Sequence[ArmResult]) -> tuple[list[str], list[list[str]]]:
    switched = any(arm.switched is not None for arm in arms)
    columns = ["arm", "seeds", "mean ± 95%", "difference [95%]", *(["to its own arm [95%]"] if switched else [])]
    columns += ["learning rate", "parameters", "active", "FLOPs", "seconds", "CPU s", "tuning", *_short(study.also)]
    lines = []
    for arm in arms:
        cells = [arm.name, f"{arm.level.n} of {len(study.seeds)}", _plus_minus(arm.level)]
        differences = [arm.difference, arm.switched] if switched else [arm.difference]
        cells += ["-" if difference is None else _bounds(difference) for difference in differences]
        cells += [_rate(study, base, arm)]
        cells += [_number(arm.mean_of(name), ",.0f") for name in ("parameters/total", "parameters/active")]
        cells += [_number(arm.mean_of("active_flops"), ".3g")]
        cells += [_number(arm.mean_of(name), ".0f") for name in ("seconds", "cpu_seconds")]
        cells += [f"{arm.tuning_cpu_seconds:.0f}" if arm.tuning_cpu_seconds else "-"]
        lines.append([*cells, *(_number(arm.mean_of(name), ".4g") for name in study.also)])
    return columns, lines


def _short(names: Sequence[str]) -> list[str]:
    """Their last parts, with as much before them as tells them apart."""
    parts = [name.split("/") for name in names]
    for keep in range(1, max(map(len, parts), default=1) + 1):
        short = ["/".join(each[-keep:]) for each in parts]
        if len(set(short)) == len(short):
            return short
    return list(names)


def _rate(study: StudyConfig, base: Mapping[str, Any], arm: ArmResult) -> str:
    """The learning rate that was measured; a mark if a better one may lie beyond the factors tried."""
    key = study.tune.keys[0] if study.tune is not None else "optimizer.learning_rate"
    if arm.rows:
        rate = arm.rows[0]["overrides"].get(key, flatten(base).get(key))
    elif arm.tuning.best is None:
        return "not yet found"
    else:
        return f"x{arm.tuning.best:g}"
    return f"{rate:g} (x{arm.tuning.best:g}){EDGE if arm.tuning.at_edge else ''}"


def _notes(study: StudyConfig, arms: Sequence[ArmResult], rows: Mapping[str, Row]) -> list[str]:
    notes = [
        f"95% intervals over seeds by Student's t; differences to {study.baseline}, paired by seed, which is also the "
        "data order.",
        "Per run: active FLOPs, seconds of training, CPU seconds of everything; tuning: CPU seconds in all.",
    ]
    if len(study.seeds) < 2:
        notes.append("One seed: no interval.")
    notes += [_preparation(row) for row in rows.values() if row["purpose"] == "prepare"]
    compared = sum((arm.difference is not None) + (arm.switched is not None) for arm in arms)
    if compared > 2:
        notes.append(f"Each interval stands for itself: no correction for {compared} comparisons.")
    if any(arm.tuning.at_edge for arm in arms):
        notes.append(f"{EDGE} the best learning rate is at the edge of what was tried.")
    tried = [row for row in rows.values() if row["purpose"] == "tune" and row["status"] != "finished"]
    for row in [*(row for arm in arms for row in arm.rows if row["status"] != "finished"), *tried]:
        notes.append(f"diverged: {row_key(row)}: {row['error']}")
    for arm in arms:
        if arm.missing:
            notes.append(f"missing: {arm.name}, seed {', '.join(map(str, arm.missing))}")
    if len(processors := _processors(rows.values())) > 1:
        notes.append(f"Seconds of arms cannot be compared: processors with {' and with '.join(processors)}.")
    cpu = math.fsum(row["cpu_seconds"] for row in rows.values())
    where = {name: sorted({str(row[name])[:12] for row in rows.values()}) for name in ("data_hash", "commit", "torch")}
    where["Python"] = sorted({row["python"] for row in rows.values() if "python" in row})
    known = ", ".join(f"{name} {' and '.join(values)}" for name, values in where.items() if values)
    notes.append(f"{len(rows)} rows, {cpu / 3600:.2f} CPU hours. {known}")
    if any(row["uncommitted_changes"] for row in rows.values()):
        notes.append("Some rows were made with uncommitted changes in src/ or conf/.")
    return notes


def _processors(rows: Iterable[Row]) -> list[str]:
    """Kinds of them, by instruction set, that the rows were made on; old rows do not say."""
    return sorted({row["processor"] for row in rows if row.get("processor") is not None})


def _preparation(row: Row) -> str:
    metrics, found = row["metrics"], []
    for name, form in (("validation/bits_per_byte", ".4f"), ("bytes_per_token", ".0f")):
        if name in metrics:
            found.append(f"{metrics[name]:{form}} {name.rpartition('/')[2].replace('_', ' ')}")
    flops = metrics.get("active_flops", metrics.get("teacher_flops", math.nan))
    told = ", ".join([*found, f"{flops:.3g} FLOPs"])
    return f"prepared: {row['arm']} in {row['cpu_seconds']:.0f} CPU s ({told})"


def _summary(
    study: StudyConfig,
    base: Mapping[str, Any],
    arms: Sequence[ArmResult],
    rows: Mapping[str, Row],
    command: str,
    notes: Sequence[str],
) -> dict[str, Any]:
    results = [
        {
            "arm": arm.arm,
            "axis": arm.axis,
            "values": arm.values,
            "level": _finite(arm.level),
            "baseline": arm.baseline,
            "difference": None if arm.difference is None else _finite(arm.difference),
            "to_its_own_arm": None if arm.switched is None else _finite(arm.switched),
            "verdict": arm.verdict,
            "factor": arm.tuning.best,
            "factor_at_edge": arm.tuning.at_edge,
            "diverged": arm.diverged,
            "missing": list(arm.missing),
            "cpu_seconds": [row["cpu_seconds"] for row in arm.rows],
            "tuning_cpu_seconds": arm.tuning_cpu_seconds,
        }
        for arm in arms
    ]
    described = {name: getattr(study, name) for name in ("question", "equal", "metric", "higher_is_better", "baseline")}
    return {
        "study": base["name"],
        **described,
        "command": command,
        "complete": not any(arm.missing for arm in arms),
        "prepared": {row["arm"]: row["cpu_seconds"] for row in rows.values() if row["purpose"] == "prepare"},
        "cpu_seconds": round(math.fsum(row["cpu_seconds"] for row in rows.values()), 1),
        "results": results,
        "notes": list(notes),
    }


def plot_effects(study: StudyConfig, arms: Sequence[ArmResult]) -> Figure | None:
    """Paired differences to the baseline, dot and 95% bar; None if there is none.

    Arm below arm, or with axes a panel for each axis.
    """
    found = {(arm.arm, arm.axis): arm.difference for arm in arms if arm.difference is not None and arm.difference.n}
    names = [name for name in (*study.arms, *study.variants) if any(name == arm for arm, _ in found)]
    if not names:
        return None
    better = f"{'higher' if study.higher_is_better else 'lower'} is better"
    title = f"difference to {study.baseline}, 95% interval"
    if not study.axes:
        figure, (panel,) = new_figure(1, 1, width=8.5, height=1.4 + 0.3 * len(names))
        for place, name in enumerate(names):
            interval, colour = found[name, None], _style(study, name)["color"]
            panel.hlines(place, interval.low, interval.high, color=colour, linewidth=2, alpha=0.8)
            panel.plot(interval.mean, place, "o", color=colour, markersize=7)
        panel.axvline(0, color=GREY, linewidth=1, linestyle="--")
        panel.set_yticks(range(len(names)), names)
        panel.invert_yaxis()
        panel.margins(y=0.5 / len(names))
        panel.grid(axis="y", visible=False)
        label_axes(panel, title, f"{study.metric} ({better})", "")
        return figure
    widths = [max(4.0, 1.0 + 1.1 * len(axis.values)) for axis in study.axes.values()]
    figure, panels = new_figure(1, len(study.axes), width=max(6.0, sum(widths)), height=4.2)
    for panel, (axis, points) in zip(panels, study.axes.items(), strict=True):
        for i, name in enumerate(names):
            for at, label in enumerate(points.values):
                difference = found.get((name, study.result_cell(name, (axis, label)).axis))
                if difference is None:
                    continue
                x, colour = at + 0.6 * (i - (len(names) - 1) / 2) / len(names), _style(study, name)["color"]
                panel.vlines(x, difference.low, difference.high, color=colour, linewidth=2, alpha=0.8)
                panel.plot(x, difference.mean, "o", color=colour, markersize=7)
        panel.axhline(0, color=GREY, linewidth=1, linestyle="--")
        panel.annotate(
            study.baseline, (1, 0), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
            va="center", color=GREY, fontsize=8, annotation_clip=False,
        )  # fmt: skip
        panel.set_xticks(range(len(points.values)), [textwrap.fill(label, 12) for label in points.values])
        panel.set_xlim(-0.6, len(points.values) - 0.4)
        panel.margins(y=0.15)
        panel.grid(axis="x", visible=False)
        label_axes(panel, title, axis, "")
    panels[0].set_ylabel(f"{study.metric}\n({better})")
    _legend(study, figure, panels[0], names)
    return figure


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
    if len(_processors(row for arm in arms for row in arm.rows)) > 1:
        del columns["seconds"]
    width, height = 4.5 * len(columns), 0.6 + 3.0 * len(study.points)
    figure, panels = new_figure(len(study.points), len(columns), width=width, height=height)
    for line, point in enumerate(study.points):
        for i, (column, label) in enumerate(columns.items()):
            panel = panels[len(columns) * line + i]
            late = []
            for name in names:
                if found := curves.get((name, study.cell(name, point).axis)):
                    late.append(_band(panel, found, column, _style(study, name)))
            if late:
                values = np.concatenate(late)
                margin = 0.05 * max(float(values.max() - values.min()), 1e-3)
                panel.set_ylim(float(values.min()) - margin, float(values.max()) + margin)
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
            panel.set_title(f"{f'{point[0]}={point[1]}: ' if point else ''}over {label}", fontsize=11)
        panels[len(columns) * line].set_ylabel(f"{metric}\n(checks on a part of it)")
    _legend(study, figure, panels[0], names)
    return figure


def plot_parameters(study: StudyConfig, arms: Sequence[ArmResult]) -> Figure | None:
    """The metric at the end over all parameters, a point per arm with its 95% interval, a panel for each axis.

    None if all models are of one size, within 1%.
    """
    sizes = [size for axis in study.axes or [None] for _, size in _sizes(study, arms, axis)]
    if not sizes or max(sizes) <= 1.01 * min(sizes):
        return None
    figure, panels = new_figure(1, max(1, len(study.axes)), width=max(9.0, 6.0 * len(study.axes)), height=4.6)
    for panel, axis in zip(panels, study.axes or [None], strict=True):
        for arm, size in _sizes(study, arms, axis):
            _draw_level(panel, study, arm, size)
            if arm.axis is not None:
                value, at = arm.axis.partition("=")[2], (size, arm.level.mean)
                panel.annotate(value, at, xytext=(6, 4), textcoords="offset points", fontsize=8, color=GREY)
        _log_scale(panel)
        panel.set_xlabel("parameters")
        panel.set_title("at the end of training" if axis is None else f"over {axis}", fontsize=11)
    panels[0].set_ylabel(f"{study.metric}\n({'higher' if study.higher_is_better else 'lower'} is better)")
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


BUCKET = re.compile(r"loss_by_position/as_trained/loss/(\d+)-(\d+)")


def plot_by_position(study: StudyConfig, arms: Sequence[ArmResult], seq_len: int) -> Figure | None:
    """Loss over position: the arms, and for each what was switched at evaluation beside it.

    Mean over seeds, band from lowest to highest, from a quarter of the training length on: before it nothing differs.
    None if no row has the buckets of `loss_by_position_evaluation`, or if there is an axis.
    """
    found = {arm.arm: curve for arm in arms if (curve := _over_position(arm, seq_len // 4)) is not None}
    if not found or study.axes:
        return None
    panels_of = {"as trained": [name for name in study.arms if name in found]}
    for own in study.arms:
        switched = [name for name, variant in study.variants.items() if variant.arm == own and name in found]
        if own in found and switched:
            panels_of[f"{own}: switched at evaluation only"] = [own, *switched]
    columns = min(2, len(panels_of))
    rows = -(-len(panels_of) // columns)
    figure, panels = new_figure(rows, columns, width=6.5 * columns, height=4.2 * rows)
    for panel in panels[len(panels_of) :]:
        panel.set_visible(False)
    colours = [GREY, *COLORS]
    for panel, (title, names) in zip(panels, panels_of.items(), strict=False):
        for i, name in enumerate(names):
            x, values = found[name]
            style = {"color": colours[i % len(colours)], "linestyle": "-" if i < len(colours) else "--"}
            if title == "as trained":
                style = _style(study, name)
            label = name if name == names[0] else name.removeprefix(f"{names[0]}, ")
            panel.plot(x, values.mean(axis=0), marker="o", markersize=3, label=label, **style)  # type: ignore[arg-type]
            panel.fill_between(x, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.1, linewidth=0)
        panel.axvline(seq_len, color=GREY, linewidth=1, linestyle=":", label="training length")
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda position, _: f"{position:.0f}")
        label_axes(panel, title, "position in the text, tokens", "nats per token")
        panel.legend(frameon=False, fontsize=8)
    return figure


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
    centres = np.array([math.sqrt(start * end) for start, end, _ in by_seed[0]])
    return centres, np.array([[value for _, _, value in buckets] for buckets in by_seed])


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
    panels[0].set_ylabel(study.metric)
    _legend_of_levels(study, figure, panels[0], shown, columns=5)
    return figure


def _log_scale(panel: Axes) -> None:
    """Of x, with ticks like 200k."""
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
    figure.legend(handles, names, loc="outside lower center", ncols=min(columns, len(names)), frameon=False, fontsize=9)


def _point(study: StudyConfig, arm: str) -> dict[str, str]:
    style = _style(study, arm)
    return {"color": style["color"], "marker": "os^D"[DASHES.index(style["linestyle"])], "linestyle": "none"}


def _band(panel: Axes, curves: Sequence[Mapping[str, Any]], column: str, style: Mapping[str, str]) -> Floats:
    """Draw one arm; returns its values without those of the first quarter."""
    shared = min(len(curve["values"]) for curve in curves)
    x = np.mean([np.array(curve[column][:shared], dtype=float) for curve in curves], axis=0)
    values = np.array([curve["values"][:shared] for curve in curves])
    panel.plot(x, values.mean(axis=0), linewidth=1.8, marker="o", markersize=3, **style)  # type: ignore[arg-type]
    panel.fill_between(x, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.15, linewidth=0)
    return values[:, shared // 4 :].ravel()


def _style(study: StudyConfig, arm: str) -> dict[str, str]:
    """The same for an arm in every plot; another dash each time the colours are used up."""
    i = [*study.arms, *study.variants].index(arm)
    return {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i // len(COLORS) % len(DASHES)]}


def _legend(study: StudyConfig, figure: Figure, panel: Axes, names: Sequence[str]) -> None:
    handles = [panel.plot([], [], marker="o", **_style(study, name))[0] for name in names]  # type: ignore[arg-type]
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), frameon=False, fontsize=9)


def _markdown(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _plus_minus(value: Interval) -> str:
    if value.n < 2:
        return f"{value.mean:.4f} (n=1)" if value.n else "-"
    return f"{value.mean:.4f} ± {value.high - value.mean:.4f}"


def _bounds(value: Interval) -> str:
    if value.n < 2:
        return f"{value.mean:+.4f} (n=1)" if value.n else "-"
    return f"{value.mean:+.4f} [{value.low:+.4f}, {value.high:+.4f}]"


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _finite(value: Interval) -> dict[str, Any]:
    """As a mapping; JSON has no nan."""
    numbers = dataclasses.asdict(value)
    return {
        key: None if isinstance(number, float) and math.isnan(number) else number for key, number in numbers.items()
    }
