"""Whole runs with every built-in router, and resumption of those with a state."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import SMOKE, kill_in_call

from moesaic.checkpoints import load_checkpoint, load_model
from moesaic.cli import train
from moesaic.layers import ROUTERS
from moesaic.training.run import run

Composed = Callable[..., dict[str, Any]]

ROOT = Path(__file__).resolve().parents[2]

ARGUMENTS = {
    "group_limited": ["model.moe.router={type: group_limited, num_groups: 4, top_groups: 2}"],
    "capacity": ["model.moe.router={type: capacity, capacity_factor: 1.0}"],
    "mlp": ["model.moe.router={type: mlp, router_dim: 8, depth_average: true}"],
    "top_p": ["model.moe.router=top_p", "model.moe.score_function=softmax"],
}


def named(router: str) -> list[str]:
    return [*ARGUMENTS.get(router, [f"model.moe.router={router}"]), "model.moe.top_k=2"]


@pytest.mark.slow
@pytest.mark.parametrize("router", ROUTERS)
def test_a_run_with_every_router(composed: Composed, tmp_path: Path, router: str) -> None:
    run(composed(*named(router), f"run_dir={tmp_path / 'run'}"))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["validation/loss"] < 6 and "pending" not in metrics
    loaded = load_model(tmp_path / "run" / "checkpoints" / "last.ckpt").decoder
    assert type(loaded.get_submodule("layers.1.ffn.router")) is ROUTERS[router]  # type: ignore[index]
    if router in ("threshold", "relu", "top_p", "capacity", "expert_choice"):
        with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["router/layers.1.ffn/margin"]]
        assert rows and all(0 < float(row["router/layers.1.ffn/experts_per_token"]) <= 8 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("router", ["quantile", "relu"])
def test_killed_and_resumed_equals_uninterrupted(composed: Composed, corpus: Path, tmp_path: Path, router: str) -> None:
    settings = [*named(router), "training.accumulate=2"]
    command = [str(ROOT / "scripts" / "train.py"), *SMOKE, f"data.path={corpus}", f"run_dir={tmp_path / 'killed'}"]
    # in the middle of step 14, four steps after a checkpoint
    kill_in_call("moesaic.data:TrainingLoader", "batch", 27, [*command, *settings], tmp_path)
    assert load_checkpoint(tmp_path / "killed" / "checkpoints" / "last.ckpt")["global_step"] == 10
    resume = ["resume=true", f"run_dir={tmp_path / 'killed'}"]
    train.train(composed(*resume), resume)
    run(composed(*settings, f"run_dir={tmp_path / 'whole'}"))
    first, second = (
        load_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt")["state_dict"] for name in ("whole", "killed")
    )
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
