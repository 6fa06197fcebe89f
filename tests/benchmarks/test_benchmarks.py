"""Every benchmark runs, in seconds, and its rows hold what they claim."""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
NO_BENCHMARKS = {"__init__", "__main__", "harness", "layer", "limit"}
NAMES = sorted({path.stem for path in BENCHMARKS.glob("*.py")} - NO_BENCHMARKS)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Benchmarks set the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow_but_for("loss")
@pytest.mark.parametrize("name", NAMES)
def test_smoke(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = importlib.import_module(f"benchmarks.{name}")
    output = tmp_path / "new" / "rows.jsonl"
    rows = benchmark.main(["--smoke", "--output", str(output)])
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert written == [json.loads(json.dumps(dataclasses.asdict(row))) for row in rows]
    assert len({json.dumps([row.benchmark, row.variant, row.shape, row.dtype, row.what]) for row in rows}) == len(rows)
    measured = [row for row in rows if row.seconds is not None]
    assert measured
    for row in rows:
        assert row.device and row.clock == "cpu" and row.threads == 1 and row.torch == torch.__version__
        assert row.seconds is not None or row.note, "a row without a number says why"
    for row in measured:
        assert 0 < row.seconds[0] <= row.seconds[1] <= row.seconds[2]
        if row.ratio is not None:
            same = [x for x in measured if (x.shape, x.dtype, x.what) == (row.shape, row.dtype, row.what)]
            base = next((x for x in same if x.variant == row.ratio_to), None)
            if base is not None:
                assert row.ratio == pytest.approx(row.seconds[1] / base.seconds[1])
    out = capsys.readouterr().out
    assert out.count("\n") > 3
    assert out.count("measures nothing") >= 1, "no table of a smoke run looks like a result"


@pytest.mark.slow
def test_acceleration_covers_every_implementation() -> None:
    from benchmarks import acceleration

    rows = acceleration.main(["--smoke"])
    offered = {"llama4": ["own bmm"]}
    offered["mixtral"] = offered["qwen3_moe"] = ["eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()]
    found = {(row.shape["model"], row.variant) for row in rows}
    assert found == {(m, v) for m, names in offered.items() for v in [*names, "accelerated"]}
    ran = {row.variant for row in rows if row.seconds is not None}
    assert ran >= {"own bmm", "eager", "batched_mm", "grouped_mm", "accelerated"}


def test_different_results_are_not_compared() -> None:
    from benchmarks import acceleration

    block, x = acceleration.Case("mixtral", 8, 16, 32, 32, "fp32", torch.device("cpu")).build()
    variants = {name: acceleration.variant(block, name) for name in ("accelerated", "eager", "grouped_mm")}
    parameters = [[id(p) for p in made.parameters()] for made in variants.values()]
    assert parameters[0] == parameters[1] == parameters[2], "on the same weights"
    acceleration.require_agreement(variants, x)
    variants["eager"].experts.act_fn = torch.nn.GELU()
    with pytest.raises(SystemExit, match="eager and ours differ"):
        acceleration.require_agreement(variants, x)


def test_what_needs_too_much_memory_is_left_out_with_the_size() -> None:
    from benchmarks import acceleration

    case = acceleration.Case("qwen3_moe", 16, 1000, 100, 100, "fp32", torch.device("cpu"))
    assert case.copied_bytes() == 3 * 1000 * 8 * 3 * 100 * 100 * 4
    assert "about 3 GB, allowed 1" in (acceleration.obstacle(case, "batched_mm", 1.0) or "")
    assert acceleration.obstacle(case, "grouped_mm", 1.0) is None


@pytest.mark.slow
def test_all_in_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.__main__ import NAMES as IN_TURN
    from benchmarks.__main__ import main

    assert set(IN_TURN) == set(NAMES) - {"acceleration", "gpu"}
    arguments = ["--smoke", "--only", "loss", "roofline", "--directory", str(tmp_path / "new")]
    main(arguments)
    rows = [json.loads(line) for line in (tmp_path / "new" / "rows.jsonl").read_text().splitlines()]
    assert {row["benchmark"] for row in rows} == {"loss", "roofline"}
    assert (tmp_path / "new" / "roofline.png").stat().st_size > 5000
    with pytest.raises(SystemExit):
        main(arguments)
    assert "choose another directory" in capsys.readouterr().err


@pytest.mark.slow_but_for("epyc")
@pytest.mark.parametrize("machine", ["xeon", "epyc"])
@pytest.mark.slow
def test_pictures_of_the_committed_rows(machine: str, tmp_path: Path) -> None:
    """The second CPU has no bf16."""
    from benchmarks.__main__ import PICTURES, plot

    lines = (BENCHMARKS / "results" / f"bench_{machine}.jsonl").read_text().splitlines()
    assert plot([json.loads(line) for line in lines], tmp_path) == [tmp_path / f"{name}.png" for name in PICTURES]
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in PICTURES)
