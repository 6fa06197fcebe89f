"""experiment=extend_context on a model of seconds: a longer length, other positions, before and after."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from moesaic.checkpoints import load_checkpoint, load_model, save_model
from moesaic.config import from_mapping
from moesaic.data import BPETokenizer, DataConfig, load_data
from moesaic.errors import InputError
from moesaic.evaluation.long_context import choose_stretches
from moesaic.models import build_decoder, llama4_toy
from moesaic.training import run as run_module
from moesaic.training.run import run

Composed = Callable[..., dict[str, Any]]

SHORT = ["training.steps=6", "training.seq_len=16", "training.validation_seq_len=16", "model.num_layers=2"]
BPE = ["data.tokenizer=bpe", "data.vocab_size=300", "model.nope_layer_interval=2"]


@pytest.fixture
def start(train_once: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of the checkpoint of a finished run at 16 tokens."""
    shutil.copytree(train_once(*SHORT, *BPE), tmp_path / "start")
    return tmp_path / "start" / "checkpoints" / "last.ckpt"


@pytest.fixture
def extended(composed: Composed, start: Path) -> Composed:
    def compose_extension(*overrides: str) -> dict[str, Any]:
        return composed(
            *("experiment=extend_context", f"ckpt_path={start}", "model.num_layers=2", *BPE),
            *(
                "training.steps=4",
                "training.seq_len=32",
                "training.validation_seq_len=32",
                "training.checkpoint_every=2",
            ),
            *("model.attention.attention_chunk_size=16", "extend_context.multiple=2", "extend_context.stretches=3"),
            *overrides,
        )

    return compose_extension


def only_run(config: dict[str, Any]) -> Path:
    [run_dir] = Path(config["output_dir"]).glob("extend/*")
    return run_dir


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*has collapsed:RuntimeWarning")
def test_before_and_after_on_the_same_text(extended: Composed, start: Path) -> None:
    console = Console(file=io.StringIO(), width=160)
    config = extended("name=extend", "model.attention.rope_theta=500", "model.attention.temperature=null")
    metrics = run(config, console)
    run_dir = only_run(config)
    assert metrics["status"] == "finished"
    assert metrics["steps"] == 4, "optimizer, schedule and step are new"
    assert metrics == json.loads((run_dir / "metrics.json").read_text())
    for name in ("before", "before, new settings", "after"):
        for place in ("0-16", "16-32", "32-64"):
            assert metrics[f"extend_context/{name}/{place}/loss"] > 0
    change = metrics["extend_context/after/16-32/difference"]
    after, before = (metrics[f"extend_context/{name}/16-32/loss"] for name in ("after", "before"))
    assert change == pytest.approx(after - before)
    assert change != 0
    assert metrics["extend_context/before, new settings/16-32/difference"] != 0
    assert (run_dir / "plots" / "extend_context.png").stat().st_size > 0
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert "Loss by position, nats per token: trained at 16, then at 32" in printed
    assert f"{before:.4f}" in printed

    # the number is that of the checkpoint, on a whole pass over the same stretches
    model = load_model(start)
    assert isinstance(model.tokenizer, BPETokenizer)
    ours = load_model(run_dir / "checkpoints" / "last.ckpt")
    assert ours.config.attention.rope_theta == 500
    assert ours.config.attention.attention_chunk_size == 16
    assert ours.tokenizer is not None
    assert ours.tokenizer.to_dict() == model.tokenizer.to_dict()
    tokens = load_data(from_mapping(DataConfig, config["data"], "data"), model.tokenizer).validation.tokens
    stretches = choose_stretches(tokens, 64, limit=3, within="stream", end_of_text=model.tokenizer.end_of_text)
    with torch.inference_mode():
        logits = model.decoder(stretches[:, :-1]).logits
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), stretches[:, 1:].flatten(), reduction="none")
    assert before == pytest.approx(float(nats.view(len(stretches), -1)[:, 16:32].mean()), abs=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*has collapsed:RuntimeWarning")
def test_killed_and_resumed_without_the_first_checkpoint(extended: Composed, start: Path) -> None:
    whole = run(extended("name=whole"))
    config = extended("name=extend")
    with pytest.MonkeyPatch.context() as patch:
        original = run_module.LanguageModel.training_step

        def crash(self: Any, batch: Any, batch_index: int) -> Any:
            if self.trainer.global_step == 3:
                raise RuntimeError("power cut")
            return original(self, batch, batch_index)

        patch.setattr(run_module.LanguageModel, "training_step", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            run(config)
    shutil.rmtree(start.parent)
    rest = run({**config, "resume": True, "ckpt_path": None, "run_dir": str(only_run(config))})
    numbers = {key: value for key, value in whole.items() if key.startswith("extend_context/")}
    assert numbers
    assert {key: rest[key] for key in numbers} == numbers


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*has collapsed:RuntimeWarning")
def test_other_text_is_read_with_the_tokenizer_of_the_checkpoint(
    extended: Composed, tmp_path: Path, start: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for i in range(12):
        (other / f"file{i}.py").write_text("".join(f"while other_{i} < {n}: pass\n" for n in range(60)))
    config = extended("name=extend", f"data.path={other}")
    assert run(config)["status"] == "finished"
    theirs, ours = load_checkpoint(start), load_checkpoint(only_run(config) / "checkpoints" / "last.ckpt")
    assert ours["hyper_parameters"]["tokenizer"] == theirs["hyper_parameters"]["tokenizer"]


@pytest.mark.slow
def test_what_needs_other_weights_or_says_nothing_is_refused(
    extended: Composed, composed: Composed, start: Path, tmp_path: Path
) -> None:
    nameless = tmp_path / "nameless.ckpt"
    save_model(nameless, build_decoder(llama4_toy(300)), seq_len=16)
    for overrides, message in (
        (
            ["model.hidden_dim=48"],
            r"model of another shape: model.hidden_dim: 384 there, 48 now$",
        ),
        (["model.attention.conv_width=0"], r"model.attention.conv_width: 3 there, 0 now$"),
        (["model.nope_layer_interval=0"], r"model.nope_layer_interval: 2 there, 0 now$"),
        (["training.seq_len=16"], r"training.seq_len=16: the checkpoint was trained at 16; it must be longer"),
        (["extend_context.multiple=0.5"], r"extend_context.multiple=0.5: must be a number >= 1"),
        (["extend_context.multiple=1000"], r"a context of 32000 tokens: longer than the data"),
        (["extend_context.stretches=0"], r"extend_context.stretches=0: must be a number > 0"),
        (["ckpt_path=null"], r"ckpt_path=None: extend_context needs one"),
        (["ckpt_path=/nowhere"], r"checkpoint /nowhere: no such file"),
        ([f"ckpt_path={nameless}"], r"nameless.ckpt: it has no tokenizer, so it cannot read data.source='files'"),
    ):
        config = extended("name=extend", *overrides)
        with pytest.raises(InputError, match=message):
            run(config)
        assert not (Path(config["output_dir"]) / "extend").exists()
    with pytest.raises(InputError, match=r"rope_theta: 10000.0 there, 500.0 now"):
        run(composed(*SHORT, *BPE, "name=extend", f"ckpt_path={start}", "model.attention.rope_theta=500"))
