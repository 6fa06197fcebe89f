"""A tree of runs as a table that leaves nothing out."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from moesaic.errors import InputError
from moesaic.studies.sweep import collect_runs, summarize_runs, to_csv, to_markdown, write_report

LOSS = "validation/loss"


def make_run(
    directory: Path, *, seed: int = 0, loss: float | None = None, status: str = "finished", age: int = 0, **config: Any
) -> Path:
    directory.mkdir(parents=True)
    plain = {"name": directory.name, "seed": seed, "model": {"dim": 8, **config}, "run_dir": str(directory)}
    (directory / "config.yaml").write_text(yaml.safe_dump(plain))
    if loss is not None or status != "finished":
        metrics = {"status": status, "seconds": 10.0, "parameters/total": 1000, "parameters/active": 500}
        metrics |= {LOSS: loss} if loss is not None else {"error": "ValueError: too bad"}
        path = directory / "metrics.json"
        path.write_text(json.dumps(metrics))
        os.utime(path, (1e9 - age, 1e9 - age))
    if loss is not None:
        rows = [f"{step},{step * 10},{step / 2},{step * 1e6},{loss + 1 / step}" for step in (1, 2, 3)]
        (directory / "metrics.csv").write_text("\n".join([f"step,tokens,seconds,active_flops,{LOSS}", *rows]) + "\n")
    return directory


def test_mean_and_interval_by_hand(tmp_path: Path) -> None:
    for seed, loss in enumerate([1.0, 2.0, 3.0]):
        make_run(tmp_path / f"deep/er/{seed}", seed=seed, loss=loss)
    [row] = summarize_runs(collect_runs(tmp_path), LOSS)
    assert row.label == "(all equal)"
    assert row.mean(LOSS) == 2
    assert row.half_width(LOSS) == pytest.approx(4.303 * 1.0 / 3**0.5)  # t(2) * s / sqrt(n)
    assert "| (all equal) | 3 of 3 | 2.0000 ± 2.4843 | 10 | 1,000 | 500 |" in to_markdown([row], [LOSS])


def test_rows_are_arms_labeled_by_what_differs_best_first(tmp_path: Path) -> None:
    make_run(tmp_path / "a", loss=2.0, top_k=1, bias=True)
    make_run(tmp_path / "b", loss=1.0, top_k=2, bias=True)
    make_run(tmp_path / "c", top_k=3, bias=True)
    rows = summarize_runs(collect_runs(tmp_path), LOSS)
    assert [row.label for row in rows] == ["model.top_k=2", "model.top_k=1", "model.top_k=3"]


def test_failed_unfinished_damaged_and_missing_are_all_named(tmp_path: Path) -> None:
    make_run(tmp_path / "good0", seed=0, loss=1.0, top_k=1)
    make_run(tmp_path / "good1", seed=1, loss=1.2, top_k=1)
    make_run(tmp_path / "other0", seed=0, loss=3.0, top_k=2)
    make_run(tmp_path / "failed", seed=1, status="failed", top_k=2)
    make_run(tmp_path / "killed", seed=2, top_k=2)
    damaged = make_run(tmp_path / "damaged", seed=3, loss=1.0, top_k=2)
    (damaged / "metrics.json").write_text("{")
    unreadable = make_run(tmp_path / "unreadable", seed=4, loss=1.0, top_k=2)
    (unreadable / "config.yaml").write_text("{")
    rows = summarize_runs(collect_runs(tmp_path), LOSS)
    text = to_markdown(rows, [LOSS])
    assert "| model.dim=8, model.top_k=2 | 1 of 4 | 3.0000 (n=1) |" in text
    assert f"**failed** {tmp_path / 'failed'} (model.dim=8, model.top_k=2, seed 1): ValueError: too bad" in text
    assert f"**unfinished** {tmp_path / 'killed'}" in text
    assert f"**damaged** {damaged}" in text
    assert f"**damaged** {unreadable} ((config unreadable), seed None): config.yaml:" in text
    assert "**missing** model.dim=8, model.top_k=2: no finished run with seed 1" in text


def test_repeats_of_a_seed_count_once_the_newest(tmp_path: Path) -> None:
    make_run(tmp_path / "old", seed=0, loss=9.0, age=100)
    make_run(tmp_path / "new", seed=0, loss=1.0)
    [row] = summarize_runs(collect_runs(tmp_path), LOSS)
    assert row.values(LOSS) == [1.0]
    assert "1 older run(s) of a seed set aside" in to_markdown([row], [LOSS])


def test_csv_has_raw_numbers(tmp_path: Path) -> None:
    make_run(tmp_path / "a", seed=0, loss=1.0)
    make_run(tmp_path / "b", seed=1, loss=2.0)
    [row] = list(csv.DictReader(to_csv(summarize_runs(collect_runs(tmp_path), LOSS), [LOSS]).splitlines()))
    assert (row[f"{LOSS} mean"], row[f"{LOSS} n"]) == ("1.5", "2")
    assert float(row[f"{LOSS} half_width"]) == pytest.approx(12.706 * 0.5)


def test_report_writes_three_files(tmp_path: Path) -> None:
    for arm in (1, 2):
        for seed in (0, 1):
            make_run(tmp_path / f"{arm}{seed}", seed=seed, loss=float(arm + seed), top_k=arm)
    text = write_report(tmp_path)
    assert (tmp_path / "report.md").read_text() == text
    assert (tmp_path / "report.csv").exists()
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such directory"):
        collect_runs(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no run in it; a run is a directory with a config.yaml"):
        collect_runs(tmp_path)
    make_run(tmp_path / "run", loss=1.0)
    with pytest.raises(InputError, match=r"metrics: no run has accuracy; found: parameters/active"):
        write_report(tmp_path, ["accuracy"])
