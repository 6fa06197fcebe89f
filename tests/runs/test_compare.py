"""moesaic compare as a person uses it."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moesaic.cli import compare
from moesaic.errors import InputError


@pytest.fixture
def common(corpus: Path, tmp_path: Path) -> list[str]:
    tiny = ["debug=smoke", "training.steps=4", "model.dim=16", "model.attention.head_dim=4", "model.moe.hidden_dim=24"]
    data = ["data=files", "data.tokenizer=bytes", f"data.path={corpus}", f"++data.cache_dir={tmp_path / 'cache'}"]
    return [*tiny, *data, f"output_dir={tmp_path / 'outputs'}", "rounds=2"]


def compared(*arguments: str) -> tuple[dict[str, Any], str]:
    shown = io.StringIO()
    return compare.compare(arguments, Console(file=shown, width=140)), shown.getvalue()


def test_equal_active_flops_within_one_step_of_width(common: list[str]) -> None:
    a, b = "a=model.dense_twin=true model.moe.hidden_dim=88", "b=model.moe.num_experts=16 model.moe.top_k=2"
    result, shown = compared(a, b, "solve=active_flops", *common)
    assert result["width"] == "model.moe.hidden_dim"
    assert result["found"] % 8 == 0
    # per step of width: top 2 and a shared expert in 2 layers, three matrices each
    step = 2 * 2 * 3 * 3 * 16 * 8
    assert abs(result["solved"]["forward_flops"] - result["a"]["forward_flops"]) <= step
    assert abs(result["b"]["forward_flops"] - result["a"]["forward_flops"]) > step
    assert all(result[name]["step_seconds"] > 0 for name in ("a", "b", "solved"))
    for words in ("active parameters", "ms per step", f"solve=active_flops: model.moe.hidden_dim={result['found']}"):
        assert words in shown, words
    [first, second] = [line for line in shown.splitlines() if line.startswith("moesaic train")]
    assert first.endswith("model.dense_twin=true model.moe.hidden_dim=88")
    assert second.endswith(f"model.moe.num_experts=16 model.moe.top_k=2 model.moe.hidden_dim={result['found']}")


@pytest.mark.parametrize("width", ["model.hidden_dim", "model.moe.hidden_dim"])
def test_equal_parameters_at_either_width(common: list[str], width: str) -> None:
    a, b = "a=model.moe.num_experts=16", "b=model.moe.num_experts=4"
    result, _ = compared(a, b, "solve=parameters", f"width={width}", "rounds=0", *common[:-1])
    assert result["solved"]["parameters"] == pytest.approx(result["a"]["parameters"], rel=0.05)


@pytest.mark.slow
def test_equal_seconds(common: list[str]) -> None:
    result, shown = compared("a=model.hidden_dim=512", "b=model.hidden_dim=64", "solve=seconds", *common)
    assert result["found"] % 8 == 0
    assert "where b / a is" in shown


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*has collapsed:RuntimeWarning")  # 4 steps are no time to balance in
def test_launch_trains_both_and_ends_in_a_table(common: list[str]) -> None:
    arguments = ["a=model.dense_twin=true", "b=model.moe.num_experts=4", "solve=active_flops", "launch=true"]
    result, shown = compared(*arguments, *common)
    directory = Path(result["directory"])
    assert sorted(path.name for path in directory.iterdir() if path.is_dir()) == ["a", "solved"]
    table = (directory / "report.md").read_text()
    assert table.count("1 of 1") == 2
    assert "model.dense_twin=True" in table or "model.dense_twin=true" in table
    assert "report.md" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a=model.dim=16"], r"b: missing; it needs a string"),
        (["a=", "b=model.dimm=3"], r"b: model.dimm: unknown key \(did you mean model.dim\?\)"),
        (["a=", "b='name=x"], r"b=.*: No closing quotation; must be key=value, separated by spaces"),
        (["a=", "b=", "solve=watts"], r"solve: found 'watts' \(str\); must be active_flops \| parameters \| seconds"),
        (["a=", "b=", "width=model.hidden_dim"], r"nothing to solve; give solve="),
        (["a=", "b=", "rounds=0", "solve=seconds"], r"rounds=0: solve=seconds needs measured steps"),
        (["a=", "b=model.moe.top_k=9"], r"b: model.moe.top_k=9: must be 1 to num_experts=8"),
        (
            ["a=", "b=model.interleave_moe_layer_step=0", "solve=parameters", "width=model.moe.hidden_dim"],
            r"solve=parameters: width=model.moe.hidden_dim: nothing to solve",
        ),
        (["a=", "b=model.dim=640", "solve=parameters"], r"solve=parameters: out of range: b has .* even at width 8"),
        (["a=", "b=", "model=enormous"], r"enormous"),
        (["a=trainer.threads=1", "b=trainer.threads=2"], r"b: trainer.threads=2: a has 1; .* give one for both"),
        (["a=", "b=trainer.accelerator=tpu"], r"b: trainer.accelerator"),
        (
            ["a=", "b=model.vocab_size=9", "launch=true"],
            r"b: model.vocab_size=9: the data have token ids up to \d+; must be",
        ),
    ],
)
def test_bad_input(common: list[str], arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compared(*common[:-1], *arguments)


def test_the_command(common: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    compare.main(["a=", "b=model.dense_twin=true", *common])
    shown = capsys.readouterr().out
    assert "MFLOP per token, training" in shown
    assert shown.count("moesaic train debug=smoke") == 2
    with pytest.raises(SystemExit) as stopped:
        compare.main(["a=", *common])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: b: missing; it needs a string\n"
