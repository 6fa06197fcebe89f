"""What a command prints ends nothing: a reader that leaves, letters that cannot be shown, a full disk."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

MOESAIC = [sys.executable, "-m", "moesaic"]

PRINTS = """
import sys
from rich.console import Console
from rich.table import Table
from moesaic.cli.streams import keep_going
keep_going()
keep_going()
print("größe 日本 \\udcff")
table = Table("Überschrift")
table.add_row("日本")
Console().print(table)
for i in range(20_000):
    print("a line", flush=i % 100 == 0)
print("to the end", file=sys.stderr)
"""


def run_into(reader: str, command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command whose output goes into a shell's `reader`; its exit status is that of the command itself."""
    script = f'"$@" {reader}; exit ${{PIPESTATUS[0]}}'
    return subprocess.run(
        ["bash", "-c", script, "bash", *command],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("reader", "encoding", "unbuffered"),
    [
        ("| head -1", "utf-8", ""),
        ("| head -1", "ascii", "1"),
        ("> /dev/full", "utf-8", ""),
        (">&-", "utf-8", ""),
        ("> all.txt", "utf-8", ""),
        ("> all.txt", "ascii", "1"),
        ("> all.txt", "cp1252", ""),
    ],
)
def test_printing_goes_on(reader: str, encoding: str, unbuffered: str, tmp_path: Path) -> None:
    given = {"PYTHONIOENCODING": encoding, "PYTHONUNBUFFERED": unbuffered}
    done = run_into(reader, [sys.executable, "-c", PRINTS], tmp_path, **given)
    assert done.returncode == 0
    warning = "warning: standard output: No space left on device; nothing more is printed\n"
    assert done.stderr == (warning if "full" in reader else "") + "to the end\n"
    if reader == "| head -1":
        assert done.stdout.startswith("gr")
    if reader == "> all.txt":
        shown = (tmp_path / "all.txt").read_bytes()
        assert shown.count(b"a line\n") == 20_000
        assert shown.decode(encoding).startswith(
            {"utf-8": "größe 日本 ?", "ascii": "gr??e ?? ?"}.get(encoding, "größe ??")
        )


def test_help_into_a_closed_pipe(tmp_path: Path) -> None:
    done = run_into("| head -1", [*MOESAIC, "train", "--help"], tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Train a model; -m for a sweep.\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("command", [["memory", "small"], ["report", "runs"]])
def test_commands_in_any_surroundings(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "runs" / "größe").mkdir(parents=True)
    (tmp_path / "runs" / "größe" / "config.yaml").write_text("{name: größe, seed: 0}", encoding="utf-8")
    odd = {"PYTHONIOENCODING": "ascii", "MPLBACKEND": "module://nowhere.to_be_found"}
    done = run_into("| head -1", [*MOESAIC, *command], tmp_path, **odd)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii() and done.stdout


@pytest.mark.slow
def test_training_goes_on_when_nobody_reads(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "texts" / f"{name}.txt").write_text("Größe, λόγος, 日本.\n" * 200, encoding="utf-8")
    small = ["debug=smoke", "trainer.precision=32-true", "model.dim=16", "model.attention.head_dim=4"]
    small += ["data=files", "data.path=texts", "data.tokenizer=bytes", "training.steps=6", "training.log_every=1"]
    odd = {"PYTHONIOENCODING": "cp1252", "MPLBACKEND": "module://nowhere.to_be_found"}
    done = run_into("| head -2", [*MOESAIC, "train", *small, "run_dir='out[draft]'"], tmp_path, **odd)
    assert done.returncode == 0, done.stderr
    assert '"status": "finished"' in (tmp_path / "out[draft]" / "metrics.json").read_text()
    assert (tmp_path / "out[draft]" / "plots" / "loss.png").exists()
