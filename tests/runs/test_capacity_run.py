"""Biographies through a whole run: a few are learned, and the bits are counted alike everywhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moesaic.cli import evaluate
from moesaic.errors import InputError
from moesaic.studies.worker import evaluate_variant
from moesaic.training.run import run

FEW = {"people": 12, "name_parts": 4, "attributes": 2, "values": 8}


@pytest.mark.slow
def test_bits_are_stored_and_counted(
    composed: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """72 bits, most of which a small mixture knows after 100 exposures: about 3 CPU seconds of training."""
    config = composed(
        *("experiment=biographies", f"output_dir={tmp_path / 'outputs'}", f"run_dir={tmp_path / 'run'}"),
        *("trainer.precision=32-true", "training.steps=100", "training.batch_size=3", "training.seq_len=18"),
        *("training.validate_every=50", "training.checkpoint_every=50", "finish=score", "trainer.threads=1"),
        smoke=False,
    )
    config["data"]["task"] |= FEW
    metrics = run(config)
    assert metrics["capacity/data_bits"] == 12 * 2 * 3
    assert metrics["capacity/share"] > 0.7
    assert metrics["recall/accuracy"] > 0.7
    assert metrics["recall/chance"] == 1 / 8
    assert metrics["capacity/bits_per_active_parameter"] > metrics["capacity/bits_per_parameter"] > 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "of 72 bits known" in shown
    assert "(100.00 epochs)" in shown, "each of 12 people once in 3 sequences of 4"

    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    again = evaluate_variant(checkpoint, config, tmp_path / "variant.ckpt")
    question = composed("data=biographies", f"checkpoint={checkpoint}", config="evaluate", smoke=False)
    question["data"]["task"] |= FEW
    numbers = evaluate.evaluate(question)
    for name in [name for name in metrics if name.startswith("capacity/")]:
        assert again[name] == pytest.approx(metrics[name], abs=1e-4), name
        assert numbers[name] == pytest.approx(metrics[name], abs=1e-4), name
    other = {**question["data"], "task": {**question["data"]["task"], "people": 13}}
    with pytest.raises(InputError, match=r"'people': 13.* but the checkpoint was trained on .*'people': 12"):
        evaluate.evaluate({**question, "data": other})
