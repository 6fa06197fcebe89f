"""Studies without training: a base config, a study of two arms, and rows from a made-up loss."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from moesaic.config import from_mapping
from moesaic.studies.config import StudyConfig
from moesaic.studies.jobs import Job, Row
from moesaic.studies.plan import plan

BASE: dict[str, Any] = {
    "name": "made_up",
    "seed": 0,
    "model": {
        "vocab_size": None,
        "dim": 16,
        "num_layers": 2,
        "attention": {"num_heads": 2},
        "hidden_dim": 32,
        "moe": {"num_experts": 4, "hidden_dim": 16, "top_k": 1},
        "interleave_moe_layer_step": 2,
        "nope_layer_interval": 0,
        "dense_twin": False,
    },
    "training": {"steps": 4, "batch_size": 2, "seq_len": 16},
    "optimizer": {"learning_rate": 0.01, "muon_learning_rate": 0.001},
    "data": {"source": "stdlib", "cache_dir": "there"},
    "distillation": None,
}

STUDY: dict[str, Any] = {
    "question": "Is it better?",
    "equal": "everything else",
    "baseline": "dense",
    "arms": {"dense": {"model.dense_twin": True}, "moe": {}},
    "seeds": [0, 1, 2],
    "tune": {"seed": 9},
}


@pytest.fixture
def base() -> dict[str, Any]:
    return copy.deepcopy(BASE)


@pytest.fixture
def study_of() -> Callable[..., StudyConfig]:
    """study_of(key=value, ...) -> the study of two arms with these keys changed."""
    return lambda **changes: from_mapping(StudyConfig, {**copy.deepcopy(STUDY), **changes}, "study")


def made_row(job: Job, value: float, status: str = "finished") -> Row:
    return {
        **dataclasses.asdict(job),
        "status": status,
        "error": None if status == "finished" else "the loss is nan",
        "commit": "c0ffee",
        "uncommitted_changes": False,
        "torch": "2",
        "data_hash": "d",
        "config_hash": "h",
        "metrics": {"validation/bits_per_byte": value, "router/a/load": value, "router/b/load": value + 1},
        "cpu_seconds": 40.0,
        "curve": {
            "metric": "validation/bits_per_byte",
            "tokens": [1, 2],
            "seconds": [1, 2],
            "active_flops": [1, 2],
            "values": [value + 1, value],
        },
    }


def made_rows(study: StudyConfig, base: dict[str, Any], loss: Callable[[Job], float | None]) -> dict[str, Row]:
    """Rows of a whole study, `loss` in place of training; None: diverged."""
    rows: dict[str, Row] = {}
    while missing := plan(study, base, rows, study.prepare).missing:
        for job in missing:
            value = loss(job)
            rows[job.key] = made_row(job, 0.0, "diverged") if value is None else made_row(job, value)
    return rows


@pytest.fixture
def row_of() -> Callable[..., Row]:
    return made_row


@pytest.fixture
def run_all() -> Callable[..., dict[str, Row]]:
    return made_rows
