"""The long-context tasks of moesaic evaluate and the evaluations of studies, on a checkpoint of seconds."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from moesaic.checkpoints import save_model
from moesaic.cli import evaluate
from moesaic.cli.common import plain
from moesaic.data import BPETokenizer, DataConfig
from moesaic.errors import InputError
from moesaic.evaluation.checkpoint_evaluations import (
    copying_evaluation,
    loss_by_position_evaluation,
    needle_evaluation,
    open_source,
)
from moesaic.models import build_decoder, llama4_toy

ROOT = Path(__file__).resolve().parents[2]

Composed = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def checkpoint(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model with a training length of 32."""
    torch.manual_seed(0)
    tokenizer = BPETokenizer.train([path.read_bytes() for path in corpus.iterdir()], 300)
    path = tmp_path_factory.mktemp("model") / "it.ckpt"
    decoder = build_decoder(llama4_toy(tokenizer.vocab_size, init_std=None))
    save_model(path, decoder, tokenizer, seq_len=32)
    return path


@pytest.fixture(scope="session")
def nameless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without tokenizer."""
    path = tmp_path_factory.mktemp("model") / "it.ckpt"
    save_model(path, build_decoder(llama4_toy(300)), seq_len=32)
    return path


@pytest.fixture
def asked(composed: Composed, checkpoint: Path, tmp_path: Path) -> Composed:
    def compose_evaluation(*overrides: str) -> dict[str, Any]:
        return composed(
            "data=files",
            f"checkpoint={checkpoint}",
            f"output={tmp_path / 'scored'}",
            "needle.multiples=[4,8]",
            "needle.depths=[0,1]",
            "needle.samples=2",
            *overrides,
            config="evaluate",
        )

    return compose_evaluation


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


@pytest.mark.slow
def test_loss_by_position_of_variants(asked: Composed, tmp_path: Path) -> None:
    switches = "attention.temperature.attn_scale=2 attention.attention_chunk_size=4"
    variants = f"variants=[as_trained,no_temperature,window,scalable_softmax,'{switches}']"
    config = asked("task=loss_by_position", variants)
    summary = evaluate.evaluate_long_context(config)
    assert list(summary) == ["as_trained", "no_temperature", "window", "scalable_softmax", switches]
    assert summary["as_trained"].keys() >= {"within/loss", "beyond/loss", "beyond/bits_per_byte"}
    assert not any("difference" in key for key in summary["as_trained"])
    for name in list(summary)[1:]:
        assert summary[name]["beyond/difference"] == pytest.approx(
            summary[name]["beyond/loss"] - summary["as_trained"]["beyond/loss"]
        )
        assert summary[name]["beyond/difference"] != 0
    assert summary["window"]["within/difference"] == pytest.approx(0, abs=1e-6)
    assert files(tmp_path / "scored").keys() == {"loss_by_position.json", "loss_by_position.png"}
    stored = json.loads((tmp_path / "scored" / "loss_by_position.json").read_text())
    assert stored["summary"]["as_trained"][-1]["end"] == 16 * 32
    assert evaluate.variants_table(summary, "it").row_count == 5


@pytest.mark.slow
def test_the_whole_split_in_stretches_agrees_with_the_score(asked: Composed) -> None:
    one = asked(
        "task=loss_by_position", "loss_by_position.multiple=1", "loss_by_position.stretches=null", "output=null"
    )
    found = evaluate.evaluate_long_context(one)["as_trained"]
    whole = evaluate.evaluate({**one, "task": "score"})
    assert found["within/loss"] == pytest.approx(whole["loss"], rel=0.01), "but for the last, shorter window"
    assert found["within/bits_per_byte"] == pytest.approx(whole["bits_per_byte"], rel=0.01)
    assert not any(key.startswith("beyond") for key in found)


@pytest.mark.slow
def test_needles_of_variants(asked: Composed, tmp_path: Path) -> None:
    config = asked("task=needle", "variants=[as_trained,no_temperature]")
    summary = evaluate.evaluate_long_context(config)
    assert 0 <= summary["no_temperature"]["beyond/accuracy"] <= 1
    assert "beyond/accuracy_difference" in summary["no_temperature"]
    assert files(tmp_path / "scored").keys() == {"needle.json", "needle.png"}
    cells = json.loads((tmp_path / "scored" / "needle.json").read_text())["summary"]["as_trained"]
    assert [(cell["length"], cell["depth"]) for cell in cells] == [(128, 0), (128, 1), (256, 0), (256, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["loss_by_position", "needle"])
def test_more_variants_join_and_other_questions_are_refused(asked: Composed, tmp_path: Path, task: str) -> None:
    first = evaluate.evaluate_long_context(asked(f"task={task}"))
    config = asked(f"task={task}", "variants=[as_trained,no_temperature]")
    assert evaluate.evaluate_long_context(config)["as_trained"] == first["as_trained"]
    stored = json.loads((tmp_path / "scored" / f"{task}.json").read_text())
    assert stored["done"].keys() == stored["summary"].keys() == {"as_trained", "no_temperature"}
    alone = evaluate.evaluate_long_context(asked(f"task={task}", "variants=[no_temperature]"))
    assert list(alone) == ["no_temperature", "as_trained"], "what is there stays in table and picture"
    before = files(tmp_path / "scored")
    changed = {"loss_by_position": "loss_by_position.multiple=4", "needle": "needle.seed=1"}[task]
    with pytest.raises(InputError, match="results of another evaluation"):
        evaluate.evaluate_long_context(asked(f"task={task}", changed))
    with pytest.raises(InputError, match="results of another evaluation"):
        evaluate.evaluate_long_context(asked(f"task={task}", "split=train"))
    assert files(tmp_path / "scored") == before


@pytest.mark.slow_but_for(
    "task=needle checkpoint=/nowhere-", "task=needle checkpoint=null-", "task=needle variants=window-"
)
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=recall"], "task='recall': must be one of score, specialization, loss_by_position, needle"),
        (["task=needle", "other_checkpoint=x"], "other_checkpoint=x: only task=specialization has it"),
        (
            ["task=needle", "seq_len=5"],
            "seq_len=5: only task=score and task=specialization have it; see the section needle",
        ),
        (["task=needle", "batch_size=0"], "batch_size=0: must be an integer >= 1"),
        (["task=needle", "split=test"], "split='test': must be one of validation, train"),
        (["task=needle", "variants=window"], "variants='window': must be a list of names and key=value"),
        (["task=needle", "variants=[colder]"], "variants: colder: unknown variant colder; must be as_trained"),
        (
            ["task=loss_by_position", "variants=['attention.chunk=4']"],
            "variants: attention.chunk=4: model.attention.chunk: the model has no such key",
        ),
        (
            ["task=loss_by_position", "loss_by_position.multiple=1000"],
            "a context of 32000 tokens: longer than the data, the text has",
        ),
        (["task=loss_by_position", "loss_by_position.within=files"], "longer than the data, the longest file has"),
        (["task=loss_by_position", "loss_by_position.multiple=0.01"], "multiple=0.01: a context of 0 tokens"),
        (["task=loss_by_position", "loss_by_position.stretches=0"], "loss_by_position.stretches=0: must be"),
        (["task=needle", "needle.multiples=[1000]"], "a context of 32000 tokens: longer than the data"),
        (["task=needle", "needle.multiples=[0.5]"], "a context of 16 tokens: shorter than the needles"),
        (["task=needle", "checkpoint=/nowhere"], "no such file"),
        (["task=needle", "checkpoint=null"], "checkpoint: missing; give moesaic evaluate"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_leaves_nothing_behind(asked: Composed, tmp_path: Path, overrides: list[str], message: str) -> None:
    if "within=files" in overrides[-1]:
        overrides = [*overrides, "loss_by_position.multiple=60"]
    with pytest.raises(InputError, match=re.escape(message)):
        evaluate.evaluate_long_context(asked(*overrides))
    assert not (tmp_path / "scored").exists()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["loss_by_position", "needle"])
def test_damaged_results_are_refused_and_kept(asked: Composed, tmp_path: Path, task: str) -> None:
    evaluate.evaluate_long_context(asked(f"task={task}"))
    path = tmp_path / "scored" / f"{task}.json"
    stored = json.loads(path.read_text())
    rows = stored["done"]["as_trained"]
    broken: list[Any] = [None, "abc", [[1, 2], [3]], [1.0], [{"length": 1}], rows * 3]
    broken += [[*rows[:-1], {**rows[-1], "accuracy": []}]] if task == "needle" else [[[math.nan] * len(rows[0])]]
    contents = [{**stored, "done": {"as_trained": other}} for other in broken]
    for content in [*contents, {**stored, "done": [1]}, {**stored, "summary": None}, [], 5]:
        path.write_text(json.dumps(content))
        before = files(path.parent)
        with pytest.raises(InputError, match=re.escape(str(path))):
            evaluate.evaluate_long_context(asked(f"task={task}"))
        assert files(path.parent) == before


@pytest.mark.slow_but_for("loss_by_position")
@pytest.mark.parametrize("task", ["loss_by_position", "needle"])
def test_pictures_of_others_are_not_overwritten(asked: Composed, tmp_path: Path, task: str) -> None:
    """A run's own plots have these names too."""
    (tmp_path / "scored").mkdir()
    (tmp_path / "scored" / f"{task}.png").write_bytes(b"a run's")
    with pytest.raises(InputError, match=rf"{task}\.png: would be overwritten"):
        evaluate.evaluate_long_context(asked(f"task={task}"))
    assert files(tmp_path / "scored") == {f"{task}.png": b"a run's"}


def test_variants_without_a_task_for_them(asked: Composed) -> None:
    with pytest.raises(InputError, match=re.escape("variants=['window']: they need task=loss_by_position")):
        evaluate.evaluate(asked("variants=[window]"))


@pytest.mark.slow
def test_a_checkpoint_without_tokenizer(asked: Composed, nameless: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Text is refused; token ids are judged, but no needle can be written."""
    for task in ("loss_by_position", "needle"):
        with pytest.raises(InputError, match=r"it has no tokenizer, so it cannot read data\.source='files'"):
            evaluate.evaluate_long_context(asked(f"task={task}", f"checkpoint={nameless}"))
    evaluate.evaluate_long_context(asked("task=loss_by_position", "output=null"))  # encodes the corpus
    [cache] = (tmp_path / "cache").glob("[!.]*")
    ids = ["data.source=memmap", f"data.path={cache}", f"checkpoint={nameless}"]
    summary = evaluate.evaluate_long_context(asked("task=loss_by_position", *ids))
    assert "beyond/loss" in summary["as_trained"] and "beyond/bits_per_byte" not in summary["as_trained"]
    with pytest.raises(InputError, match="task=needle: the checkpoint has no tokenizer"):
        evaluate.evaluate_long_context(asked("task=needle", *ids))


@pytest.mark.slow
def test_the_command(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "evaluate.py")]
    arguments = [f"checkpoint={checkpoint}", "data=files", f"data.path={corpus}", "task=loss_by_position"]
    switches = ["variants=[as_trained,'attention.temperature.attn_scale=0.8']", "output=scored"]
    done = subprocess.run([*command, *arguments, *switches], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "attention.temp" in done.stdout and "±" in done.stdout
    assert (tmp_path / "scored" / "loss_by_position.png").exists()


def test_examples_in_the_comments_are_variants(checkpoint: Path) -> None:
    """What conf/evaluate.yaml shows can be typed: Hydra reads it, and the small model takes it."""
    text = (ROOT / "conf" / "evaluate.yaml").read_text()
    shown = re.search(r"variants='(\[.*?\])'", text, re.DOTALL)
    assert shown is not None
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = plain(compose("evaluate", ["variants=" + re.sub(r"\n#\s*", " ", shown[1])]))
    from moesaic.checkpoints import load_model
    from moesaic.evaluation.variants import build_variants

    variants = build_variants(load_model(checkpoint).decoder, config["variants"], 32)
    assert len(variants) == 6


@pytest.mark.slow
def test_evaluations_of_studies(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    run_config = {"data": {"source": "files", "path": str(corpus), "cache_dir": str(tmp_path)}}
    options = {
        "loss_by_position": {"multiple": 4, "variants": ["as_trained", "window"], "buckets": True},
        "needle": {"multiples": [4, 6], "depths": [0.5], "samples": 2, "buckets": True},
        "recall": {"of": "another evaluation"},
    }
    losses = loss_by_position_evaluation(checkpoint, run_config, options)
    assert all(isinstance(value, float) and math.isfinite(value) for value in losses.values())
    assert {"loss_by_position/window/beyond/difference", "loss_by_position/as_trained/loss/91-128"} <= losses.keys()
    needles = needle_evaluation(checkpoint, run_config, options)
    assert all(isinstance(value, float) and math.isfinite(value) for value in needles.values())
    assert {"needle/as_trained/beyond/accuracy", "needle/as_trained/accuracy/192/0.5"} <= needles.keys()
    assert losses == loss_by_position_evaluation(checkpoint, run_config, options)
    windowed = {key: {**options[key], "window": 32} for key in ("loss_by_position", "needle")}
    found = loss_by_position_evaluation(checkpoint, run_config, windowed)
    assert found["loss_by_position/as_trained/beyond/loss"] == losses["loss_by_position/window/beyond/loss"]
    assert found["loss_by_position/as_trained/within/loss"] == losses["loss_by_position/as_trained/within/loss"]
    assert needle_evaluation(checkpoint, run_config, windowed) != needles
    with pytest.raises(InputError, match=r"evaluation_options\.needle\.window=1: must be an integer >= 2, or null"):
        needle_evaluation(checkpoint, run_config, {"needle": {"window": 1}})
    with pytest.raises(InputError, match=r"evaluation_options\.needle\.depth: unknown key \(did you mean"):
        needle_evaluation(checkpoint, run_config, {"needle": {"depth": 1}})
    with pytest.raises(InputError, match=r"evaluation_options\.needle\.batch_size=0: must be"):
        needle_evaluation(checkpoint, run_config, {"needle": {"batch_size": 0}})
    with pytest.raises(InputError, match=r"evaluation_options\.loss_by_position=5: must be a mapping"):
        loss_by_position_evaluation(checkpoint, run_config, {"loss_by_position": 5})


def test_ids_outside_the_vocabulary(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"dtype": "uint16", "vocab_size": 5000}))
    for name in ("train", "validation"):
        torch.arange(100, dtype=torch.int16).numpy().tofile(tmp_path / f"{name}.bin")
    with pytest.raises(InputError, match="token ids up to 4999, but the checkpoint has a vocabulary of"):
        open_source(checkpoint, DataConfig(source="memmap", path=str(tmp_path)), "train")


def test_copying_is_an_evaluation_too(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    run_config = {"data": {"source": "files", "path": str(corpus), "cache_dir": str(tmp_path)}}
    found = copying_evaluation(checkpoint, run_config, {"copying": {"length": 9, "sequences": 5}})
    names = {
        f"copying/{kind}/{name}" for kind in ("text", "random") for name in ("first", "second", "gain", "accuracy")
    }
    assert set(found) == names and all(math.isfinite(value) for value in found.values())
    with pytest.raises(InputError, match=r"evaluation_options.copying.length=1"):
        copying_evaluation(checkpoint, run_config, {"copying": {"length": 1}})
