"""Predictions on record: what they hold, when they are refused, and how they are compared."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moesaic.cli import main
from moesaic.config import to_mapping
from moesaic.errors import InputError
from moesaic.files import write_yaml
from moesaic.ladder.points import require_corpus
from moesaic.ladder.prediction import (
    LADDER,
    outcomes,
    path_of,
    read_ladder,
    record,
    require_on_record,
    rows_hash,
    with_recorded,
)
from moesaic.ladder.rungs import METRIC, Rungs
from moesaic.studies.jobs import Row, read_row, row_key, write_row

MakeRungs = Callable[..., Rungs]
MakeLadder = Callable[..., Path]
Law = Callable[[str, float], float]


def test_a_prediction_holds_the_truth_and_says_what_it_was_made_from(
    rungs_of: MakeRungs, made_ladder: MakeLadder, law: Law
) -> None:
    rungs = rungs_of()
    results = made_ladder(rungs)
    prediction = record(results, 1e14)
    stored = json.loads(path_of(results, 1e14).read_text())
    assert stored["rung"]["dim"] == 112 and stored["ratio"] == pytest.approx(10)
    assert stored["fitted_rungs"] == ["1e11", "3e11", "1e12", "3e12", "1e13"]
    for arm, found in prediction.arms.items():
        truth = law(arm, found.flops)
        assert found.law.low < truth < found.law.high
        assert found.law.value == pytest.approx(truth, rel=0.02)
        assert found.expected.high - found.expected.low >= 0.99 * (found.law.high - found.law.low)
        assert found.other_law is not None
    lines = (results / "rows.jsonl").read_text().splitlines()
    measured = [row for row in map(read_row, lines) if row["purpose"] == "measure"]
    assert stored["rows_sha256"] == rows_hash(results, measured)
    with pytest.raises(InputError, match=r"prediction-1e14\.json: there is a prediction already, which must stay"):
        record(results, 1e14)


@pytest.mark.slow
def test_the_upper_rungs_can_be_used_alone(rungs_of: MakeRungs, made_ladder: MakeLadder) -> None:
    results = made_ladder(rungs_of())
    assert record(results, 1e14, least=3e11).fitted_rungs == ("3e11", "1e12", "3e12", "1e13")
    with pytest.raises(InputError, match=r"dense: 2 rungs; to hold one out .* least=0 uses all rungs"):
        record(results, 3e14, least=3e12)


def test_a_law_that_its_largest_rung_refutes_is_not_extrapolated(
    rungs_of: MakeRungs, made_ladder: MakeLadder, law: Law
) -> None:
    def bent(arm: str, flops: float) -> float:
        return law(arm, flops) * (0.7 if flops > 5e12 else 1.0)

    results = made_ladder(rungs_of(), bent)
    with pytest.raises(
        InputError,
        match=r"dense: the law of the smaller rungs expects .* must not be extrapolated.* least=FLOPs uses only",
    ):
        record(results, 1e14)
    assert not path_of(results, 1e14).exists()


def test_a_diverged_or_missing_run_is_refused(rungs_of: MakeRungs, made_ladder: MakeLadder) -> None:
    def diverged(row: Row) -> Row:
        bad = (row["arm"], row["axis"], row["seed"]) == ("dense", "rung=3e12", 1)
        return {**row, "status": "diverged", "error": "the loss is nan", "metrics": {}} if bad else row

    results = made_ladder(rungs_of(), change=diverged)
    with pytest.raises(InputError, match=r"dense, rung=3e12, measure, seed 1, .*: diverged \(the loss is nan\)"):
        record(results, 1e14)
    path = results / "rows.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if '"status": "diverged"' not in line))
    with pytest.raises(InputError, match="dense at 3e12: no run of seed 1 yet"):
        record(results, 1e14)


def test_an_asymptote_above_the_best_loss_is_refused(rungs_of: MakeRungs, made_ladder: MakeLadder) -> None:
    results = made_ladder(rungs_of("ladder.asymptote=1.9"))
    with pytest.raises(InputError, match=r"dense: an asymptote of 1\.9; must be .* below the best loss"):
        record(results, 1e14)


@pytest.mark.slow
def test_a_prediction_must_be_larger_and_first(rungs_of: MakeRungs, made_ladder: MakeLadder, tmp_path: Path) -> None:
    results = made_ladder(rungs_of())
    with pytest.raises(InputError, match="must be above the largest rung"):
        record(results, 1e13)
    with pytest.raises(InputError, match=r"it has no ladder\.yaml; must be a results directory"):
        record(tmp_path, 1e14)
    targeted = rungs_of("ladder.targets=[1e14]")
    with pytest.raises(InputError, match="1e14 has no prediction on record; must be predicted first"):
        require_on_record(results, targeted.ladder)
    made_ladder(targeted)
    with pytest.raises(InputError, match="has runs of this rung; a prediction must be made before"):
        record(results, 1e14)


def test_the_outcome_is_compared_and_changed_rows_are_noticed(
    rungs_of: MakeRungs, made_ladder: MakeLadder, add_target: Callable[..., None]
) -> None:
    results = made_ladder(rungs_of())
    before = (results / "rows.jsonl").read_text()
    record(results, 1e14)
    targeted = rungs_of("ladder.targets=[1e14]")
    require_on_record(results, targeted.ladder)
    assert with_recorded(rungs_of().ladder, results).targets == (), "it has not begun"
    ladder = read_ladder(results)
    place = ("rung=1e13", "dense", "measure")
    job_like = next(row for row in ladder.rows.values() if (row["axis"], row["arm"], row["purpose"]) == place)
    add_target(results, targeted, job_like["factor"])
    assert with_recorded(rungs_of().ladder, results).targets == (1e14,)
    write_yaml(results / LADDER, {"ladder": to_mapping(targeted.ladder), "vocab_size": targeted.vocab_size})
    ladder = read_ladder(results)
    found = outcomes(results, ladder.config, ladder.cells, ladder.rows)
    assert [outcome.arm for outcome in found] == ["dense"]
    [outcome] = found
    assert outcome.inside and outcome.rows_unchanged and abs(outcome.error) < 0.02
    after = (results / "rows.jsonl").read_text()
    assert after.startswith(before), "the rows that were there stay as they are"
    lines = [read_row(line) for line in after.splitlines()]
    changed = [
        {**row, "metrics": {**row["metrics"], METRIC: 1.0}} if row_key(row) == row_key(job_like) else row
        for row in lines
    ]
    (results / "rows.jsonl").write_text("".join(f"{write_row(row)}\n" for row in changed))
    ladder = read_ladder(results)
    [outcome] = outcomes(results, ladder.config, ladder.cells, ladder.rows)
    assert not outcome.rows_unchanged


def test_rows_of_another_corpus_are_refused(rungs_of: MakeRungs, made_ladder: MakeLadder) -> None:
    ladder = read_ladder(made_ladder(rungs_of()))
    require_corpus(ladder.rows, {"content_hash": "d", "source": "pinned"}, "rows.jsonl")
    with pytest.raises(
        InputError, match=r"rows\.jsonl: dense, .*: of a corpus with the content hash d; must be e, that"
    ):
        require_corpus(ladder.rows, {"content_hash": "e", "source": "pinned"}, "rows.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize(("at", "warned"), [("1e14", False), ("1e16", True)])
def test_a_prediction_far_beyond_the_rungs_comes_with_a_warning(
    rungs_of: MakeRungs, made_ladder: MakeLadder, capsys: pytest.CaptureFixture[str], at: str, warned: bool
) -> None:
    results = made_ladder(rungs_of())
    main(["predict", str(results), f"at={at}"])
    out = capsys.readouterr().out
    assert ("times the largest rung, where 300 times is as far as these laws are meant for" in out) == warned
