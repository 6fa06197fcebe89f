"""Rows that are committed stay valid: keys that were added or renamed since make no run of them missing."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from moesaic.config import flatten, from_mapping
from moesaic.errors import InputError
from moesaic.ladder.config import LadderConfig
from moesaic.ladder.prediction import LADDER, read_ladder, with_recorded
from moesaic.ladder.report import write_ladder_report
from moesaic.ladder.rungs import Rungs
from moesaic.studies.config import StudyConfig
from moesaic.studies.jobs import canonical
from moesaic.studies.plan import plan
from moesaic.studies.report import write_study_report
from moesaic.studies.runner import read_rows

DOCS = Path(__file__).resolve().parents[2] / "docs" / "studies"
LADDERS = sorted(path.parent.name for path in DOCS.glob("*/ladder.yaml"))
STUDIES = sorted({path.parent.name for path in DOCS.glob("*/rows.jsonl")} - set(LADDERS))
BEGUN = sorted(path.parent for path in (DOCS.parent / "unfinished").glob("*/rows.jsonl"))

Composed = Callable[..., dict[str, Any]]


def shipped(composed: Composed, name: str) -> tuple[StudyConfig, dict[str, Any]]:
    config = as_run(composed(f"experiment=study_{name}", config="study", smoke=False))
    return from_mapping(StudyConfig, config.pop("study"), "study"), config


def shipped_ladder(composed: Composed, name: str) -> tuple[LadderConfig, Rungs]:
    config = as_run(composed(f"experiment={name}", config="ladder", smoke=False))
    vocab_size = yaml.safe_load((DOCS / name / LADDER).read_text())["vocab_size"]
    ladder = with_recorded(from_mapping(LadderConfig, config.pop("ladder"), "ladder"), DOCS / name)
    return ladder, Rungs(ladder, config, vocab_size)


def as_run(config: dict[str, Any]) -> dict[str, Any]:
    """What a command makes of its config here."""
    for key in ("workers", "results_dir"):
        config.pop(key)
    config["trainer"]["precision"] = "32-true"
    return config


def without(config: Mapping[str, Any], keys: set[str], prefix: str = "") -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if prefix + key not in keys}
    return {k: without(v, keys, f"{prefix}{k}.") if isinstance(v, Mapping) else v for k, v in kept.items()}


def test_there_are_studies() -> None:
    assert len(STUDIES) >= 11


@pytest.mark.parametrize("name", [*STUDIES, *LADDERS])
def test_nothing_is_missing(composed: Composed, name: str) -> None:
    study, base = shipped_ladder(composed, name)[1].study() if name in LADDERS else shipped(composed, name)
    rows = read_rows(DOCS / name, study, base)
    found = plan(study, base, rows)
    assert found.missing == []
    assert found.done == found.total > 0


@pytest.mark.parametrize("results", BEGUN, ids=lambda path: path.name)
def test_what_was_begun_is_kept(composed: Composed, results: Path) -> None:
    if (results / LADDER).is_file():
        begun = read_ladder(results)
        study, base, rows = begun.study, begun.base, begun.rows
    else:
        study, base = shipped(composed, results.name)
        rows = read_rows(results, study, base)
    assert plan(study, base, rows).done == len(rows) > 0


def test_rows_are_valid_without_keys_that_are_younger(composed: Composed, tmp_path: Path) -> None:
    """A key at its default, taken out of what is stored, is as one that did not exist when the rows were written."""
    study, base = shipped(composed, "balancing")
    results = tmp_path / "balancing"
    shutil.copytree(DOCS / "balancing", results)
    stored = yaml.safe_load((results / "config.yaml").read_text())
    required = {"name": stored["name"], "model": stored["model"]}
    required["training"] = {key: stored["training"][key] for key in ("steps", "batch_size", "seq_len")}
    younger = {
        key
        for key, default in canonical(required).items()
        if key not in flatten(required) and flatten(stored).get(key, ...) == default
    }
    assert {"schedule.final_factor", "trainer.compile"} <= younger
    (results / "config.yaml").write_text(yaml.safe_dump(without(stored, younger)))
    assert plan(study, base, read_rows(results, study, base)).missing == []

    other = {**base, "schedule": {**base["schedule"], "final_factor": 0.25}}
    with pytest.raises(InputError, match=r"schedule\.final_factor: 0\.0 there, 0\.25 now"):
        read_rows(results, study, other)


def test_rows_of_a_later_version_are_refused(composed: Composed, tmp_path: Path) -> None:
    study, base = shipped(composed, "balancing")
    shutil.copytree(DOCS / "balancing", tmp_path / "balancing")
    path = tmp_path / "balancing" / "rows.jsonl"
    first, *others = path.read_text().splitlines(keepends=True)
    path.write_text("".join([json.dumps({**json.loads(first), "format": 99}) + "\n", *others]))
    with pytest.raises(InputError, match=r"rows\.jsonl:1: format=99: must be 1 to"):
        read_rows(path.parent, study, base)


@pytest.mark.slow_but_for("moe_against_dense")
@pytest.mark.parametrize("name", STUDIES)
def test_table_and_summary_are_what_the_rows_say(composed: Composed, name: str, tmp_path: Path) -> None:
    study, base = shipped(composed, name)
    rows = read_rows(DOCS / name, study, base)
    command = f"moesaic study experiment=study_{name}"
    write_study_report(study, base, rows, tmp_path, command, Console(quiet=True))
    for made in ("table.md", "summary.json"):
        assert (tmp_path / made).read_text(encoding="utf-8") == (DOCS / name / made).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", LADDERS)
def test_the_report_of_a_ladder_is_what_its_rows_say(composed: Composed, name: str, tmp_path: Path) -> None:
    ladder, rungs = shipped_ladder(composed, name)
    study, base = rungs.study()
    rows, console = read_rows(DOCS / name, study, base), Console(quiet=True)
    command = f"moesaic ladder experiment={name}"
    write_ladder_report(ladder, study, rungs.all, rows, tmp_path, base["name"], command, console, leaks=rungs.leaks)
    for made in ("table.md", "summary.json"):
        assert (tmp_path / made).read_text(encoding="utf-8") == (DOCS / name / made).read_text(encoding="utf-8")
