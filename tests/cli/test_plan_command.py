"""moesaic plan as a person uses it."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from moesaic.cli import plan as command
from moesaic.cli.common import composed
from moesaic.errors import InputError
from moesaic.overrides import apply_overrides, parse_overrides
from moesaic.parallel.plan import plan

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/more-than-one-machine.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(\w+) (devices=[^`]+)` \| ([^|]*) \| ([^|]*) \| ([^|]*) \| ([^|]*) \|$", PAGE, re.MULTILINE)


def printed(name: str, *overrides: str) -> str:
    console = Console(record=True, width=80, file=io.StringIO())
    command.report(composed("plan", [f"model={name}", *overrides]), name, console)
    return console.export_text()


@pytest.mark.slow
def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["small", "devices=8", "parallel.expert=4", "training.seq_len=256", "optimizer.name=adamw"])
    shown = capsys.readouterr().out
    assert "small: " in shown and "8 h100, expert 4, sharded; micro-batch 8 x 256 tokens" in shown
    assert "fits" in shown and "It would fit" not in shown and "stepping" not in shown
    for row in ("all-gather weights", "reduce-scatter gradients", "all-to-all rows", "limit"):
        assert row in shown
    assert "Exact: " in shown and "Bounds: " in shown and "Assumed: " in shown and "Not counted: " in shown


@pytest.mark.slow
def test_what_does_not_fit_is_followed_by_what_would() -> None:
    given = ["devices=2", "memory_gb=3", "training.batch_size=32", "optimizer.name=adamw"]
    shown = printed("small", *given)
    assert "does not fit" in shown
    changes = re.findall(r"^  (\S+=\S+(?: \S+=\S+)*): ([\d.]+) GB", shown, re.MULTILINE)
    assert changes
    for keys, needed in changes:
        again = printed("small", *given, *keys.split())
        assert "does not fit" not in again and f"{needed} GB │ of 3.00 GB: fits" in again


@pytest.mark.slow
def test_nothing_fits() -> None:
    shown = printed("small", "devices=2", "memory_gb=1e-6")
    assert "Nothing tried makes it fit" in shown and "trainer.checkpoint_activations=true" in shown


@pytest.mark.slow
def test_behemoth_beside_meta_s_number() -> None:
    shown = printed("behemoth", "devices=256", "parallel.expert=16")
    assert "as Meta" in shown and "19.7% of the fp8" in " ".join(shown.replace("│", " ").split())


def test_given_numbers_stand_in_for_those_of_the_maker() -> None:
    """With the links a hundred times as fast and the peak a hundredth, only arithmetic is left as the limit."""
    slow = printed("small", "devices=16", "nvlink_gb_per_s=1e-3", "network_gb_per_s=1")
    fast = printed("small", "devices=16", "nvlink_gb_per_s=1e9", "network_gb_per_s=1e9", "peak_tflops=1")
    assert "NVLink: at most" in slow and "arithmetic: at most" in fast


def test_one_gpu_sends_nothing() -> None:
    shown = printed("small", "devices=1", "training.seq_len=128")
    assert "NVLink" not in shown and "receives" not in shown


@pytest.mark.slow_but_for("maverick-devices=256 parallel.expert=64 optimizer.name=adamw trainer")
@pytest.mark.parametrize(("name", "keys", "total", "arithmetic", "network", "mfu"), ROWS)
def test_the_page_says_what_is_planned(
    name: str, keys: str, total: str, arithmetic: str, network: str, mfu: str
) -> None:
    overrides = [f"model={name}", "trainer.checkpoint_activations=true", *keys.split()]
    place, setup = command.read(composed("plan", overrides))
    found, hardware = plan(setup), place.hardware(setup.precision)
    seconds = found.flops / hardware.peaks["bf16"], found.network / hardware.network
    most = found.model_flops / hardware.peaks["bf16"] / max(seconds)
    assert (f"{found.memory.total / 1e9:.0f}", *(f"{each:.2f}" for each in seconds), f"{most:.0%}") == (
        total,
        arithmetic,
        network,
        mfu,
    )


def test_the_page_has_rows() -> None:
    assert len(ROWS) >= 4


BAD = {
    "devices=12": "devices=12: must be a multiple of gpus_per_node=8, such as 8 or 16",
    "devices=0": "devices=0: must be a number > 0",
    "devices=1e9": "devices=1000000000: must be a number that is at most 65536",
    "device=h10": "device=h10 (did you mean h100?): must be one of a100, h100, h200, b200",
    "mfu=1.5": "mfu=1.5: must be a share, at most 1",
    "memory_gb=-3": "memory_gb=-3.0: must be a number > 0",
    "parallel.expert=3": "parallel.expert=3: must divide the 8 processes of the run",
    "parallel.expert=16": "allowed: 1, 2, 4, 8",
    "training.batch_size=9": "training.batch_size=9: counts the sequences of all 8 processes",
    "model.moe.num_experts=6 parallel.expert=8": "must divide model.moe.num_experts=6; allowed with 8 processes: 1, 2",
    "trainer.precision=int4": "trainer.precision: found 'int4' (str); must be ",
    "device=b200 trainer.precision=64-true": "peak_tflops=None: must be given for device=b200",
    "model.attention.num_heads=5": "num_heads=5",
}


@pytest.mark.parametrize("typed", BAD)
def test_bad_input(typed: str) -> None:
    given = apply_overrides(composed("plan", []), parse_overrides(typed.split()), "plan")
    with pytest.raises(InputError) as refused:
        command.report(given, "small", Console(quiet=True))
    assert BAD[typed] in str(refused.value)
