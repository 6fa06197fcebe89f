"""Whole runs of several processes: they are the run of one process, and go on with any other number of them."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from small_runs import SMOKE
from torch import distributed

from moesaic.checkpoints import load_checkpoint, load_model
from moesaic.cli.train import train
from moesaic.errors import InputError
from moesaic.parallel.workers import Workers
from moesaic.training.run import run

Composed = Callable[..., dict[str, Any]]

SIZES = ("trainer.precision=64-true", "training.batch_size=4", "training.seq_len=32", "model.num_layers=2")
STEPS = (*SIZES, "training.steps=4", "training.log_every=1", "finish=score", "training.validate_every=2")


def on_a_rank(config: dict[str, Any], overrides: tuple[str, ...]) -> dict[str, Any]:
    """The run in a process that has met the others, as torchrun would start it."""
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    before = dict(os.environ)
    os.environ |= {"LOCAL_RANK": str(rank), "MOESAIC_RUN_DIR": config["run_dir"]}
    rank_zero_only.rank = rank  # type: ignore[attr-defined]
    try:
        return train(config, overrides)
    finally:
        os.environ.clear()
        os.environ |= before


def rows(run_dir: Path) -> list[dict[str, str]]:
    """Those of training: a run that is stopped validates then."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["train/loss"]]


def require_equal_runs(found: Path, wanted: Path, tolerance: float = 1e-9) -> None:
    there, here = rows(wanted), rows(found)
    assert [row["step"] for row in here] == [row["step"] for row in there]
    for row, other in zip(here, there, strict=True):
        for name, value in row.items():
            if "second" in name or not value:
                continue
            within = 1e-5 if name.startswith("router/") else tolerance  # entropies are sums in fp32 in any run
            assert float(value) == pytest.approx(float(other[name]), rel=within, abs=within), (row["step"], name)
    mine, theirs = (load_checkpoint(each / "checkpoints" / "last.ckpt") for each in (found, wanted))
    for name, weight in theirs["state_dict"].items():
        torch.testing.assert_close(mine["state_dict"][name], weight, atol=tolerance, rtol=tolerance)
    [optimizer], [other] = mine["optimizer_states"], theirs["optimizer_states"]
    assert optimizer["param_groups"] == other["param_groups"]
    for i, state in other["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(optimizer["state"][i][name], value, atol=tolerance, rtol=tolerance)
    assert mine["moesaic"]["progress"] == theirs["moesaic"]["progress"]


def several(devices: int, expert: int = 1, shard: bool = True) -> tuple[str, ...]:
    return (f"trainer.devices={devices}", f"parallel.expert={expert}", f"parallel.shard={str(shard).lower()}")


@pytest.mark.parametrize(
    "layouts",
    [
        [(4, 2), (2, 2), (1, 1)],
        pytest.param([(1, 1), (2, 1), (4, 4)], marks=pytest.mark.slow),
        pytest.param([(2, 2), (4, 1), (2, 1, False)], marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_with_any_number_of_processes(
    composed: Composed, tmp_path: Path, workers: Workers, layouts: list[tuple[int, ...]]
) -> None:
    """Stopped after every step, each of which other processes make, with the state of the optimizer that is there."""
    [whole] = workers.run(on_a_rank, 1, composed(*STEPS, f"run_dir={tmp_path / 'whole'}"), STEPS)
    for layout in [*layouts, layouts[-1]]:
        limit = ("trainer.max_time=00:00:00:00", "resume=true", f"run_dir={tmp_path / 'moved'}")
        overrides = (*STEPS, *limit, *several(*layout))
        metrics, *others = workers.run(on_a_rank, layout[0], composed(*overrides), overrides)
        assert all(set(each) <= {"status", "stopped_by"} for each in others), "one rank alone has results"
    assert metrics["status"] == whole["status"] == "finished"
    assert metrics["validation/loss"] == pytest.approx(whole["validation/loss"], rel=1e-7)
    require_equal_runs(tmp_path / "moved", tmp_path / "whole")
    load_model(tmp_path / "moved" / "checkpoints" / "last.ckpt")
