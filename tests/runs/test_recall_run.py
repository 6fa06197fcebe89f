"""Recall tasks through the same run as text: they are learned, and what such a run leaves behind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moesaic.checkpoints import load_checkpoint
from moesaic.cli import evaluate
from moesaic.data import TaskTrainingLoader
from moesaic.errors import InputError
from moesaic.studies.worker import evaluate_variant
from moesaic.training.run import run

TEST = {"test_sequences": 64, "test_multiples": [1, 4]}
TINY = ["training.batch_size=4", "training.log_every=5", "training.validate_every=10", "training.checkpoint_every=10"]


@pytest.fixture
def recall(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """recall("key=value", ..., task={...}) -> the plain config of experiment=recall, writing below tmp_path."""
    from hydra import compose, initialize_config_dir

    from moesaic.cli.common import plain

    def composed(*overrides: str, task: dict[str, Any] = TEST) -> dict[str, Any]:
        chosen = ["experiment=recall", f"output_dir={tmp_path / 'outputs'}", "trainer.precision=32-true", *overrides]
        with initialize_config_dir(str(Path(__file__).resolve().parents[2] / "conf"), version_base="1.3"):
            config = plain(compose("train", chosen))
        config["data"]["task"] |= task
        return config

    return composed


def only_run(config: dict[str, Any]) -> Path:
    [run_dir] = Path(config["output_dir"]).glob("*/*")
    return run_dir


@pytest.mark.slow
def test_associative_recall_is_learned(
    recall: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """About 4 CPU seconds of training; RoPE in chunks alone could look back 16 tokens."""
    config = recall(
        *("training.steps=120", "training.seq_len=32", "model.attention.attention_chunk_size=16"),
        task={**TEST, "pairs": [4, 8], "keys": 16, "values": 16},
    )
    metrics = run(config)
    assert metrics["recall/accuracy"] > 0.9
    assert metrics["recall/accuracy/pairs=8"] > 0.9
    assert metrics["recall/accuracy/length=4x"] > 0.9
    assert metrics["recall/accuracy/length=4x/distance=128"] > 0.9
    assert metrics["validation/loss"] < 0.3
    shown = capsys.readouterr().out
    assert "recall  accuracy" in shown
    assert "at 4x the training length; chance 6.2%" in shown
    assert "generate.py" not in shown
    assert "tokenized" not in shown


@pytest.mark.slow
@pytest.mark.parametrize("source", ["associative_recall", "selective_copying", "induction"])
@pytest.mark.usefixtures("with_plots")
def test_every_task_leaves_its_numbers_and_no_text(recall: Callable[..., dict[str, Any]], source: str) -> None:
    config = recall(f"data={source}", "training.steps=10", *TINY)
    metrics = run(config)
    run_dir = only_run(config)
    assert metrics["status"] == "finished"
    assert metrics == json.loads((run_dir / "metrics.json").read_text())
    assert metrics["validation/loss"] > 0.5
    assert metrics["tokens"] == 10 * 4 * 64
    names = {name for name in metrics if name.startswith("recall/")}
    amount = {"associative_recall": "pairs=8", "selective_copying": "copies=8", "induction": "triggers=4"}[source]
    assert {"recall/chance", "recall/accuracy", f"recall/accuracy/{amount}", "recall/accuracy/distance=64"} <= names
    assert {f"recall/accuracy/length=4x{part}" for part in ("", f"/{amount}", "/distance=256")} <= names
    assert not [name for name in names if "256" in name and "4x" not in name]
    assert not [name for name in metrics if "bits_per_byte" in name or name.startswith("baselines/")]
    assert (run_dir / "plots" / "recall.png").stat().st_size > 0
    assert (run_dir / "plots" / "loss.png").stat().st_size > 0
    assert not (run_dir / "plots" / "loss_by_position.png").exists()
    assert not (run_dir / "sample.txt").exists()
    stored = yaml.safe_load((run_dir / "config.yaml").read_text())["data"]
    assert stored["source"] == source
    assert stored["task"]["test_multiples"] == [1, 4]
    assert json.loads((run_dir / "environment.json").read_text())["data"]["source"] == source


@pytest.mark.slow
def test_a_crashed_run_goes_on_bit_equal(
    recall: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(name: str, *overrides: str) -> dict[str, Any]:
        return recall(*TINY, "training.steps=20", f"run_dir={tmp_path / name}", *overrides, task={"test_sequences": 4})

    def weights(name: str) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = load_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt")["state_dict"]
        return found

    whole = run(config("whole"))
    original = TaskTrainingLoader.batch

    def crash(self: TaskTrainingLoader, i: int) -> dict[str, torch.Tensor]:
        if i == 15:
            raise RuntimeError("power cut")
        return original(self, i)

    with monkeypatch.context() as patch:
        patch.setattr(TaskTrainingLoader, "batch", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            run(config("crashed"))
    drawn = []
    monkeypatch.setattr(TaskTrainingLoader, "batch", lambda self, i: drawn.append(i) or original(self, i))
    rest = run({**config("crashed"), "resume": True})
    assert drawn == list(range(10, 20))  # of the checkpoint at step 10
    assert rest["recall/accuracy/length=4x"] == whole["recall/accuracy/length=4x"]
    for name, value in weights("whole").items():
        assert torch.equal(value, weights("crashed")[name]), name


@pytest.mark.slow
def test_a_checkpoint_is_scored_again_and_with_other_switches(
    recall: Callable[..., dict[str, Any]], composed: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    config = recall(*TINY, "training.steps=10", f"run_dir={tmp_path / 'run'}")
    metrics = run(config)
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    recalled = {name: value for name, value in metrics.items() if name.startswith("recall/")}

    asked = ["data=associative_recall", f"checkpoint={checkpoint}", f"output={tmp_path / 'scored'}"]
    question = composed(*asked, config="evaluate", smoke=False)
    question["data"]["task"] |= TEST
    numbers = evaluate.evaluate(question)
    assert numbers["loss"] == pytest.approx(metrics["validation/loss"], abs=1e-6)
    assert {name: value for name, value in numbers.items() if name.startswith("recall/")} == recalled
    assert numbers["bits_per_byte"] is None
    stored = json.loads((tmp_path / "scored" / "evaluation.json").read_text())
    assert stored["recall/accuracy/length=4x"] == numbers["recall/accuracy/length=4x"]
    assert (tmp_path / "scored" / "recall.png").stat().st_size > 0
    assert not (tmp_path / "scored" / "evaluation.png").exists()
    anew = {**question, "output": None}
    with pytest.raises(InputError, match=r"split='train': must be validation"):
        evaluate.evaluate({**anew, "split": "train"})
    with pytest.raises(InputError, match=r"max_batches=1: of a recall task all test sequences are scored"):
        evaluate.evaluate({**anew, "max_batches": 1})
    swapped = {**question["data"], "task": {**question["data"]["task"], "keys": 63, "values": 65}}
    with pytest.raises(InputError, match=r"'keys': 63.* but the checkpoint was trained on .*'keys': 64"):
        evaluate.evaluate({**anew, "data": swapped})
    with pytest.raises(InputError, match=r"it has no tokenizer, so it cannot read data\.source='stdlib'"):
        evaluate.evaluate(composed("data=stdlib", f"checkpoint={checkpoint}", config="evaluate", smoke=False))
    with pytest.raises(InputError, match=r"^seq_len=16: a sequence of data.task with size 8"):
        evaluate.evaluate({**anew, "seq_len": 16})
    other = {**question["data"], "task": {**question["data"]["task"], "keys": 32}}
    with pytest.raises(
        InputError, match=r"ids mean .*'all': 104.*, but the checkpoint was trained on 'associative_recall' with "
    ):
        evaluate.evaluate({**anew, "data": other})
    with pytest.raises(InputError, match=r"data\.source='associative_recall'"):
        evaluate.evaluate_long_context({**question, "task": "loss_by_position"})

    same = evaluate_variant(checkpoint, config, tmp_path / "same.ckpt")
    assert same.keys() >= {"validation/loss", "validation/seq_len", *recalled}
    assert same["validation/loss"] == pytest.approx(metrics["validation/loss"], abs=1e-6)
    assert {name: same[name] for name in recalled} == recalled
    blind = {**config["model"], "attention": {**config["model"]["attention"], "attention_chunk_size": 1}}
    other = evaluate_variant(checkpoint, {**config, "model": blind}, tmp_path / "other.ckpt")
    assert other["validation/loss"] != same["validation/loss"]
    assert other["recall/chance"] == same["recall/chance"]


@pytest.mark.parametrize(
    ("overrides", "task", "message"),
    [
        ([], {"pairs": [22]}, r"training\.seq_len=64: .* with size 22 \(of \[22\]\) needs at least 66 tokens"),
        ([], {"pairs": [65]}, r"data\.task\.pairs=\[65\]: .* 65 different keys, but the vocabulary has keys=64"),
        ([], {"pears": [4]}, r"data\.task\.pears: unknown key \(did you mean data\.task\.pairs\?\)"),
        (["training.validation_seq_len=16"], {}, r"training\.validation_seq_len=16: .* size 8 .* 24 tokens"),
        (["model.vocab_size=100"], {}, r"model\.vocab_size=100: the data have token ids up to 135"),
    ],
)
def test_refused_before_there_is_a_run_directory(
    recall: Callable[..., dict[str, Any]], overrides: list[str], task: dict[str, Any], message: str
) -> None:
    config = recall(*overrides, task=task)
    with pytest.raises(InputError, match=message):
        run(config)
    assert not Path(config["output_dir"]).exists()
