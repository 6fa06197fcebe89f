"""A run with trainer.precision=fp8 on a CPU: it trains, stops, resumes bit-equal, and its checkpoint is plain."""

import csv
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from small_runs import BPE
from test_parallel_runs import on_a_rank, several

from moesaic.checkpoints import load_checkpoint, load_model
from moesaic.errors import InputError
from moesaic.evaluation.precision import flipped_choices_evaluation
from moesaic.imports import trusting
from moesaic.interrupts import Interrupted, interruptible
from moesaic.models import generate
from moesaic.parallel.workers import Workers
from moesaic.training.run import run

Composed = Callable[..., dict[str, Any]]

STEPS = [*BPE, "training.steps=8", "training.log_every=1", "training.validate_every=4"]
FP8 = [*STEPS, "trainer.precision=fp8"]


class Signal(pl.Callback):
    """Sends this process SIGTERM in its fourth step."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_index: int
    ) -> None:
        if trainer.global_step == 3:
            signal.raise_signal(signal.SIGTERM)


def losses(run_dir: Path) -> list[float]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


@pytest.fixture
def whole(train_once: Callable[..., Path]) -> Path:
    return train_once(*FP8)


@pytest.mark.slow
def test_losses_are_near_those_in_fp32_and_not_the_same(whole: Path, train_once: Callable[..., Path]) -> None:
    exact, rounded = losses(train_once(*STEPS)), losses(whole)
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)
    assert json.loads((whole / "metrics.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_equal(
    composed: Composed, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = f"+callbacks.signal={{_target_: {__name__}.Signal}}"
    with interruptible(), pytest.raises(Interrupted):
        run(composed(*FP8, f"run_dir={tmp_path / 'cut'}", stop))
    assert "trainer fp8: emulated, as a CPU has no FP8" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "cut" / "checkpoints" / "last.ckpt")["global_step"] == 4
    with trusting([__name__]):
        run(composed("resume=true", f"run_dir={tmp_path / 'cut'}"))
    assert losses(tmp_path / "cut") == losses(whole)
    one, other = (load_checkpoint(d / "checkpoints" / "last.ckpt") for d in (whole, tmp_path / "cut"))
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name


@pytest.mark.slow
def test_its_checkpoint_holds_ordinary_weights(whole: Path, train_once: Callable[..., Path]) -> None:
    stored, plain = (
        load_checkpoint(each / "checkpoints" / "last.ckpt")["state_dict"] for each in (whole, train_once(*STEPS))
    )
    assert {name: (each.shape, each.dtype) for name, each in stored.items()} == {
        name: (each.shape, each.dtype) for name, each in plain.items()
    }
    decoder = load_model(whole / "checkpoints" / "last.ckpt").decoder
    assert generate(decoder, torch.tensor([[1, 2]]), 3, temperature=0).shape == (1, 5)


@pytest.mark.slow
def test_share_of_flipped_choices(whole: Path, train_once: Callable[..., Path]) -> None:
    """None in the precision that it is compared with, few in another."""
    for run_dir, least in ((whole, 1e-6), (train_once(*STEPS), 0.0)):
        stored = load_checkpoint(run_dir / "checkpoints" / "last.ckpt")["hyper_parameters"]["config"]
        found = flipped_choices_evaluation(run_dir / "checkpoints" / "last.ckpt", stored, {})
        layers = {name: share for name, share in found.items() if name.startswith("flipped/layers.")}
        assert layers and found["flipped"] == pytest.approx(sum(layers.values()) / len(layers))
        assert least <= found["flipped"] <= (0.3 if least else 0.0)


def test_experts_for_gpus_are_refused_before_anything_is_written(composed: Composed, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.moe\.backend='fp8': trainer\.accelerator='cpu' has no FP8; must be"):
        run(composed("model.moe.backend=fp8", f"run_dir={tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_with_experts_on_both_train_near_one(
    composed: Composed, tmp_path: Path, workers: Workers
) -> None:
    """Not the same: a process rounds the gradients of weights by the rows that it has."""
    found = []
    for processes, degrees in ((1, ()), (2, several(2, 2))):
        run_dir = tmp_path / str(processes)
        overrides = (
            *STEPS,
            "trainer.precision=fp8",
            "training.batch_size=4",
            "finish=score",
            f"run_dir={run_dir}",
            *degrees,
        )
        workers.run(on_a_rank, processes, composed(*overrides), overrides)
        found.append(losses(run_dir))
    assert found[0] != found[1]
    assert found[1] == pytest.approx(found[0], rel=0.02)
