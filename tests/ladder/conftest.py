"""Ladders without training: a composed experiment, and rows from a made-up law."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesaic.cli.arguments import compose_with
from moesaic.cli.common import plain
from moesaic.config import from_mapping, to_mapping
from moesaic.files import write_yaml
from moesaic.ladder.config import LadderConfig
from moesaic.ladder.prediction import LADDER
from moesaic.ladder.rungs import METRIC, Rungs
from moesaic.studies.config import StudyConfig
from moesaic.studies.jobs import Job, Row, config_hash, job_of, run_config_of, write_row
from moesaic.studies.plan import plan

VOCABULARY = 512


@functools.cache
def _composed(words: tuple[str, ...]) -> dict[str, Any]:
    named = any(word.startswith("experiment=") for word in words)
    return plain(
        compose_with(None, "ladder", [*words] if named else ["experiment=ladder_moe", "ladder.least=0", *words])
    )


@pytest.fixture
def rungs_of() -> Callable[..., Rungs]:
    """rungs_of("key=value", ...) -> the rungs of ladder_moe under these overrides."""

    def make(*words: str, vocab_size: int = VOCABULARY) -> Rungs:
        config = copy.deepcopy(_composed(words))
        for key in ("workers", "results_dir", "launcher"):
            config.pop(key, None)
        if config["trainer"]["precision"] == "auto":
            config["trainer"]["precision"] = "32-true"
        ladder = from_mapping(LadderConfig, config.pop("ladder"), "ladder")
        return Rungs(ladder, config, vocab_size)

    return make


def law_of(arm: str, flops: float) -> float:
    """Bits per byte of a made-up arm: the experts are worth twice the compute at every size."""
    worth = 1.0 if arm == "dense" else 2.0
    return 0.4 + 40.0 * (worth * flops) ** -0.13


def made_row(study: StudyConfig, base: dict[str, Any], job: Job, flops: float, loss: float) -> Row:
    seconds = flops / (1e9 if job.arm == "dense" else 0.8e9)
    parameters = 1e5 if job.arm == "dense" else 4e5
    return {
        "format": 2,
        "study": base["name"],
        **dataclasses.asdict(job),
        "status": "finished",
        "error": None,
        "commit": "c0ffee",
        "uncommitted_changes": False,
        "torch": "2",
        "data_hash": "d",
        "config_hash": config_hash(run_config_of(study, base, job)),
        "metrics": {
            METRIC: loss,
            "active_flops": flops,
            "parameters/total": parameters,
            "parameters/active": 1e5,
            "seconds": seconds,
            "tokens_per_second": 1e3,
        },
        "warnings": [],
        "curve": {},
        "cpu_seconds": 40.0,
    }


@pytest.fixture
def made_ladder(tmp_path: Path) -> Callable[..., Path]:
    """made_ladder(rungs) -> a results directory with all runs of a ladder, whose losses follow `law_of` with noise."""

    def make(
        rungs: Rungs, law: Callable[[str, float], float] = law_of, change: Callable[[Row], Row] = lambda row: row
    ) -> Path:
        study, base = rungs.study()
        rows: dict[str, Row] = {}
        draw = np.random.default_rng(0)
        shapes = {f"rung={rung.name}": rung for rung in rungs.all}
        while missing := [job for job in plan(study, base, rows).missing if job.key not in rows]:
            for job in missing:
                rung = shapes[job.axis or ""]
                flops = rungs.flops_per_token(job.arm, rung.dim) * rung.tokens
                off_tune = 0.05 * abs(np.log2(job.factor)) if job.purpose == "tune" else 0.0
                loss = law(job.arm, flops) * float(np.exp(draw.normal(0, 0.003))) + off_tune
                rows[job.key] = change(made_row(study, base, job, flops, loss))
        results = tmp_path / "results"
        results.mkdir(exist_ok=True)
        (results / "rows.jsonl").write_text("".join(f"{write_row(row)}\n" for row in rows.values()))
        write_yaml(results / "config.yaml", {**base, "study": {"evaluations": [], "evaluation_options": {}}})
        stored = {"ladder": to_mapping(rungs.ladder), "vocab_size": rungs.vocab_size}
        write_yaml(results / LADDER, stored)
        return results

    return make


@pytest.fixture
def law() -> Callable[[str, float], float]:
    """law(arm, FLOPs) -> bits per byte, the truth of `made_ladder`."""
    return law_of


@pytest.fixture
def add_target() -> Callable[..., None]:
    """add_target(results, rungs, factor) -> a measured run of dense at the target of these rungs, on the law."""

    def add(results: Path, rungs: Rungs, factor: float) -> None:
        study, base = rungs.study()
        rung = rungs.all[-1]
        job = job_of(study, base, study.cell("dense", ("rung", rung.name)), "measure", 0, factor)
        row = made_row(study, base, job, rung.flops, law_of("dense", rung.flops))
        with (results / "rows.jsonl").open("a") as file:
            file.write(f"{write_row(row)}\n")

    return add
