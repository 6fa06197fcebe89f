"""moesaic memory as a person uses it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from moesaic.cli import memory
from moesaic.models import (
    DecoderConfig,
    deepseek_v3,
    gpt_oss_20b,
    gpt_oss_120b,
    mixtral_8x7b,
    muse_spark,
    olmoe_1b_7b,
    qwen3_30b_a3b,
)
from moesaic.models.memory import estimate_memory

MODELS = sorted(path.stem for path in (Path(__file__).resolve().parents[2] / "conf" / "model").glob("*.yaml"))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.slow
def test_every_model_has_a_table(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    memory.main([model, "batch_size=2", "seq_len=128", "dtype=float32", "optimizer=null"])
    printed = capsys.readouterr().out
    found = estimate_memory(memory.find_config(model), batch_size=2, seq_len=128, optimizer=None)
    assert f"{model}: 2 x 128 tokens, float32" in printed
    for n in (found.weights, found.activations, found.total, found.kv_cache):
        assert memory.show(n) in printed


PUBLISHED = (mixtral_8x7b, qwen3_30b_a3b, olmoe_1b_7b, gpt_oss_20b, gpt_oss_120b, deepseek_v3, muse_spark)


@pytest.mark.parametrize("preset", PUBLISHED, ids=lambda preset: preset.__name__)
def test_published_models_are_the_presets_of_their_names(preset: Callable[[], DecoderConfig]) -> None:
    assert memory.find_config(preset.__name__) == preset()


@pytest.mark.slow
def test_both_columns(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["seq_len=64", "trace=true", "checkpoint_activations=true"]
    for optimizer in ("muon", "null"):
        memory.main(["small", *options, f"optimizer={optimizer}"])
        lines = capsys.readouterr().out.splitlines()
        assert any("formula" in line and "traced" in line for line in lines)
        state = next(line for line in lines if line.split()[1:2] == ["optimizer"])
        assert ("0.0 MB" in state) == (optimizer == "null")


def test_units() -> None:
    assert (memory.show(12_345), memory.show(1_234_567_890), memory.show(10**13)) == (
        "0.0 MB",
        "1.23 GB",
        "10,000.00 GB",
    )


@pytest.mark.slow_but_for("arguments0-error: name=llama5: must be one of behemoth, deepseek_v3, deepseek_v3_tiny, ")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama5"], "error: name=llama5: must be one of behemoth, deepseek_v3, deepseek_v3_tiny, "),
        (["scout", "batch_size=0"], "error: batch_size=0: must be a number >= 1"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        memory.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1
