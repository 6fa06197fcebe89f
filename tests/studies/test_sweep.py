"""A tree of runs as a table that leaves nothing out."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from moesaic.config import flatten
from moesaic.errors import InputError
from moesaic.studies.sweep import collect_runs, summarize_runs, tables_of, to_csv, to_markdown, write_report
from moesaic.studies.where import matches, parse_where

LOSS = "validation/loss"


def make_run(
    directory: Path,
    *,
    seed: int = 0,
    loss: float | None = None,
    status: str = "finished",
    age: int = 0,
    sections: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    directory.mkdir(parents=True)
    plain = {"name": "run", "seed": seed, "model": {"dim": 8, **config}, "run_dir": str(directory)}
    plain |= sections or {}
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
    assert [row.label for row in rows] == ["top_k=2", "top_k=1", "top_k=3"]


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
    assert "| top_k=2 | 1 of 4 | 3.0000 (n=1) |" in text
    assert f"**failed** {tmp_path / 'failed'} (top_k=2, seed 1): ValueError: too bad" in text
    assert f"**unfinished** {tmp_path / 'killed'}" in text
    assert f"**damaged** {damaged}" in text
    assert f"**damaged** {unreadable} ((config unreadable), seed None): config.yaml:" in text
    assert "**missing** top_k=2: no finished run with seed 1" in text


@pytest.mark.parametrize("value", ["1.5", True, [1.5], {}, 10**400])
@pytest.mark.parametrize("key", [LOSS, "seconds", "validation/seq_len", "parameters/total", "validation/windows"])
def test_a_number_that_is_none_makes_its_run_damaged(tmp_path: Path, key: str, value: Any) -> None:
    make_run(tmp_path / "good", seed=0, loss=1.0)
    run = make_run(tmp_path / "bad", seed=1, loss=2.0)
    (run / "metrics.json").write_text(json.dumps({**json.loads((run / "metrics.json").read_text()), key: value}))
    [row] = summarize_runs(collect_runs(tmp_path), LOSS)
    assert row.values(LOSS) == [1.0]
    said = f"**damaged** {run} ((all equal), seed 1): metrics.json: {key}={value!r}: must be a number"
    assert said in to_markdown([row], [LOSS])


@pytest.mark.slow
def test_a_folder_that_cannot_be_looked_into_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "good", loss=1.0)
    make_run(tmp_path / "theirs/bad", loss=2.0)
    look = os.scandir

    def refuse(path: str) -> Any:
        if Path(path) in refused:
            raise PermissionError(13, "Permission denied", str(path))
        return look(path)

    refused = [tmp_path / "theirs"]
    monkeypatch.setattr(os, "scandir", refuse)
    assert f"**damaged** {tmp_path}/theirs ((config unreadable), seed None): cannot be read (Perm" in write_report(
        tmp_path
    )
    refused = [tmp_path]
    with pytest.raises(InputError, match=r"cannot be read \(Permission denied\)"):
        collect_runs(tmp_path)


@pytest.mark.parametrize("section", [None, [1], "text"])
def test_an_odd_section_of_a_stored_config_ends_no_report(tmp_path: Path, section: Any) -> None:
    run = make_run(tmp_path / "a", loss=1.0, sections={"training": section})
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({**metrics, "steps": 4, "stopped_by": "x", "validation/seq_len": 8}))
    assert "4 of ? steps, x" in to_markdown(summarize_runs(collect_runs(tmp_path), LOSS), [LOSS])


@pytest.mark.parametrize(("name", "line"), [("config.yaml", "seed: 7\n"), ("metrics.json", '{"status": "finished", ')])
def test_a_key_that_stands_twice_makes_its_run_damaged(tmp_path: Path, name: str, line: str) -> None:
    run = make_run(tmp_path / "bad", loss=1.0)
    text = (run / name).read_text()
    (run / name).write_text(text + line if name == "config.yaml" else line + text[1:])
    [found] = collect_runs(tmp_path)
    assert found.status == "damaged"
    assert "stands twice" in found.metrics["error"]


@pytest.mark.parametrize(
    "line", ["a: &a [*a]", "a: &a [x, x]\n" + "\n".join(f"{b}: &{b} [{f'*{a}, ' * 99}]" for a, b in ("ab", "bc", "cd"))]
)
def test_aliases_without_end_make_their_run_damaged(tmp_path: Path, line: str) -> None:
    run = make_run(tmp_path / "bad", loss=1.0)
    (run / "config.yaml").write_text(f"{line}\n{(run / 'config.yaml').read_text()}")
    [found] = collect_runs(tmp_path)
    assert found.metrics["error"].startswith("config.yaml: its aliases make more than 1,000,000 values")


def test_a_table_without_steps_makes_its_run_damaged(tmp_path: Path) -> None:
    run = make_run(tmp_path / "bad", loss=1.0)
    (run / "metrics.csv").write_bytes(b"\xef\xbb\xbf" + (run / "metrics.csv").read_bytes())
    [found] = collect_runs(tmp_path)
    assert (
        found.metrics["error"].startswith("metrics.csv: found columns ") and "must have step" in found.metrics["error"]
    )


def callback(name: str, **arguments: Any) -> dict[str, Any]:
    return {"callbacks": {"each": {"_target_": f"lightning.pytorch.callbacks.{name}", **arguments}}}


def test_what_only_watches_a_run_makes_no_arm_of_it(tmp_path: Path) -> None:
    watched: list[dict[str, Any]] = [
        {},
        {"logger": {}, "output_dir": "elsewhere", "sample": {"prompt": "x"}},
        {"callbacks": {}, "training": {"log_every": 7, "checkpoint_every": 3}},
        callback("LearningRateMonitor", logging_interval="step"),
        {"trainer": {"threads": 3, "accelerator": "gpu", "strategy": "ddp", "profiler": "simple"}},
        {"data": {"cache_dir": "other"}, "resume": True},
    ]
    for seed, sections in enumerate(watched):
        make_run(tmp_path / f"{seed}", seed=seed, loss=1.0, sections=sections)
    [row] = summarize_runs(collect_runs(tmp_path), LOSS)
    assert (row.label, len(row.finished)) == ("(all equal)", len(watched))


@pytest.mark.parametrize(
    ("sections", "label"),
    [
        (callback("EMAWeightAveraging", decay=0.9), "each=EMAWeightAveraging(decay=0.9)"),
        ({"training": {"log_every": 7, "steps": 5}}, "steps=5"),
        ({"trainer": {"threads": 3, "precision": "bf16-mixed"}}, "precision=bf16-mixed"),
        ({"trainer": {"devices": [0, 3]}}, "devices=2"),
        ({"data": {"path": "other", "cache_dir": "other"}}, "path=other"),
    ],
)
def test_what_changes_a_result_is_an_arm(sections: dict[str, Any], label: str, tmp_path: Path) -> None:
    make_run(tmp_path / "without", loss=1.0)
    make_run(tmp_path / "with", loss=2.0, sections=sections)
    assert summarize_runs(collect_runs(tmp_path), LOSS)[1].label.startswith(label)


@pytest.mark.parametrize(("status", "why"), [("stopped", "time limit (x)"), ("finished", "early stopping: no gain")])
def test_a_run_that_ended_early_counts_with_its_steps(status: str, why: str, tmp_path: Path) -> None:
    make_run(tmp_path / "whole", seed=0, loss=1.0, sections={"training": {"steps": 9}})
    early = make_run(tmp_path / "early", seed=1, loss=2.0, sections={"training": {"steps": 9}})
    metrics = json.loads((early / "metrics.json").read_text())
    (early / "metrics.json").write_text(json.dumps({**metrics, "status": status, "steps": 4, "stopped_by": why}))
    text = to_markdown(summarize_runs(collect_runs(tmp_path), LOSS), [LOSS])
    assert "| (all equal) | 2 of 2 | 1.5000 ± " in text
    assert f"**fewer steps** {early} ((all equal), seed 1): 4 of 9 steps, {why}" in text
    assert "missing" not in text and f"**{status}**" not in text


def test_repeats_of_a_seed_count_once_the_newest(tmp_path: Path) -> None:
    make_run(tmp_path / "old", seed=0, loss=9.0, age=100)
    make_run(tmp_path / "new", seed=0, loss=1.0)
    [row] = summarize_runs(collect_runs(tmp_path), LOSS)
    assert row.values(LOSS) == [1.0]
    assert "1 older run(s) of a seed set aside" in to_markdown([row], [LOSS])


def test_csv_has_raw_numbers(tmp_path: Path) -> None:
    make_run(tmp_path / "a", seed=0, loss=1.0)
    make_run(tmp_path / "b", seed=1, loss=2.0)
    [row] = list(csv.DictReader(to_csv(tables_of(collect_runs(tmp_path), LOSS), [LOSS]).splitlines()))
    assert (row[f"{LOSS} mean"], row[f"{LOSS} n"]) == ("1.5", "2")
    assert float(row[f"{LOSS} half_width"]) == pytest.approx(12.706 * 0.5)


@pytest.mark.slow
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


PATTERN = [{"mixer": "rope", "ffn": "moe"}, {"mixer": {"type": "mine.parts.Gated"}, "ffn": "dense"}]


def test_an_arm_with_a_custom_module_is_named_after_its_class(tmp_path: Path) -> None:
    usual: dict[str, Any] = {"router": "top_k", "pattern": None, "every": 2}
    make_run(tmp_path / "a", loss=3.0, **usual)
    make_run(tmp_path / "b", loss=2.0, **{**usual, "router": {"type": "mine.parts:ExpertChoice", "capacity": 2}})
    make_run(tmp_path / "c", loss=1.0, **{**usual, "pattern": PATTERN, "every": None})
    labels = [row.label for row in summarize_runs(collect_runs(tmp_path), LOSS)]
    assert labels == [
        "pattern=rope/moe+Gated/dense, router=top_k",
        "every=2, router=ExpertChoice(capacity=2)",
        "every=2, router=top_k",
    ]


def test_classes_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for loss, module in enumerate(("mine", "theirs"), start=1):
        make_run(tmp_path / module, loss=float(loss), router={"type": f"{module}.parts.Best"})
    labels = [row.label for row in summarize_runs(collect_runs(tmp_path), LOSS)]
    assert labels == ['model.router={"type": "mine.parts.Best"}', 'model.router={"type": "theirs.parts.Best"}']


def test_twelve_arms_are_named_by_what_is_special_about_them(tmp_path: Path) -> None:
    usual = {"top_k": 1, "experts": 8, "width": 64, "scale": 0.5, "bias": False, "norm": True}
    special: list[dict[str, Any]] = [
        {},
        *({key: 70 + i} for i, key in enumerate(usual)),
        *({"experts": n} for n in range(20, 25)),
    ]
    for i, values in enumerate(special):
        make_run(tmp_path / f"{i}", loss=float(i), **{**usual, **values})
    rows = summarize_runs(collect_runs(tmp_path), LOSS)
    assert len(rows) == 12
    assert [row.label for row in rows[:2]] == ["experts=8", "experts=8, top_k=70"]
    assert max(len(row.label) for row in rows) < 24
    text = to_markdown(rows, [LOSS])
    assert "- Where a name does not say otherwise: bias=false, norm=true, scale=0.5, top_k=1, width=64." in text


@pytest.mark.slow
def test_experiments_of_several_names_have_a_table_each(tmp_path: Path) -> None:
    for name in ("first", "second"):
        for arm in (1, 2):
            make_run(tmp_path / f"{name}{arm}", loss=float(arm), top_k=arm, sections={"name": name})
    make_run(tmp_path / "alone", loss=0.5, top_k=5, sections={"name": "alone"})
    text = write_report(tmp_path)
    tables = dict(part.split("\n", 1) for part in text.split("## ")[1:])
    assert list(tables) == ["first", "second", "one arm each"]
    assert "| top_k=1 | 1 of 1 | 1.0000 (n=1) |" in tables["second"]
    assert "| alone | 1 of 1 | 0.5000 (n=1) |" in tables["one arm each"]
    with (tmp_path / "report.csv").open() as file:
        assert [(row["name"], row["arm"]) for row in csv.DictReader(file)][-1] == ("alone", "alone")


def test_a_score_has_its_window_and_the_length_of_training_beside_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", loss=1.0, sections={"training": {"seq_len": 256}})
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({**metrics, "validation/seq_len": 1024}))
    text = to_markdown(summarize_runs(collect_runs(tmp_path), LOSS), [LOSS])
    assert "| window / trained (tokens) |" in text and "| 1024 / 256 |" in text


@pytest.mark.parametrize(
    ("where", "chosen"),
    [
        ("model.top_k>1", {"2", "custom"}),
        ("top_k >= 1 and seed=0", {"1", "2", "custom"}),
        ("top_k!=2", {"1", "custom"}),
        (f"{LOSS}<1.5", {"1"}),
        ("router=ExpertChoice", {"custom"}),
        ("model.router.type=mine.parts.ExpertChoice", {"custom"}),
        ("model.bias=true", {"2"}),
        ("parameters/total==1000", {"1", "2", "custom"}),
    ],
)
def test_where_chooses_runs(where: str, chosen: set[str], tmp_path: Path) -> None:
    make_run(tmp_path / "1", loss=1.0, top_k=1, bias=False, router="top_k")
    make_run(tmp_path / "2", loss=2.0, top_k=2, bias=True, router="top_k")
    make_run(tmp_path / "custom", loss=3.0, top_k=3, router={"type": "mine.parts.ExpertChoice"})
    runs = collect_runs(tmp_path)
    fits = matches(parse_where(where), [{**flatten(run.config), **run.metrics} for run in runs])
    assert {run.directory.name for run, fit in zip(runs, fits, strict=True) if fit} == chosen


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("top_k", r"where='top_k': 'top_k': must be KEY OPERATOR VALUE"),
        ("top_k>1 or top_k<0", r"'top_k>1 or top_k<0': after > there must be a number"),
        ("__import__('os').system('x')=1", r"must be KEY OPERATOR VALUE"),
        ("top_q>1", r"where: top_q: no run has this key \(did you mean top_k\?\)"),
        ("router>many", r"after > there must be a number"),
        ("top_k>9", r"where='top_k>9': none of 1 runs is like that"),
        ("dim=8 and width=8", r"where: width: no run has this key"),
    ],
)
def test_what_is_no_condition_is_refused(where: str, message: str, tmp_path: Path) -> None:
    make_run(tmp_path / "1", loss=1.0, top_k=1)
    with pytest.raises(InputError, match=message):
        write_report(tmp_path, where=where)
    assert not (tmp_path / "report.md").exists()


def test_what_a_study_tunes_or_prepares_with_is_no_result(tmp_path: Path) -> None:
    make_run(tmp_path / "mine", loss=9.0)  # the results of a study: its config stands beside its rows
    (tmp_path / "mine" / "rows.jsonl").touch()
    for i, purpose in enumerate(("tune", "prepare", "measure")):
        make_run(tmp_path / f"mine/runs/{i}/run", loss=float(i))
        (tmp_path / f"mine/runs/{i}/job.json").write_text(json.dumps({"row": {"purpose": purpose}}))
    assert [run.metrics[LOSS] for run in collect_runs(tmp_path)] == [2.0]
