"""Commands that are printed run when they are pasted, whatever signs are in the names that users gave."""

import io
import shlex
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moesaic.cli.arguments import complete, read_flags
from moesaic.cli.cache_targets import describe
from moesaic.cli.common import composed, prepare
from moesaic.config import from_mapping
from moesaic.models import DecoderConfig, account
from moesaic.models.presets import small
from moesaic.overrides import command_line, override, parse_overrides
from moesaic.training.config import RunConfig
from moesaic.training.run import next_commands
from moesaic.training.summary import print_summary, print_verdict

ODD = [
    "plain/run-1.5",
    "my runs",
    " outer blanks ",
    "out[draft]",
    "[bold]",
    "a,b",
    "epoch=3-step=10",
    "~tilde",
    "~/home",
    "it's",
    'say "it"',
    "both ' and \"",
    "back\\slash",
    "back\\'slash",
    "${HOME}",
    "$HOME`x`!",
    "(1){2}",
    "größe-日本",
    "-leading",
    "--help",
    "42",
    "1e5",
    "true",
    "null",
    "a#b;c&d|e",
    "a:b@c",
]


def pasted(line: str) -> dict[str, Any]:
    """What a command is given by a line in a shell; a comment is not part of it."""
    program, name, *arguments = shlex.split(line, comments=True)
    assert program == "moesaic"
    found = parse_overrides(complete(name, read_flags(name, arguments)[0].overrides))
    return {key: value.replace("\\${", "${") if isinstance(value, str) else value for key, value in found.items()}


@pytest.mark.parametrize("text", ODD)
def test_an_override_arrives_unchanged(text: str) -> None:
    assert pasted(command_line("train", override("run_dir", text))) == {"run_dir": text}


def test_the_whole_way_to_a_config() -> None:
    texts = ["my [old] runs", "${HOME}\\${x} \\ 'q\\'", "a,b"]
    written = [override(key, text) for key, text in zip(("run_dir", "output_dir", "data.path"), texts, strict=True)]
    found = composed("train", prepare("train", shlex.split(command_line("train", *written))[2:]))
    assert [found["run_dir"], found["output_dir"], found["data"]["path"]] == texts


def test_values_of_other_types() -> None:
    written = [override(f"k{i}", value) for i, value in enumerate([True, None, 3, 1.5e-7, ["a b", "c,d", 1], []])]
    assert list(parse_overrides(written).values()) == [True, None, 3, 1.5e-7, ["a b", "c,d", 1], []]
    assert written[:3] == ["k0=true", "k1=null", "k2=3"]


def test_what_needs_no_quotes_has_none() -> None:
    line = command_line("train", override("resume", True), override("run_dir", Path("outputs/default/2026-11-30_01")))
    assert line == "moesaic train resume=true run_dir=outputs/default/2026-11-30_01"
    assert command_line("train", override("run_dir", "my runs")) == "moesaic train 'run_dir=my runs'"
    assert command_line("train", override("run_dir", "a[b]")) == """moesaic train "run_dir='a[b]'\""""


@pytest.mark.parametrize("text", ODD)
def test_next_commands_of_a_run(text: str) -> None:
    config, run_dir = RunConfig(output_dir=text), Path(text) / "run"
    generate, board, _ = next_commands(run_dir, config, {"status": "finished"})
    given = pasted(generate)
    assert Path(given["checkpoint"]) == run_dir / "checkpoints" / "last.ckpt"
    assert given["prompt"] == "import os"
    assert shlex.split(board) == ["tensorboard", "--logdir", text]
    assert next_commands(run_dir, config, {"status": "diverged"})[0] == board, "before the first checkpoint"
    resume, _ = next_commands(run_dir, config, {"status": "stopped"})
    assert pasted(resume) == {"resume": True, "run_dir": str(run_dir)}
    elsewhere = next_commands(Path("elsewhere"), config, {"status": "finished"})
    assert shlex.split(elsewhere[1]) == ["tensorboard", "--logdir", "elsewhere"], "output_dir does not hold it"


def test_next_commands_of_stages_of_an_early_fusion() -> None:
    for stage, first in {"encoder": ["tensorboard"], "frozen": ["moesaic", "generate"]}.items():
        words = [f"experiment=fusion_{stage}", *(["fusion.text=text.ckpt"] if stage == "frozen" else [])]
        config = from_mapping(RunConfig, {"fusion": composed("train", words)["fusion"]})
        lines = next_commands(Path("run"), config, {"status": "finished"})
        assert shlex.split(lines[0])[: len(first)] == first
        if stage == "frozen":
            assert pasted(lines[0])["image"] == "picture.png"


@pytest.mark.slow_but_for("stdlib")
@pytest.mark.parametrize("source", ["stdlib", "associative_recall"])
def test_sweeps_that_a_run_proposes(source: str) -> None:
    data = from_mapping(RunConfig, {"data": composed("train", [f"data={source}"])["data"]})
    [sweep] = [line for line in next_commands(Path("run"), data, {"status": "finished"}) if " -m " in line]
    prepared = prepare("train", shlex.split(sweep, comments=True)[2:])
    assert read_flags("train", prepared)[0].multirun


def test_next_command_of_a_range_test() -> None:
    found = {"learning_rate_finder/factor": 2.0, "learning_rate_finder/optimizer.learning_rate": 0.0321987}
    line = next_commands(Path("run"), RunConfig(), {"status": "finished", **found})[0]
    assert pasted(line) == {"optimizer.learning_rate": 0.0322}


@pytest.mark.parametrize("text", ODD)
def test_next_command_of_a_cache(text: str) -> None:
    config = {"directory": text, "teacher": text, "seq_len": 64}
    found = {"windows": 1, "bytes": 1, "new windows": 1, "seconds": 1.0, "tokenizer": "of the teacher"}
    lines = describe(config, found, [override("data.path", text), "data=files"]).splitlines()
    given = pasted(lines[2])
    assert (given["distillation.cache"], given["data.path"], given["data"]) == (text, text, "files")
    teacher = lines[3].partition("teacher's: ")[2].rpartition(" too, ")[0]
    assert pasted(f"moesaic train {teacher}") == {"distillation.teacher": text}


@pytest.mark.parametrize("text", ["out[draft]", "[bold]x[/bold]", "[/]", ":smile:"])
def test_names_are_shown_as_they_are(text: str) -> None:
    shown = io.StringIO()
    console = Console(emoji=False, file=shown, width=200)
    model: DecoderConfig = small(vocab_size=257)
    config: RunConfig = from_mapping(RunConfig, {"name": text.replace("/", "")})
    facts = {"source": f"files {text}"}
    print_summary(console, config, model, account(model, 64), facts, {"train": 1, "validation": 1}, 0, Path(text), text)
    metrics: dict[str, Any] = {"warnings": [text], "tokens": 1, "seconds": 1.0, "tokens_per_second": 1.0}
    metrics |= {"active_flops": 1.0, "peak_memory_bytes": 1, "steps": 1, "stopped_by": text}
    print_verdict(console, Path(text), metrics, {}, None, [text])
    lines = shown.getvalue().splitlines()
    assert text.replace("/", "") in lines[0]
    for start in ("data    files ", "teacher ", "run     ", "stopped at step 1: ", "warning ", "written ", "  "):
        assert any(line.startswith(start + text) for line in lines), start
