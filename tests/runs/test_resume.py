"""kill -9 and resume: the rest of the run is bit-equal to one that was never killed."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import SMOKE, kill_in_call

from moesaic.checkpoints import load_checkpoint
from moesaic.cli import train
from moesaic.errors import InputError
from moesaic.files import LOCK, partial_of
from moesaic.training.run import run
from moesaic.training.starting import find_run, require_free

Composed = Callable[..., dict[str, Any]]

ROOT = Path(__file__).resolve().parents[2]


SETTINGS = [
    *("model.moe.expert_bias=true", "training.accumulate=2"),
    *("balance.expert_bias_update_rate=0.01", "balance.load_balance_scope=global_batch"),
    *("training.steps=40", "training.log_every=7", "training.validate_every=25"),
]


def command(corpus: Path, tmp_path: Path, run_dir: str) -> list[str]:
    script = str(ROOT / "scripts" / "train.py")
    return [script, *SMOKE, f"data.path={corpus}", f"run_dir={tmp_path / run_dir}", *SETTINGS]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [
            {key: value for key, value in row.items() if key not in ("seconds", "tokens_per_second")}
            for row in csv.DictReader(file)
        ]


@pytest.mark.slow  # test_faults has the same with signals and full disks
def test_killed_and_resumed_equals_uninterrupted(composed: Composed, corpus: Path, tmp_path: Path) -> None:
    # in the middle of step 28, eight steps after a checkpoint
    kill_in_call("moesaic.data:TrainingLoader", "batch", 55, command(corpus, tmp_path, "killed"), tmp_path)
    assert load_checkpoint(tmp_path / "killed" / "checkpoints" / "last.ckpt")["global_step"] == 20
    assert not (tmp_path / "killed" / "metrics.json").exists()

    resume = ["resume=true", f"run_dir={tmp_path / 'killed'}"]
    train.train(composed(*resume), resume)
    run(composed(*SETTINGS, f"run_dir={tmp_path / 'whole'}"))

    for table in ("metrics.csv", "routing.csv"):
        assert rows(tmp_path / "killed" / table) == rows(tmp_path / "whole" / table), table
    first, second = (
        load_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt")["state_dict"] for name in ("whole", "killed")
    )
    assert any("expert_bias" in name and value.abs().sum() > 0 for name, value in first.items())
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    final = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "killed")]
    assert final[0]["validation/loss"] == final[1]["validation/loss"]


@pytest.mark.slow
def test_contradicting_overrides_are_refused_on_resume(composed: Composed, tmp_path: Path) -> None:
    run(composed(*SETTINGS, f"run_dir={tmp_path / 'run'}", "training.steps=10"))
    (tmp_path / "run" / "metrics.json").unlink()  # as if it had been killed just before the end
    overrides = ["resume=true", f"run_dir={tmp_path / 'run'}", "training.steps=20"]
    with pytest.raises(InputError) as refusal:
        train.train(composed(*overrides), overrides)
    assert str(refusal.value) == (
        "training.steps=20: the run to resume has 10; resume continues it unchanged. For another value start a new "
        f"run, with ckpt_path={tmp_path / 'run'}/checkpoints/last.ckpt"
    )
    overrides = [*overrides[:2], "training.checkpoint_every=7", "logger=none", "trainer.threads=1"]
    train.train(composed(*overrides), overrides)
    stored = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["hyper_parameters"]["config"]
    assert (stored["training"]["checkpoint_every"], stored["logger"], stored["trainer"]["threads"]) == (7, {}, 1)
    (tmp_path / "run" / "metrics.json").unlink()
    train.train(composed(*overrides[:2]), overrides[:2])  # as it began


def test_a_run_that_was_killed_while_it_wrote_its_config_begins_again(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    partial_of(tmp_path / "config.yaml").write_text("name: x\nmo", encoding="utf-8")
    config = {"resume": True, "run_dir": str(tmp_path)}
    assert find_run(config).kind == "new"
    require_free(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="not a run directory"):
        find_run(config)
