"""The harness measures what it says."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import (
    Measurement,
    bf16_obstacle,
    commit,
    count,
    dtypes_to_time,
    finish,
    gigabytes,
    held_memory,
    parse_options,
    peak_memory,
    print_table,
    quantiles,
    time_in_turn,
)
from benchmarks.limit import FP32, PRECISIONS, precisions_to_time


@pytest.fixture(autouse=True)
def same_threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


@pytest.mark.slow
def test_cpu_time_is_of_this_process_only() -> None:
    options, _ = parse_options("", ["--rounds", "3"])
    samples = time_in_turn({"burns": lambda: burn(0.01), "sleeps": lambda: time.sleep(0.01)}, options, min_seconds=0.01)
    assert [len(s) for s in samples.values()] == [3, 3]
    assert 0.009 < quantiles(samples["burns"])[1] < 0.03
    assert quantiles(samples["sleeps"])[1] < 0.003


def test_variants_run_in_turn_and_in_another_order_each_round() -> None:
    options, _ = parse_options("", ["--rounds", "3"])
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) or burn(0.001) for name in "abc"}  # type: ignore[misc, func-returns-value]
    time_in_turn(calls, options, min_seconds=1e-6)
    assert order[6:] == list("abcbcacab")  # after two of each for warming up


def test_wall_clock_sees_sleep() -> None:
    options, _ = parse_options("", ["--rounds", "2", "--clock", "wall", "--threads", "1"])
    samples = time_in_turn({"sleeps": lambda: time.sleep(0.01)}, options, min_seconds=0.01)
    assert quantiles(samples["sleeps"])[1] > 0.009


@pytest.mark.parametrize(("times", "runs"), [(90.0, False), (1.5, True)])
def test_cpus_that_emulate_bf16_are_not_waited_for(
    times: float, runs: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "bf16_over_fp32", lambda: times)
    options, _ = parse_options("", ["--device", "cpu", "--output", str(tmp_path / "rows.jsonl")])
    assert (bf16_obstacle(options) is None) == runs
    assert list(dtypes_to_time(options)) == ["fp32", "bf16"][: 1 + runs]
    assert precisions_to_time(options) == (PRECISIONS if runs else (FP32,))
    assert len(finish([Measurement("loss", "naive", {}, "fp32", "step")], options)) == 1
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    said = "a bf16 matmul takes 90 times as long as one in fp32 on this CPU"
    assert [row["note"] for row in rows] == ["", f"not run: {said}"][: 2 - runs]
    assert (said in capsys.readouterr().out) != runs


def test_smoke_runs_try_every_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "bf16_over_fp32", lambda: 90.0)
    assert bf16_obstacle(parse_options("", ["--device", "cpu", "--smoke"])[0]) is None


def test_peak_memory_is_exact() -> None:
    held = torch.zeros(1000)

    def call() -> Tensor:
        a = torch.zeros(1_000_000)  # 4 MB
        b = a + 1  # 8
        del a
        c = b[:1000] * 2  # 4 + a little
        d = torch.zeros(500_000)  # 6
        return c + d[:1000] + held

    device = torch.device("cpu")
    assert peak_memory(call, device) == pytest.approx(8_000_000, abs=100)  # numbers such as the 1 are tensors as well
    assert peak_memory(lambda: held + held, device) == pytest.approx(4000, abs=100)
    assert peak_memory(lambda: None, device) == 0
    assert held_memory(call, device) == pytest.approx(4000, abs=100)


def test_clocks_that_do_not_fit_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--clock", "cuda", "--device", "cpu"], "--clock cuda does not fit --device cpu"),
        (["--clock", "cpu", "--threads", "2", "--device", "cpu"], "it needs --threads 1"),
    ):
        with pytest.raises(SystemExit):
            parse_options("", arguments)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "error: argument --device: tpu: must be one of cpu"),
        (["--device", "cuda:77"], "error: argument --device: cuda:77: must be one of cpu"),
        (["--output", "/dev/null/a/b"], "error: --output /dev/null/a/b: cannot be written (Not a direct"),
        (["--tokens", "0"], "error: argument --tokens: 0: must be 1 to 16,777,216"),
        (["--memory-gb", "nan"], "error: argument --memory-gb: nan: must be a number >= 0"),
        (["--rounds", "many"], "error: argument --rounds: invalid int value: 'many'"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = [(["--tokens"], {"type": count}), (["--memory-gb"], {"type": gigabytes})]
    with pytest.raises(SystemExit) as stopped:
        parse_options("", arguments, *extra)
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.startswith(message) and said.count("\n") == 1


def test_rows_are_kept_as_they_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.jsonl"
    options, _ = parse_options("", ["--device", "cpu", "--smoke", "--output", str(output)])

    def measured() -> Iterator[Measurement]:
        yield Measurement("loss", "one", {}, "fp32", "step")
        assert json.loads(output.read_text())["variant"] == "one"
        output.unlink()
        output.mkdir()  # as if the disk were full from here on
        yield from [Measurement("loss", name, {}, "fp32", "step") for name in ("two", "three")]

    assert [row.variant for row in finish(measured(), options)] == ["one", "two", "three"]
    said = capsys.readouterr().err
    assert said.count("rows.jsonl: cannot be written (Is a directory)") == 1 and "is only shown" in said


def test_quantiles_and_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert quantiles([5.0, 1.0, 3.0, 2.0, 4.0]) == pytest.approx([1.8, 3.0, 4.2])
    parse_options("", [])  # not those of a smoke run before
    print_table("title", ["a", "b"], [["x", "1"], ["long", "22"]])
    assert capsys.readouterr().out == "\ntitle\na      b\n----  --\nx      1\nlong  22\n"


def test_the_commit_is_that_of_the_checkout() -> None:
    assert len(commit().rstrip("+")) >= 7
