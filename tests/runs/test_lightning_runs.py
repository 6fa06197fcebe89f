"""Lightning's own switches in whole runs: each by one line of config."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from small_runs import BPE, SMOKE

from moesaic.checkpoints import load_checkpoint, load_model
from moesaic.config import from_mapping
from moesaic.errors import InputError
from moesaic.training.config import RunConfig
from moesaic.training.run import run

Composed = Callable[..., dict[str, Any]]


def column(run_dir: Path, name: str) -> dict[str, str]:
    """Values of a column of metrics.csv by step."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return {row["step"]: row[name] for row in csv.DictReader(file) if row[name]}


def test_the_defaults_of_yaml_and_dataclass_agree(composed: Composed) -> None:
    config = from_mapping(RunConfig, composed())
    default = RunConfig(name="x", model={}, training=config.training)
    assert (config.callbacks, config.logger) == (default.callbacks, default.logger)
    for name in ("devices", "num_nodes", "strategy", "max_time", "lightning"):
        assert getattr(config.trainer, name) == getattr(default.trainer, name)


@pytest.mark.slow
def test_a_time_limit_ends_with_a_verdict_and_can_be_resumed(
    composed: Composed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit of no time at all ends a run after its first step, wherever that is."""
    settings = ["training.log_every=1", "training.accumulate=2"]
    limited = composed(*settings, "trainer.max_time=00:00:00:00", "training.steps=3", f"run_dir={tmp_path / 'limited'}")
    metrics = run(limited)
    assert (metrics["status"], metrics["steps"]) == ("stopped", 1)
    assert metrics["stopped_by"] == "time limit (trainer.max_time=00:00:00:00)"
    assert metrics["validation/loss"] > 0
    shown = capsys.readouterr().out
    assert "loss" in shown and f"moesaic train resume=true run_dir={tmp_path / 'limited'}" in shown
    resume = {"resume": True, "run_dir": str(tmp_path / "limited")}
    assert run({**limited, **resume})["steps"] == 2, "the whole time again, which is none"
    assert run({**limited, **resume})["status"] == "finished"
    whole = composed(*settings, "training.steps=3", f"run_dir={tmp_path / 'whole'}")
    assert (
        run(whole)["validation/loss"]
        == json.loads((tmp_path / "limited" / "metrics.json").read_text())["validation/loss"]
    )
    assert column(tmp_path / "limited", "train/loss") == column(tmp_path / "whole", "train/loss")


@pytest.mark.slow
def test_early_stopping_ends_with_a_verdict(composed: Composed, tmp_path: Path) -> None:
    config = composed(
        "callbacks=early_stopping",
        *("callbacks.early_stopping.patience=1", "callbacks.early_stopping.min_delta=100"),
        *("training.validate_every=3", f"run_dir={tmp_path / 'run'}"),
    )
    metrics = run(config)
    assert (metrics["status"], metrics["steps"]) == ("finished", 6)
    assert metrics["stopped_by"].startswith("early stopping: Monitored metric validation/loss did not improve")
    assert metrics["validation/loss"] > 0
    assert (tmp_path / "run" / "sample.txt").exists()
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 6


@pytest.mark.slow
def test_an_average_of_the_weights_is_evaluated_kept_and_resumed(composed: Composed, tmp_path: Path) -> None:
    ema = ["callbacks=ema", "callbacks.ema.decay=0.5", "training.steps=4", "training.log_every=1"]
    metrics = run(composed(*ema, f"run_dir={tmp_path / 'whole'}"))
    plain = run(composed("training.steps=4", "training.log_every=1", f"run_dir={tmp_path / 'plain'}"))
    assert column(tmp_path / "whole", "train/loss") == column(tmp_path / "plain", "train/loss"), "training is the same"
    assert metrics["validation/loss"] != plain["validation/loss"]
    stopped = composed(*ema, "trainer.max_time=00:00:00:00", f"run_dir={tmp_path / 'stopped'}")
    resume = {**stopped, "resume": True, "run_dir": str(tmp_path / "stopped")}
    run(stopped), run(resume)
    kept = load_checkpoint(tmp_path / "stopped" / "checkpoints" / "last.ckpt")
    assert any(not torch.equal(value, kept["current_model_state"][key]) for key, value in kept["state_dict"].items())
    run(resume)
    resumed = run(resume)
    assert resumed["status"] == "finished"
    assert resumed["validation/loss"] == metrics["validation/loss"]
    first, second = (
        load_model(tmp_path / name / "checkpoints" / "last.ckpt").decoder.state_dict() for name in ("whole", "stopped")
    )
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.slow
def test_the_learning_rate_finder_suggests_rates_by_one_factor(
    composed: Composed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = composed(
        "callbacks=learning_rate_finder", "callbacks.learning_rate_finder.steps=15", f"run_dir={tmp_path / 'run'}"
    )
    metrics = run(config)
    assert metrics["stopped_by"] == "learning rate finder"
    assert "validation/loss" not in metrics
    factor = metrics["learning_rate_finder/factor"]
    assert 0.01 < factor < 100
    for name in ("learning_rate", "muon_learning_rate"):
        rate = config["optimizer"][name]
        assert metrics[f"learning_rate_finder/optimizer.{name}"] == pytest.approx(rate * factor)
    assert "optimizer.learning_rate=" in capsys.readouterr().out


@pytest.mark.slow
def test_several_loggers_and_none(composed: Composed, tmp_path: Path) -> None:
    run(composed("logger=[tensorboard,csv]", "training.steps=2", f"run_dir={tmp_path / 'both'}"))
    assert (tmp_path / "both" / "csv" / "metrics.csv").exists()
    assert list((tmp_path / "both" / "tensorboard").glob("events*"))
    run(composed("logger=none", "callbacks=none", "training.steps=2", f"run_dir={tmp_path / 'none'}"))
    assert (tmp_path / "none" / "metrics.csv").exists()
    assert not (tmp_path / "none" / "tensorboard").exists()


@pytest.mark.slow
def test_options_of_lightning_reach_it(composed: Composed, tmp_path: Path) -> None:
    run(composed("++trainer.profiler=simple", "training.steps=2", f"run_dir={tmp_path / 'profiled'}"))
    assert "run_training_batch" in next((tmp_path / "profiled").glob("*profile*")).read_text()
    metrics = run(composed("++trainer.fast_dev_run=true", f"run_dir={tmp_path / 'fast'}"))
    assert (metrics["steps"], metrics["stopped_by"]) == (1, "a callback, or an option of Lightning's Trainer")
    metrics = run(
        composed("++trainer.overfit_batches=1", "training.steps=30", f"run_dir={tmp_path / 'overfit'}", "logger=none")
    )
    assert metrics["steps"] == 30
    losses = list(column(tmp_path / "overfit", "train/loss").values())
    assert float(losses[-1]) < 0.7 * float(losses[0])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("++trainer.max_steps=3", r"trainer\.max_steps=3: it must be set as training\.steps"),
        ("++trainer.limit_train_batches=3", r"trainer\.limit_train_batches=3: it must be set as training\.steps"),
        ("++trainer.reload_dataloaders_every_n_epochs=1", r"trainer\.reload_dataloaders_every_n_epochs=1: it must be"),
        ("++trainer.overfit_batches=0.5", r"trainer\.overfit_batches=0\.5.*: must be an integer number of batches"),
        ("++trainer.limit_val_batches=-2", r"trainer\.limit_val_batches=-2.*: Lightning refuses this"),
        ("++callbacks.it._target_=os.system", r"callbacks\.it\._target_='os.system': must be the dotted path"),
    ],
)
def test_refusals_write_nothing(composed: Composed, override: str, message: str) -> None:
    config = composed(override)
    with pytest.raises(InputError, match=message):
        run(config)
    assert not list(Path(config["output_dir"]).glob("*/*"))


@pytest.mark.slow_but_for("overfit_batches=2")
@pytest.mark.parametrize("option", ["overfit_batches=2", "fast_dev_run=true"])
def test_a_run_that_goes_on_takes_more_than_the_first_batches(
    composed: Composed, trained: Path, tmp_path: Path, option: str
) -> None:
    begun = (*BPE, f"ckpt_path={trained}", "training.steps=30", f"run_dir={tmp_path / 'run'}")
    with pytest.raises(
        InputError, match=r"^trainer\.(overfit_batches|fast_dev_run)=.*is further than the first batches"
    ):
        run(composed(*begun, f"++trainer.{option}"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_same_batches_come_again_in_a_resumed_run(composed: Composed, tmp_path: Path) -> None:
    same = ["++trainer.overfit_batches=2", "training.steps=4", "training.log_every=1"]
    run(composed(*same, f"run_dir={tmp_path / 'whole'}"))
    resume = ["resume=true", f"run_dir={tmp_path / 'stopped'}"]
    while run(composed(*same, *resume, "trainer.max_time=00:00:00:00"))["status"] == "stopped":
        pass
    assert column(tmp_path / "stopped", "train/loss") == column(tmp_path / "whole", "train/loss")


@pytest.mark.slow
def test_without_validation_there_are_checkpoints_too(composed: Composed, tmp_path: Path) -> None:
    """Where steps are validated, the state is saved after that; here nothing comes after."""
    saved = []

    class Watch(pl.Callback):
        def on_save_checkpoint(self, trainer: pl.Trainer, *_: Any) -> None:
            saved.append(trainer.global_step)

    every = ["training.validate_every=2", "training.checkpoint_every=2", "training.steps=6"]
    config = composed(*every, "++trainer.limit_val_batches=0", f"run_dir={tmp_path / 'run'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moesaic.training.prepare.make_callbacks", lambda _: [Watch()])
        run(config)
    assert {2, 4, 6} <= set(saved)


@pytest.mark.slow
def test_two_processes_share_one_run_and_go_on_with_it(corpus: Path, tmp_path: Path) -> None:
    """Lightning repeats the command for the second; each step sees the windows of one batch."""
    overrides = [*SMOKE, f"data.path={corpus}", "training.steps=4", "training.log_every=1", "sample.max_new_tokens=0"]
    command = [sys.executable, "-m", "moesaic", "train", *overrides, "trainer.devices=2", f"run_dir={tmp_path / 'run'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    resumed = [*command[:4], "resume=true", "trainer.max_time=null", command[-1]]
    for line, status in (([*command, "trainer.max_time=00:00:00:00"], "stopped"), (resumed, "finished")):
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
        assert metrics["status"] == status
    assert (metrics["status"], metrics["steps"], metrics["tokens"]) == ("finished", 4, 4 * 2 * 64)
    assert list(column(tmp_path / "run", "train/loss")) == ["1", "2", "3", "4"], "one of the two writes"
    assert not (tmp_path / "outputs").exists()
