"""What a study leaves to be read: table.md, summary.json and plots, all made from rows.jsonl alone."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moesaic.config import flatten
from moesaic.evaluation.plotting import save_figure
from moesaic.files import write_atomically, write_json
from moesaic.models.leaks import Leaks
from moesaic.statistics import Interval
from moesaic.studies.config import StudyConfig
from moesaic.studies.jobs import Row, shown_key
from moesaic.studies.moving import moved_rates, plot_rates
from moesaic.studies.plots import plot_by_position, plot_curves, plot_effects, plot_parameters, plot_total_flops
from moesaic.studies.results import ArmResult, processors, scored_windows, summarize_study
from moesaic.studies.stated import leaks_of_cell, marks_of
from moesaic.studies.tables import bounds, markdown_table, number

__all__ = ["PICTURES", "write_study_report", "written"]

PICTURES = {
    "effect.png": "differences to the baseline with 95% intervals",
    "curves.png": "checks during training over what was spent",
    "parameters.png": "the end of training over the parameters of the model",
    "by_position.png": "loss over the position in the text, as trained and switched at evaluation",
    "rates.png": "the end of training over the factor on the learning rates",
    "total_flops.png": "the end of training over FLOPs, those of the teacher counted in",
}
"""The pictures that a study can have, in their order in table.md."""


EDGE = "†"


def written(results: Path, *also: str) -> str:
    """The line that names what a study left in its directory.

    Args:
        also: names of further files.
    """
    made = ("rows.jsonl", "table.md", "summary.json", *PICTURES, *also)
    return f"written: {results}/{', '.join(name for name in made if (results / name).exists())}"


def write_study_report(
    study: StudyConfig,
    base: Mapping[str, Any],
    rows: Mapping[str, Row],
    results: Path,
    command: str,
    console: Console,
    verdicts: Sequence[str] = (),
    then: Sequence[str] = (),
) -> None:
    """Print table and verdict, and write table.md, summary.json and plots into `results`.

    They are of every seed that was asked for or has a row: a run of fewer seeds must not hide what is known.

    Args:
        verdicts: sentences in place of those that the numbers alone make.
        then: what to try next, a sentence each.
    """
    marks = {row["arm"]: row["mark"] for row in rows.values() if row.get("mark") and row["arm"] in study.arms}
    marks = {**marks_of(study, base), **marks, **study.marks}  # what was marked once stays so
    study = dataclasses.replace(study, marks=marks)
    measured = {row["seed"] for row in rows.values() if row["purpose"] == "measure" and row["arm"] in study.arms}
    study = dataclasses.replace(study, seeds=tuple(sorted({*study.seeds, *measured})))
    arms = summarize_study(study, rows)
    better = f"{'higher' if study.higher_is_better else 'lower'} is better"
    metric = " ".join(filter(None, [study.metric, scored_windows(rows.values())]))
    title = f"{base['name']}: {metric}, {better}"
    columns, lines = _table(study, base, arms)
    table = Table(*map(escape, columns), title=escape(title))
    for line in lines:
        table.add_row(*map(escape, line))
    console.print(table)
    verdicts = list(verdicts) or [arm.verdict for arm in arms if arm.verdict]
    verdicts += [
        *(f"{metric}: {arm.verdict}" for metric, arm in _judged(study, rows)),
        *(each.sentence for each in moved_rates(study, rows)),
    ]
    notes = _notes(study, base, arms, rows)
    for text in [*verdicts, *then, *notes]:
        console.print(f"- {text}", markup=False, highlight=False, soft_wrap=True)
    paragraphs = [
        f"# {base['name']}",
        f"**Question.** {study.question}",
        f"**Held equal.** {study.equal}",
        f"**Command.** `{command}`",
        "\n".join(["**Verdict**, made from the numbers:", "", *(f"- {text}" for text in verdicts)]),
        *(["\n".join(["**What to try next**", "", *(f"- {text}" for text in then)])] if then else []),
        f"{metric}, {better}:",
        markdown_table(columns, lines),
        "\n".join(f"- {note}" for note in notes),
    ]
    paragraphs += _pictures(study, base, arms, rows, results)
    write_atomically(results / "table.md", "\n\n".join(paragraphs) + "\n")
    write_json(results / "summary.json", _summary(study, base, arms, rows, command, notes))


def _judged(study: StudyConfig, rows: Mapping[str, Row]) -> list[tuple[str, ArmResult]]:
    """Every arm that has another metric, with a verdict against the arm that is named for it."""
    return [
        (metric, arm)
        for metric, baseline in study.judged.items()
        for arm in summarize_study(dataclasses.replace(study, metric=metric, baseline=baseline), rows)
        if arm.difference is not None and arm.difference.n
    ]


def _pictures(
    study: StudyConfig, base: Mapping[str, Any], arms: Sequence[ArmResult], rows: Mapping[str, Row], results: Path
) -> list[str]:
    """Write the pictures that there is something for; returns what shows them in Markdown."""
    drawn = (
        plot_effects(study, arms),
        plot_curves(study, arms),
        plot_parameters(study, arms),
        plot_by_position(study, arms, base["training"]["seq_len"]),
        plot_rates(study, rows),
        plot_total_flops(study, base, arms, rows),
    )
    shown = []
    for (name, caption), figure in zip(PICTURES.items(), drawn, strict=True):
        if figure is None:
            (results / name).unlink(missing_ok=True)  # of what the study no longer has
        else:
            save_figure(figure, results / name)
            shown.append(f"![{caption}]({name})")
    return shown


def _table(study: StudyConfig, base: Mapping[str, Any], arms: Sequence[ArmResult]) -> tuple[list[str], list[list[str]]]:
    switched = any(arm.switched is not None for arm in arms)
    columns = ["arm", "seeds", "mean ± 95%", "difference [95%]", *(["to its own arm [95%]"] if switched else [])]
    columns += ["learning rate", "parameters", "active", "FLOPs", "seconds", "CPU s", "tuning", "causal", "batch"]
    columns += _short(study.also)
    lines = []
    for arm in arms:
        cells = [arm.name, f"{arm.level.n} of {len(study.seeds)}", str(arm.level)]
        differences = [arm.difference, arm.switched] if switched else [arm.difference]
        cells += ["-" if difference is None else bounds(difference) for difference in differences]
        cells += [_rate(study, base, arm)]
        cells += [number(arm.mean_of(name), ",.0f") for name in ("parameters/total", "parameters/active")]
        cells += [number(arm.mean_of("active_flops"), ".3g")]
        cells += [number(arm.mean_of(name), ".0f") for name in ("seconds", "cpu_seconds")]
        cells += [f"{arm.tuning_cpu_seconds:.0f}" if arm.tuning_cpu_seconds else "-"]
        cells += _stated(study, base, arm).words
        lines.append([*cells, *(number(arm.mean_of(name), ".4g") for name in study.also)])
    return columns, lines


def _stated(study: StudyConfig, base: Mapping[str, Any], arm: ArmResult) -> Leaks:
    """What the parts of an arm state, or those of the arm that a variant evaluates."""
    trained = study.variants[arm.arm].arm if arm.arm in study.variants else arm.arm
    return leaks_of_cell(base, next(cell for cell in study.cells if (cell.arm, cell.axis) == (trained, arm.axis)))


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
    elif arm.tuning.failed:
        return "all diverged"
    elif arm.tuning.best is None:
        return "not yet found"
    else:
        return f"x{arm.tuning.best:g}"
    return f"{rate:g} (x{arm.tuning.best:g}){EDGE if arm.tuning.at_edge else ''}"


def _notes(
    study: StudyConfig, base: Mapping[str, Any], arms: Sequence[ArmResult], rows: Mapping[str, Row]
) -> list[str]:
    notes = [
        f"95% intervals over seeds by Student's t; differences to {study.shown(study.baseline)}, paired by seed, which "
        "is also the data order.",
        "Causal: no token's output depends on later ones. Batch: it depends on other sequences. Both as the classes of "
        "the parts state them, in training.",
        "Per run: active FLOPs, seconds of training, CPU seconds of everything; tuning: CPU seconds in all.",
    ]
    notes += _lengths(study, base, arms)
    if len(study.seeds) < 2:
        notes.append("One seed: no interval.")
    if scored := scored_windows(rows.values()):
        notes.append(
            f"Scores are {scored} of the validation split, drawn with a fixed seed, the same for all arms. Intervals "
            "are over seeds, on these windows."
        )
    notes += [_preparation(row) for row in rows.values() if row["purpose"] == "prepare"]
    compared = sum((arm.difference is not None) + (arm.switched is not None) for arm in arms)
    if compared > 2:
        notes.append(f"Each interval stands for itself: no correction for {compared} comparisons.")
    if any(arm.tuning.at_edge for arm in arms):
        notes.append(f"{EDGE} the best learning rate is at the edge of what was tried.")
    tried = [row for row in rows.values() if row["purpose"] == "tune" and row["status"] != "finished"]
    for row in [*(row for arm in arms for row in arm.rows if row["status"] != "finished"), *tried]:
        notes.append(f"diverged: {shown_key(study, row)}: {row['error']}")
    for arm in arms:
        if arm.missing:
            notes.append(f"missing: {arm.name}, seed {', '.join(map(str, arm.missing))}")
    if len(kinds := processors(rows.values())) > 1:
        notes.append(f"Seconds of arms cannot be compared: processors with {' and with '.join(kinds)}.")
    cpu = math.fsum(row["cpu_seconds"] for row in rows.values())
    where = {
        name: sorted({str(row[name])[:12] for row in rows.values() if row[name] is not None})
        for name in ("data_hash", "commit", "torch")
    }
    where["Python"] = sorted({row["python"] for row in rows.values() if "python" in row})
    known = ", ".join(f"{name} {' and '.join(values)}" for name, values in where.items() if values)
    notes.append(f"{len(rows)} rows, {cpu / 3600:.2f} CPU hours. {known}")
    if any(row["uncommitted_changes"] for row in rows.values()):
        notes.append("Some rows were made with uncommitted changes in src/ or conf/.")
    return notes


def _lengths(study: StudyConfig, base: Mapping[str, Any], arms: Sequence[ArmResult]) -> list[str]:
    """Say on how long windows the arms were trained and scored, and what a guess would score."""
    rows = [row for arm in arms for row in arm.rows]
    trained = {row["overrides"].get("training.seq_len", base["training"]["seq_len"]) for row in rows}
    scored = {row["metrics"]["validation/seq_len"] for row in rows if "validation/seq_len" in row["metrics"]}
    if not trained:
        return []
    notes = f"Trained on windows of {_listed(trained)} tokens"
    if study.metric.startswith("validation/") and scored:
        notes += f", scored on windows of {_listed(scored)}"
    if study.metric.startswith("recall/"):
        notes += "; a metric with length=4x is on sequences four times as long"
    chances = {row["metrics"]["recall/chance"] for row in rows if "recall/chance" in row["metrics"]}
    if study.metric.startswith("recall/") and chances:
        notes += f"; chance is {' and '.join(f'{chance:.3g}' for chance in sorted(chances))}"
    return [f"{notes}."]


def _listed(numbers: Collection[float]) -> str:
    return " and ".join(f"{number:,.0f}" for number in sorted(numbers))


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
            **({"mark": mark} if (mark := study.mark_of(arm.arm)) else {}),
            "cpu_seconds": [row["cpu_seconds"] for row in arm.rows],
            "tuning_cpu_seconds": arm.tuning_cpu_seconds,
        }
        for arm in arms
    ]
    judged = [
        {"metric": metric, "arm": arm.arm, "difference": _finite(arm.difference), "verdict": arm.verdict}
        for metric, arm in _judged(study, rows)
        if arm.difference is not None
    ]
    moves = [{**dataclasses.asdict(each), "cost": _finite(each.cost)} for each in moved_rates(study, rows)]
    described = {name: getattr(study, name) for name in ("question", "equal", "metric", "higher_is_better", "baseline")}
    return {
        "study": base["name"],
        **described,
        "command": command,
        "complete": not any(arm.missing for arm in arms),
        "prepared": {row["arm"]: row["cpu_seconds"] for row in rows.values() if row["purpose"] == "prepare"},
        "cpu_seconds": round(math.fsum(row["cpu_seconds"] for row in rows.values()), 1),
        "results": results,
        **({"judged": judged} if judged else {}),
        **({"moved_rates": moves} if moves else {}),
        "notes": list(notes),
    }


def _finite(value: Interval) -> dict[str, Any]:
    """As a mapping; JSON has no nan."""
    numbers = dataclasses.asdict(value)
    return {
        key: None if isinstance(number, float) and math.isnan(number) else number for key, number in numbers.items()
    }
