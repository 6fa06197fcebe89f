"""What the README shows works: its Python snippets run, its commands compose."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from moesaic.config import from_mapping
from moesaic.models import DecoderConfig
from moesaic.training.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
sys.path.insert(0, str(ROOT / "scripts"))

COMMANDS = re.findall(r"(?:^    |`)(python scripts/train\.py[^`#\n]*)", README, re.MULTILINE)
TABLE = re.findall(r"\| `((?:-m )?[a-z_./]+=[^`]+)` \|$", README, re.MULTILINE)


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_snippet_runs(snippet: str) -> None:
    exec(compile(snippet, "README.md", "exec"), {})


@pytest.mark.parametrize("command", [*COMMANDS, *(f"python scripts/train.py {options}" for options in TABLE)])
def test_command_composes(command: str) -> None:
    from _cli import plain

    words = [word for word in shlex.split(command)[2:] if word != "-m"]
    firsts = [re.sub(r"=([^,\[]*),.*", r"=\1", word) for word in words]  # of a sweep, the first run
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = from_mapping(RunConfig, plain(compose("train", firsts)))
    from_mapping(DecoderConfig, {**config.model, "vocab_size": 257}, "model")


def test_the_readme_has_what_these_tests_read() -> None:
    assert len(COMMANDS) >= 6
    assert len(TABLE) >= 6


@pytest.mark.parametrize("path", re.findall(r"\]\(((?!http)[^)]+)\)", README))
def test_linked_files_exist(path: str) -> None:
    assert (ROOT / path).exists()
