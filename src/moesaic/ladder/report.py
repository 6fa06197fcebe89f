"""What a ladder leaves to be read: table.md, summary.json, ladder.png and residuals.png, all from rows.jsonl alone."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moesaic.evaluation.plotting import save_figure
from moesaic.files import write_atomically, write_json
from moesaic.ladder.analysis import MEASURES, Analysis, Worth, analyze
from moesaic.ladder.bootstrap import Estimate
from moesaic.ladder.config import LadderConfig, name_of
from moesaic.ladder.plots import plot_ladder, plot_residuals
from moesaic.ladder.points import Cell, cells_of
from moesaic.ladder.prediction import Outcome, outcomes
from moesaic.ladder.rungs import METRIC, Rung
from moesaic.models.leaks import Leaks
from moesaic.studies.config import StudyConfig
from moesaic.studies.jobs import Row, row_key
from moesaic.studies.plan import score
from moesaic.studies.results import processors, scored_windows
from moesaic.studies.tables import markdown_table, number

__all__ = ["PICTURES", "sentence", "write_ladder_report"]

PICTURES = {
    "ladder.png": "loss over compute with its laws, and what an arm is worth",
    "residuals.png": "measured over fitted loss of every run",
}


def write_ladder_report(
    ladder: LadderConfig,
    study: StudyConfig,
    rungs: Sequence[Rung],
    rows: Mapping[str, Row],
    results: Path,
    name: str,
    command: str,
    console: Console,
    *,
    leaks: Mapping[str, Leaks],
) -> None:
    """Print tables and verdicts, and write table.md, summary.json and plots into `results`.

    Args:
        leaks: what the parts of each arm state of later tokens and other sequences.
    """
    cells = cells_of(ladder, study, rows)
    out = {cell.arm: cell.out for cell in cells if cell.out}
    analysis, found = analyze(ladder, cells), outcomes(results, ladder, cells, rows)
    verdicts = _verdicts(study, out, analysis)
    verdicts += [_compared(outcome) for outcome in found]
    tables = {
        "Rungs": _rungs(ladder, rungs),
        "Runs": _runs(ladder, study, cells),
        "Routing": _routing(study, cells, leaks),
        "Laws: bits per byte = asymptote + coefficient · FLOPs^-exponent": _laws(study, out, analysis),
        f"Worth: how many times as much {ladder.baseline} needs for the same loss": _worth(study, out, analysis),
    }
    if found:
        tables["Predictions on record"] = _predictions(found)
    notes = _notes(ladder, study, cells, analysis, rows)
    for title, (columns, lines) in tables.items():
        table = Table(*map(escape, columns), title=escape(title), title_justify="left")
        for line in lines:
            table.add_row(*map(escape, line))
        console.print(table)
    for text in [*verdicts, *notes]:
        console.print(f"- {text}", markup=False, highlight=False, soft_wrap=True)
    save_figure(plot_ladder(ladder, cells, analysis, found), results / "ladder.png")
    save_figure(plot_residuals(ladder, cells, analysis), results / "residuals.png")
    paragraphs = [
        f"# {name}",
        f"**Question.** {ladder.question}",
        f"**Command.** `{command}`",
        "\n".join(["**Verdict**, made from the numbers:", "", *(f"- {text}" for text in verdicts)]),
        *(f"{title}:\n\n{markdown_table(columns, lines)}" for title, (columns, lines) in tables.items()),
        "\n".join(f"- {note}" for note in notes),
        *(f"![{caption}]({file})" for file, caption in PICTURES.items()),
    ]
    write_atomically(results / "table.md", "\n\n".join(paragraphs) + "\n")
    told = (cells, leaks, analysis, found, verdicts, notes)
    write_json(results / "summary.json", _summary(ladder, name, command, *told))


def _verdicts(study: StudyConfig, out: Mapping[str, str], analysis: Analysis) -> list[str]:
    """What each arm is worth, and whether it passes the gate; one that leaks is worth nothing by any number."""
    found = []
    for arm in analysis.throughput:
        worth = dataclasses.replace(analysis.worth(arm, "FLOPs"), arm=study.shown(arm))
        found.append(f"{study.shown(arm)}: {out[arm]}" if arm in out else sentence(worth, study.baseline))
    for arm, passed in analysis.gates.items():
        if (mark := study.mark_of(arm)) is not None:
            found.append(f"{arm} does not count at the gate: it {mark}")
        else:
            found.append(_gate(arm, passed, analysis.throughput[arm]))
    return found


def sentence(worth: Worth, baseline: str) -> str:
    """What an arm is worth at the largest rung, and which way it goes with size."""
    if not worth.values or worth.slope is None:
        return f"{worth.arm}: no statement of its worth: {worth.reason}"
    last, slope = worth.values[-1], worth.slope
    if math.isinf(last.value):
        return f"{worth.arm} at {worth.rungs[-1]} is below the asymptote of {baseline}: no compute is enough"
    text = f"{worth.arm} is worth {_short(last)} times the compute of {baseline} at {worth.rungs[-1]} FLOPs"
    if math.isnan(slope.value):
        return text
    if slope.low > 0:
        trend = "the factor grows with size"
    elif slope.high < 0:
        trend = "the factor shrinks with size"
    else:
        trend = "whether the factor changes with size is not settled"
    return f"{text}; {trend} (by {_short(_per_decade(slope))} per decade of compute)"


def _per_decade(slope: Estimate) -> Estimate:
    """By how much a worth changes over ten times the compute."""
    with np.errstate(over="ignore"):
        return Estimate(*(float(np.power(10.0, x)) for x in (slope.value, slope.low, slope.high)))


def _short(estimate: Estimate) -> str:
    value, low, high = (
        f"{x:.2f}" if abs(x) < MOST_SHOWN else f"{'below -' if x < 0 else 'over '}{MOST_SHOWN}"
        for x in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value} [{low}, {high}]"


CLOSE = 0.003
"""A share of the loss. Rates that tied on one seed at 5e10 FLOPs had losses 8% apart at 8e11 (docs/LOG.md)."""

MOST_SHOWN = 1000
"""Beyond it an interval says that nothing is known."""


def _gate(arm: str, passed: bool, throughput: Sequence[float]) -> str:
    ratio = f"{min(throughput):.2f} to {max(throughput):.2f}"
    verb = "passes" if passed else "does not pass"
    return (
        f"{arm} {verb} the gate: its worth in FLOPs times its speed (FLOPs per second are {ratio} of the baseline's) "
        "must exceed 1 with 95% confidence at two rungs"
    )


def _compared(outcome: Outcome) -> str:
    prediction = outcome.prediction
    seeds = "1 seed" if outcome.seeds == 1 else f"{outcome.seeds} seeds"
    predicted, measured = prediction.arms[outcome.arm].expected, f"{outcome.measured:.4f} ({seeds})"
    place = "inside" if outcome.inside else "outside"
    changed = "" if outcome.rows_unchanged else "; the rows that it was made from have changed since"
    return (
        f"{outcome.arm} at {prediction.rung.name}: predicted {predicted.value:.4f} [{predicted.low:.4f}, "
        f"{predicted.high:.4f}] on {prediction.date[:10]}, measured {measured}: {100 * outcome.error:+.2f}%, {place} "
        f"the interval, {prediction.ratio:.3g} times the largest fitted rung{changed}"
    )


Lines = tuple[list[str], list[list[str]]]


def _rungs(ladder: LadderConfig, rungs: Sequence[Rung]) -> Lines:
    """The shapes that all arms have."""
    columns = ["rung", "width", "layers", "tokens", "tokens per parameter", "batch"]
    fitted = {name_of(flops) for flops in ladder.rungs}
    lines = []
    for rung in rungs:
        line = [rung.name + ("" if rung.name in fitted else " (target)"), f"{rung.dim}", f"{rung.num_layers}"]
        line += [f"{rung.tokens:,}", f"{rung.tokens / rung.parameters:.1f}", f"{rung.tokens_per_step:,}"]
        lines.append(line)
    return columns, lines


def _runs(ladder: LadderConfig, study: StudyConfig, cells: Sequence[Cell]) -> Lines:
    columns = ["arm", "rung", "seeds", "bits per byte ± 95%", "active FLOPs", "parameters", "active"]
    columns += ["learning rates", "seconds", "tokens/s"]
    lines = []
    for cell in cells:
        if cell.out:
            continue
        done = cell.finished
        target = "" if cell.rung in {name_of(flops) for flops in ladder.rungs} else " (target)"
        line = [study.shown(cell.arm), cell.rung + target]
        line += [f"{len(done)} of {len(cell.rows) + len(cell.missing)}", str(cell.score)]
        line += [f"{cell.flops:.3g}" if done else "-"]
        line += [f"{cell.mean_of(name):,.0f}" if done else "-" for name in ("parameters/total", "parameters/active")]
        line += ["-" if cell.factor is None else f"x{cell.factor:g}"]
        lines.append(
            line + [f"{cell.mean_of(name):,.0f}" if done else "-" for name in ("seconds", "tokens_per_second")]
        )
    return columns, lines


def _routing(study: StudyConfig, cells: Sequence[Cell], leaks: Mapping[str, Leaks]) -> Lines:
    """What each arm may look at, and what its routers did: means over seeds and MoE layers."""
    columns = ["arm", "rung", "causal", "batch", "experts per token", "tokens without expert"]
    columns += ["fullest expert over its share", "dead experts"]
    lines = []
    for cell in cells:
        if cell.out or not cell.finished:
            continue
        routed = [cell.mean_matching(f"router/*/{name}") for name in ("experts_per_token", "no_expert_share")]
        health = [cell.mean_matching(f"router/*/{name}") for name in ("max_violation", "dead_share")]
        line = [study.shown(cell.arm), cell.rung, *leaks[cell.arm].words, number(routed[0], ".2f")]
        lines.append([*line, number(routed[1], ".1%"), number(1 + health[0], ".2f"), number(health[1], ".1%")])
    return columns, lines


def _laws(study: StudyConfig, out: Collection[str], analysis: Analysis) -> Lines:
    columns = ["arm", "asymptote", "coefficient", "exponent", "largest rung by the others", "measured", "so"]
    lines = []
    for fit in analysis.fits:
        if fit.arm in out:
            continue
        line = [study.shown(fit.arm)]
        if fit.law is None:
            line += [fit.asymptote, "-", "-"]
        else:
            law = fit.law
            line += [f"{law.asymptote:.3f} ({fit.asymptote})", f"{law.coefficient:.4g}", f"{law.exponent:.4f}"]
        if fit.held is None:
            line += ["-", "-", fit.reason]
        else:
            held = fit.held
            line += [str(held.expected), f"{held.measured:.4f}", "refuted" if held.refuted else "holds"]
        lines.append(line)
    return columns, lines


def _worth(study: StudyConfig, out: Collection[str], analysis: Analysis) -> Lines:
    columns = ["arm", "rung", *(f"in {measure}" for measure in MEASURES), "FLOPs per second to the baseline's"]
    lines = []
    for arm, ratios in analysis.throughput.items():
        if arm in out:
            continue
        worths = [analysis.worth(arm, measure) for measure in MEASURES]
        for i, rung in enumerate(worths[0].rungs):
            values = [_short(worth.values[i]) if worth.values else "-" for worth in worths]
            lines.append([study.shown(arm), rung, *values, f"{ratios[i]:.2f}" if i < len(ratios) else "-"])
        slopes = ["-" if worth.slope is None else _short(worth.slope) for worth in worths]
        lines.append([study.shown(arm), "slope", *slopes, "-"])
    return columns, lines


def _predictions(found: Sequence[Outcome]) -> Lines:
    columns = ["arm", "rung", "predicted", "other asymptote", "measured", "difference", "inside", "written", "commit"]
    lines = []
    for outcome in found:
        prediction = outcome.prediction
        predicted = prediction.arms[outcome.arm]
        other = "-" if predicted.other_law is None else str(predicted.other_law)
        line = [outcome.arm, prediction.rung.name, str(predicted.expected), other, f"{outcome.measured:.4f}"]
        line += [f"{100 * outcome.error:+.2f}%", "yes" if outcome.inside else "no", prediction.date]
        lines.append([*line, (prediction.commit or "-")[:12]])
    return columns, lines


def _notes(
    ladder: LadderConfig, study: StudyConfig, cells: Sequence[Cell], analysis: Analysis, rows: Mapping[str, Row]
) -> list[str]:
    notes = [
        "± is Student's t over seeds. Brackets are 95% intervals by a bootstrap over seeds and rungs.",
        "Active FLOPs are of the training, head and attention included. Where tokens choose how many experts they "
        "have, they are by the mean number over the logged steps.",
        "For tokens per parameter, a parameter is two forward FLOPs per token of the baseline.",
        f"Worth is by laws with the asymptote pinned at {ladder.asymptote:g} bits per byte; a slope is d ln(worth) / "
        "d ln(measure).",
        *([f"Laws are of the rungs {', '.join(ladder.fitted())}."] if len(ladder.fitted()) < len(ladder.rungs) else []),
    ]
    if scored := scored_windows(rows.values()):
        notes.append(f"{METRIC}: {scored} of the validation split, drawn with a fixed seed, the same for all runs.")
    if ladder.tune is not None:
        edge = sorted({cell.arm for cell in cells if cell.at_edge})
        text = "Learning rates are tuned at the lowest rung, on a seed of its own, and moved by the rules of transfer."
        notes.append(text + (f" The best is at the edge of what was tried: {', '.join(edge)}." if edge else ""))
        if close := _close_rates(study, rows):
            notes.append(
                f"At the lowest rung two rates are within {100 * CLOSE:g}% of each other, and a larger rung may prefer "
                f"the other: {', '.join(close)}."
            )
    notes += [f"{study.shown(arm)}: {why}" for arm, why in {cell.arm: cell.out for cell in cells if cell.out}.items()]
    if ladder.drop is not None:
        notes.append(
            f"Arms were dropped by the runs at {name_of(ladder.drop.rung)}. Those that were kept look better there "
            "than they are, by the luck of their seeds. Nothing was selected by runs at larger rungs."
        )
    notes += _unsaid(analysis, {f"{cell.arm}: {cell.out}" for cell in cells if cell.out})
    for cell in cells:
        notes += [f"diverged: {row_key(row)}: {row['error']}" for row in cell.diverged]
        if cell.missing:
            notes.append(f"missing: {cell.arm} at {cell.rung}, seed {', '.join(map(str, cell.missing))}")
    if len(kinds := processors(rows.values())) > 1:
        notes.append(f"Seconds cannot be compared: processors with {' and with '.join(kinds)}.")
    cpu = math.fsum(row["cpu_seconds"] for row in rows.values())
    where = {
        name: sorted({str(row[name])[:12] for row in rows.values() if row.get(name) is not None})
        for name in ("data_hash", "commit", "torch", "python")
    }
    known = ", ".join(f"{name} {' and '.join(values)}" for name, values in where.items() if values)
    notes.append(f"{len(rows)} rows, {cpu / 3600:.2f} CPU hours. {known}")
    if any(row["uncommitted_changes"] for row in rows.values()):
        notes.append("Some rows were made with uncommitted changes in src/ or conf/.")
    return notes


def _close_rates(study: StudyConfig, rows: Mapping[str, Row]) -> list[str]:
    """The arms for which another learning rate was nearly as good as the one that was chosen, with both."""
    found = []
    for arm in study.arms:
        tuned = [row for row in rows.values() if (row["arm"], row["purpose"]) == (arm, "tune")]
        scores = sorted((score(study, row), row["factor"]) for row in tuned)
        if len(scores) > 1 and scores[1][0] - scores[0][0] < CLOSE * scores[0][0]:
            found.append(f"{study.shown(arm)} (x{scores[0][1]:g}, x{scores[1][1]:g})")
    return found


def _unsaid(analysis: Analysis, said: Collection[str]) -> list[str]:
    """Why a law or a worth is missing, each reason once, without those that are said elsewhere."""
    of_reason: dict[str, list[str]] = {}
    for fit in analysis.fits:
        of_reason.setdefault(fit.reason, []).append(f"{fit.arm}, {fit.asymptote} asymptote")
    for worth in analysis.worths:
        of_reason.setdefault(worth.reason, []).append(f"{worth.arm}, worth in {worth.measure}")
    return [f"{'; '.join(what)}: {reason}" for reason, what in of_reason.items() if reason and reason not in said]


def _summary(
    ladder: LadderConfig,
    name: str,
    command: str,
    cells: Sequence[Cell],
    leaks: Mapping[str, Leaks],
    analysis: Analysis,
    found: Sequence[Outcome],
    verdicts: Sequence[str],
    notes: Sequence[str],
) -> dict[str, Any]:
    results = [
        {
            "arm": cell.arm,
            "rung": cell.rung,
            "values": {row["seed"]: row["metrics"][METRIC] for row in cell.finished},
            "factor": cell.factor,
            "missing": list(cell.missing),
            "diverged": [row["seed"] for row in cell.diverged],
        }
        for cell in cells
        if not cell.out
    ]
    compared = [
        {
            "arm": outcome.arm,
            "rung": outcome.prediction.rung.name,
            "predicted": _finite(outcome.prediction.arms[outcome.arm].expected),
            "measured": outcome.measured,
            "inside": outcome.inside,
            "rows_unchanged": outcome.rows_unchanged,
        }
        for outcome in found
    ]
    return {
        "ladder": name,
        "question": ladder.question,
        "baseline": ladder.baseline,
        "command": command,
        "results": results,
        "dropped": {cell.arm: cell.out for cell in cells if cell.out},
        "routing": {arm: dataclasses.asdict(each) for arm, each in leaks.items()},
        **_of_analysis(analysis),
        "predictions": compared,
        "verdicts": list(verdicts),
        "notes": list(notes),
    }


def _of_analysis(analysis: Analysis) -> dict[str, Any]:
    fits = [
        {
            "arm": fit.arm,
            "asymptote": fit.asymptote,
            "law": None if fit.law is None else dataclasses.asdict(fit.law),
            "refuted": None if fit.held is None else fit.held.refuted,
            "reason": fit.reason or None,
        }
        for fit in analysis.fits
    ]
    worths = [
        {
            "arm": worth.arm,
            "measure": worth.measure,
            "rungs": list(worth.rungs),
            "values": [_finite(value) for value in worth.values],
            "slope": None if worth.slope is None else _finite(worth.slope),
            "throughput": list(analysis.throughput[worth.arm]),
            "reason": worth.reason or None,
        }
        for worth in analysis.worths
    ]
    return {"laws": fits, "worth": worths, "gates": analysis.gates}


def _finite(estimate: Estimate) -> dict[str, float | None]:
    """As a mapping; JSON has neither nan nor inf."""
    numbers = dataclasses.asdict(estimate)
    return {key: number if math.isfinite(number) else None for key, number in numbers.items()}
