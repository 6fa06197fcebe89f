"""Arms that go no further up a ladder: far behind, beyond the best, or without a rate that holds."""

import dataclasses
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from moesaic.errors import InputError
from moesaic.ladder.analysis import analyze
from moesaic.ladder.dropping import dropped, kept, up_to_drop
from moesaic.ladder.prediction import Ladder, read_ladder, record
from moesaic.ladder.report import write_ladder_report
from moesaic.ladder.rungs import Rungs
from moesaic.studies.jobs import Row
from moesaic.studies.plan import plan

MakeRungs = Callable[..., Rungs]
MakeLadder = Callable[..., Path]
Law = Callable[[str, float], float]

LADDER = ["experiment=ladder_experts", "ladder.rungs=[1e11,3e11,1e12]", "ladder.least=0", "ladder.seeds=[0,1]"]
DROP = "ladder.drop={rung:1e11,behind:0.05}"


def report(ladder: Ladder, results: Path) -> tuple[str, dict[str, object]]:
    console = Console(file=io.StringIO(), width=240)
    arguments = (ladder.config, ladder.study, ladder.rungs.all, ladder.rows, results, "made", "moesaic ladder", console)
    write_ladder_report(*arguments, leaks=ladder.rungs.leaks)
    return (results / "table.md").read_text(), json.loads((results / "summary.json").read_text())


@pytest.fixture
def with_bad_arm(rungs_of: MakeRungs, made_ladder: MakeLadder, law: Law) -> Callable[..., Path]:
    """with_bad_arm("key=value", ...) -> a ladder in which 4 experts are a tenth worse than the others."""

    def make(*words: str, change: Callable[[Row], Row] = lambda row: row) -> Path:
        def of(arm: str, flops: float) -> float:
            return law("dense", flops) * (1.1 if arm == "4 experts" else 1.0)

        return made_ladder(rungs_of(*LADDER, *words), law=of, change=change)

    return make


@pytest.mark.slow
def test_an_arm_far_behind_has_no_runs_above_the_rung(with_bad_arm: Callable[..., Path]) -> None:
    results = with_bad_arm(DROP)
    ladder = read_ladder(results)
    first = up_to_drop(ladder.config, ladder.study)
    assert list(first.axes["rung"].values) == ["1e11"] and first.arms == ladder.study.arms
    early = {key: row for key, row in ladder.rows.items() if row["axis"] == "rung=1e11"}
    out = dropped(ladder.config, ladder.study, early)
    assert list(out) == ["4 experts"]
    assert re.fullmatch(r"dropped at 1e11: \d+\.\d% behind dense, and 5\.0% was the most", out["4 experts"])
    missing = plan(kept(ladder.study, out), ladder.base, early).missing
    assert {job.arm for job in missing} == {"dense", "16 experts", "64 experts"}
    assert {job.axis for job in missing} == {"rung=3e11", "rung=1e12"}
    text, summary = report(ladder, results)
    assert summary["dropped"] == out
    assert "- 4 experts: dropped at 1e11" in text, "in place of a verdict"
    assert "| 4 experts | 1e11 |" in text and "| 4 experts | 3e11 |" not in text
    assert "Nothing was selected by runs at larger rungs." in text
    assert text.count("4 experts: dropped at 1e11") == 2, "the verdict and one note"
    prediction = record(results, 1e13)
    assert set(prediction.arms) == {"dense", "16 experts", "64 experts"}


def test_only_the_best_go_on(with_bad_arm: Callable[..., Path]) -> None:
    ladder = read_ladder(with_bad_arm("ladder.drop={rung:1e11,behind:0.5,keep:2}"))
    out = dropped(ladder.config, ladder.study, ladder.rows)
    assert out == {"4 experts": "dropped at 1e11: number 3 of 3 beside dense, and 2 were kept"}


def test_nothing_is_dropped_before_all_runs_are_there(with_bad_arm: Callable[..., Path]) -> None:
    ladder = read_ladder(with_bad_arm(DROP))
    rows = {
        key: row
        for key, row in ladder.rows.items()
        if (row["arm"], row["purpose"], row["seed"]) != ("64 experts", "measure", 1)
    }
    assert dropped(ladder.config, ladder.study, rows) == {}
    assert dropped(dataclasses.replace(ladder.config, drop=None), ladder.study, ladder.rows) == {}


@pytest.mark.slow
def test_an_arm_without_a_rate_that_holds_has_failed(with_bad_arm: Callable[..., Path]) -> None:
    def diverged(row: Row) -> Row:
        bad = (row["arm"], row["purpose"]) == ("64 experts", "tune")
        return {**row, "status": "diverged", "error": "the loss is nan", "metrics": {}} if bad else row

    results = with_bad_arm(change=diverged)
    ladder = read_ladder(results)
    assert not any(row["arm"] == "64 experts" and row["purpose"] == "measure" for row in ladder.rows.values())
    assert plan(ladder.study, ladder.base, ladder.rows).missing == []
    text, summary = report(ladder, results)
    said = "failed: it diverged at all learning rates tried (x0.125, x0.25, x0.5, x1, x2)"
    assert summary["dropped"] == {"64 experts": said}
    assert f"- 64 experts: {said}" in text and "missing:" not in text
    assert set(analyze(ladder.config, ladder.cells).gates) == {"16 experts", "4 experts"}


def test_a_baseline_that_diverged_can_drop_nobody(with_bad_arm: Callable[..., Path]) -> None:
    def diverged(row: Row) -> Row:
        bad = (row["arm"], row["purpose"], row["seed"]) == ("dense", "measure", 0)
        return {**row, "status": "diverged", "error": "the loss is nan", "metrics": {}} if bad else row

    ladder = read_ladder(with_bad_arm(DROP, change=diverged))
    with pytest.raises(InputError, match=r"ladder\.drop\.rung=1e11: dense, the baseline, diverged there"):
        dropped(ladder.config, ladder.study, ladder.rows)


@pytest.mark.parametrize(
    ("drop", "said"),
    [
        ("{rung:1e12,behind:0.1}", r"drop\.rung=1e12: must be one of rungs=\[1e11, 3e11, 1e12\], but the largest"),
        ("{rung:2e11,behind:0.1}", r"drop\.rung=2e11: must be one of rungs"),
        ("{rung:1e11,behind:0}", r"ladder\.drop\.behind=0\.0: must be a share > 0"),
        ("{rung:1e11,behind:0.1,keep:0}", r"ladder\.drop\.keep=0: must be a number of arms >= 1"),
    ],
)
def test_what_can_drop_nobody_is_refused(rungs_of: MakeRungs, drop: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        rungs_of(*LADDER, f"ladder.drop={drop}")
