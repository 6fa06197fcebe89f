"""The report of a ladder: what an arm is worth, with its slope, and what could not be said."""

import io
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from moesaic.ladder.analysis import Worth, analyze
from moesaic.ladder.bootstrap import Estimate
from moesaic.ladder.plots import plot_ladder, plot_residuals
from moesaic.ladder.prediction import read_ladder
from moesaic.ladder.report import sentence, write_ladder_report
from moesaic.ladder.rungs import Rungs
from moesaic.studies.jobs import Row

MakeRungs = Callable[..., Rungs]
MakeLadder = Callable[..., Path]


def report(results: Path) -> tuple[str, dict[str, object]]:
    ladder = read_ladder(results)
    console = Console(file=io.StringIO(), width=240)
    arguments = (ladder.config, ladder.study, ladder.rungs.all, ladder.rows, results, "made", "moesaic ladder", console)
    write_ladder_report(*arguments, leaks=ladder.rungs.leaks)
    return (results / "table.md").read_text(), json.loads((results / "summary.json").read_text())


def test_twice_the_compute_is_found_and_told_in_one_sentence(rungs_of: MakeRungs, made_ladder: MakeLadder) -> None:
    results = made_ladder(rungs_of())
    ladder = read_ladder(results)
    analysis = analyze(ladder.config, ladder.cells)
    worth = analysis.worth("16 experts", "FLOPs")
    assert len(worth.values) == 5
    for value in worth.values:
        assert value.low < 2.0 < value.high and 1.6 < value.value < 2.4
    in_seconds = analysis.worth("16 experts", "seconds")
    for value, ratio, there in zip(worth.values, analysis.throughput["16 experts"], in_seconds.values, strict=True):
        assert ratio == pytest.approx(0.8)
        assert there.value == pytest.approx(0.8 * value.value, rel=0.03)
    assert analysis.gates == {"16 experts": True}
    text, summary = report(results)
    assert "16 experts is worth" in text and "times the compute of dense at 1e13 FLOPs" in text
    assert "is not settled" in text, "the factor is the same at all sizes"
    assert "16 experts passes the gate" in text
    assert (results / "ladder.png").stat().st_size > 10_000 and (results / "residuals.png").stat().st_size > 5_000
    assert summary["gates"] == {"16 experts": True}


def test_rates_that_tie_where_they_are_tuned_are_named(rungs_of: MakeRungs, made_ladder: MakeLadder) -> None:
    def tied(row: Row) -> Row:
        if row["purpose"] == "tune" and row["factor"] in (1.0, 2.0):
            apart = 0.001 if row["arm"] == "dense" else 0.01
            row["metrics"]["validation/bits_per_byte"] = 1.5 * (1 + apart * (row["factor"] - 1))
        return row

    text, _ = report(made_ladder(rungs_of(), change=tied))
    assert "a larger rung may prefer the other: dense (x1, x2)." in text


@pytest.mark.slow
def test_equal_arms_do_not_hide_each_other_in_the_pictures(rungs_of: MakeRungs, made_ladder: MakeLadder) -> None:
    ladder = read_ladder(made_ladder(rungs_of("experiment=ladder_experts")))
    analysis = analyze(ladder.config, ladder.cells)
    _, right = plot_ladder(ladder.config, ladder.cells, analysis, []).axes
    at_first = sorted(
        float(np.asarray(line.get_xdata())[0]) for line in right.lines if line.get_label() in analysis.gates
    )
    assert len(at_first) == 3
    assert all(larger / smaller > 1.02 for smaller, larger in itertools.pairwise(at_first))
    figure = plot_residuals(ladder.config, ladder.cells, analysis)
    [legend] = [panel.get_legend() for panel in figure.axes if panel.get_legend() is not None]
    figure.canvas.draw()
    assert legend.get_window_extent().x0 >= figure.axes[-1].get_window_extent().x1, "its marks would pass for runs"


@pytest.mark.slow
def test_a_diverged_run_leaves_no_law_and_is_named(rungs_of: MakeRungs, made_ladder: MakeLadder) -> None:
    def diverged(row: Row) -> Row:
        bad = (row["arm"], row["axis"], row["seed"]) == ("16 experts", "rung=1e12", 2)
        return {**row, "status": "diverged", "error": "the loss is nan", "metrics": {}} if bad else row

    text, summary = report(made_ladder(rungs_of(), change=diverged))
    assert "16 experts: no statement of its worth: 16 experts, rung=1e12, measure, seed 2" in text
    assert summary["gates"] == {}
    notes = text[text.index("± is") :]
    assert notes.count("a law must have all runs of a rung") == 1, "each reason once"
    assert "16 experts, worth in seconds" in notes, "why there is no number in the table"


@pytest.mark.parametrize(
    ("slope", "said"),
    [
        (Estimate(0.05, 0.01, 0.09), r"the factor grows with size (by 1.12 [1.02, 1.23] per decade of compute)"),
        (Estimate(-0.05, -0.09, -0.01), "the factor shrinks with size"),
        (Estimate(0.05, -0.01, 0.09), "is not settled"),
        (Estimate(0.05, -2e3, 2e3), "[0.00, over 1000]"),
    ],
)
def test_the_sentence_says_which_way_it_goes(slope: Estimate, said: str) -> None:
    worth = Worth("many", "FLOPs", ("1e12", "1e13"), (Estimate(1.2, 1, 1.4), Estimate(1.6, 1.4, 1.9)), slope)
    text = sentence(worth, "dense")
    assert text.startswith("many is worth 1.60 [1.40, 1.90] times the compute of dense at 1e13 FLOPs; ")
    assert said in text


def test_a_loss_below_the_asymptote_is_said_so() -> None:
    worth = Worth("many", "FLOPs", ("1e13",), (Estimate(math.inf, 3, math.inf),), Estimate(0.1, 0, 1))
    assert sentence(worth, "dense") == "many at 1e13 is below the asymptote of dense: no compute is enough"
