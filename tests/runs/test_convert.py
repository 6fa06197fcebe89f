"""moesaic convert: from a run to transformers and back, and what a person reads when it cannot be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moesaic.checkpoints import load_model
from moesaic.cli import convert, evaluate, generate
from moesaic.evaluation.sampling import SampleConfig
from moesaic.interop import to_hf
from moesaic.models import build_decoder, llama4_toy
from moesaic.training.run import run

Composed = Callable[..., dict[str, Any]]


@pytest.fixture
def llama(train_once: Callable[..., Path]) -> Path:
    """last.ckpt of a short run in Llama 4's layout with a BPE tokenizer, to be read only."""
    layout = ["model.attention.conv_width=0", "model.attention.qk_norm=true", "data.tokenizer=bpe"]
    return train_once("training.steps=2", "data.vocab_size=300", *layout) / "checkpoints" / "last.ckpt"


@pytest.mark.slow
def test_from_a_run_to_transformers_and_back(llama: Path, tmp_path: Path, composed: Composed) -> None:
    trained = llama
    directory, back = tmp_path / "hf", tmp_path / "back.ckpt"
    convert.main([str(trained), str(directory)])
    original = load_model(trained)
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    text = "def f(x):\n    return x + 1\n\n\nclass é:\n\tpass  # done"
    assert original.tokenizer is not None
    ids = original.tokenizer.encode(text.encode()).tolist()
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == text
    assert theirs.config.eos_token_id == tokenizer.eos_token_id == original.tokenizer.end_of_text
    tokens = torch.tensor([ids])
    with torch.no_grad():
        expected = original.decoder(tokens).logits
        torch.testing.assert_close(theirs(tokens).logits, expected, atol=1e-5, rtol=1e-5)

    convert.main([str(directory), str(back)])
    returned = load_model(back)
    assert returned.config.layers == original.config.layers
    with torch.no_grad():
        assert torch.equal(returned.decoder(tokens).logits, expected)
    greedy = SampleConfig(prompt="def ", max_new_tokens=8, temperature=0)
    assert generate.generate_text(str(back), greedy) == generate.generate_text(str(trained), greedy)
    scores = [
        evaluate.evaluate(composed("data=files", f"checkpoint={path}", "seq_len=64", config="evaluate"))
        for path in (trained, back)
    ]
    assert scores[0]["bits_per_byte"] == pytest.approx(scores[1]["bits_per_byte"], abs=1e-9)
    config = composed("name=on", "training.steps=2", "data.vocab_size=300", "data.tokenizer=bpe", f"ckpt_path={back}")
    config["model"] = {**load_model(trained).run_config["model"]}
    assert run(config)["status"] == "finished"


@pytest.mark.slow
def test_only_weights_of_a_converted_model_are_trained_on(llama: Path, tmp_path: Path, composed: Composed) -> None:
    """Steps count from zero, and the first loss is that of the imported weights."""
    trained = llama
    directory, back = tmp_path / "hf", tmp_path / "back.ckpt"
    convert.main([str(trained), str(directory)])
    convert.main([str(directory), str(back)])
    config = composed("training.steps=1", "data.vocab_size=300", "data.tokenizer=bpe", f"ckpt_path={back}")
    config["model"] = {**load_model(trained).run_config["model"]}
    config["optimizer"] = {**config["optimizer"], "learning_rate": 1e-12, "muon_learning_rate": 1e-12}
    metrics = run(config)
    assert metrics["steps"] == 1
    run_dir = next(Path(config["output_dir"]).glob(f"{config['name']}/*/checkpoints/last.ckpt"))
    for name, p in load_model(run_dir).decoder.named_parameters():
        torch.testing.assert_close(p, load_model(trained).decoder.get_parameter(name), atol=1e-6, rtol=1e-6)


@pytest.mark.slow
def test_directory_to_directory_changes_dtype_and_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decoder = build_decoder(llama4_toy())
    to_hf(decoder, tmp_path / "a")
    convert.main([str(tmp_path / "a"), str(tmp_path / "b"), "dtype=bfloat16", "max_shard_gb=0.00003"])
    shards = sorted((tmp_path / "b").glob("*.safetensors"))
    found = {name: tensor for file in shards for name, tensor in load_file(file).items()}
    expected = load_file(tmp_path / "a" / "model.safetensors")
    assert len(shards) > 1 and found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in expected.items())
    printed = capsys.readouterr().out
    assert "4, 2 of them MoE, 1 without positions" in printed
    assert f"{sum(p.numel() for p in decoder.parameters()):,}" in printed


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to_hf(build_decoder(llama4_toy()), tmp_path / "a", max_shard_bytes=30_000)
    removed = sorted((tmp_path / "a").glob("*.safetensors"))[1]
    removed.unlink()
    before = sorted(tmp_path.rglob("*"))
    convert.main([str(tmp_path / "a"), "dry_run=true"])
    printed = capsys.readouterr().out
    assert "all accounted for" in printed and "1: of their tensors only the names were checked" in printed
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_dry_run_of_a_checkpoint_says_what_llama4_has_not(trained: Path, tmp_path: Path, capsys: Any) -> None:
    for arguments in ([str(trained), "dry_run=true"], [str(trained), str(tmp_path / "hf")]):
        with pytest.raises(SystemExit):
            convert.main(arguments)
        assert "error: this model is not a Llama 4: attention.conv_width: found 3" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out"], "checkpoint nowhere: no such file"),
        (["hf"], "destination: missing"),
        (["hf", "taken.ckpt"], "taken.ckpt: exists already"),
        (["hf", "taken.txt"], "taken.txt: exists already"),
        (["hf", "hf"], "hf/config.json: there is already a model in this directory"),
        (["empty", "out"], "empty: no config.json in this directory"),
        (["taken.ckpt", "new.ckpt"], "taken.ckpt: a checkpoint already"),
        (["taken.ckpt", "out"], "checkpoint taken.ckpt: truncated or not a checkpoint"),
        (["hf", "out", "max_shard_gb=0"], "max_shard_gb=0: must be a number > 0 and < 1e9"),
    ],
    ids=str,
)
def test_bad_input(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    to_hf(build_decoder(llama4_toy()), tmp_path / "hf")
    Path("empty").mkdir()
    for name in ("taken.ckpt", "taken.txt"):
        Path(name).write_text("something")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as end:
        convert.main(arguments)
    assert end.value.code == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
