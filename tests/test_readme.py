"""What README and docs show works: Python snippets run, commands compose, linked files exist."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from moesaic.config import from_mapping
from moesaic.models import DecoderConfig
from moesaic.training.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()

COMMANDS = re.findall(r"(?:^    |`)(python scripts/train\.py[^`#\n]*)", README, re.MULTILINE)
TABLE = re.findall(r"\| `((?:-m )?[a-z_./]+=[^`]+)` \|$", README, re.MULTILINE)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = [
    (page.name, text) for page in PAGES for text in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
]


@pytest.mark.parametrize(("page", "snippet"), SNIPPETS, ids=[f"{page}-{i}" for i, (page, _) in enumerate(SNIPPETS)])
def test_snippet_runs(page: str, snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, page, "exec"), {})


@pytest.mark.parametrize("command", [*COMMANDS, *(f"python scripts/train.py {options}" for options in TABLE)])
def test_command_composes(command: str) -> None:
    from moesaic.cli.common import plain

    words = [word for word in shlex.split(command)[2:] if word != "-m"]
    firsts = [re.sub(r"=([^,\[]*),.*", r"=\1", word) for word in words]  # of a sweep, the first run
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = from_mapping(RunConfig, plain(compose("train", firsts)))
    from_mapping(DecoderConfig, {**config.model, "vocab_size": 257}, "model")


def test_the_readme_has_what_these_tests_read() -> None:
    assert len(COMMANDS) >= 6
    assert len(SNIPPETS) >= 4
    assert len(TABLE) >= 6


LINKS = [(page, link) for page in PAGES for link in re.findall(r"\]\(((?!http)[^)#]+)[^)]*\)", page.read_text())]


@pytest.mark.parametrize(("page", "link"), LINKS, ids=[f"{page.name}-{link}" for page, link in LINKS])
def test_linked_files_exist(page: Path, link: str) -> None:
    assert (page.parent / link).exists()
