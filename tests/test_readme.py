"""What README and docs show works: Python snippets run, commands compose."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from moesaic.cli import COMMANDS
from moesaic.cli.arguments import complete
from moesaic.cli.common import plain
from moesaic.comparison.arms import is_assignment
from moesaic.config import from_mapping
from moesaic.models import DecoderConfig
from moesaic.studies.config import StudyConfig
from moesaic.training.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
TUTORIAL = ROOT / "docs/tutorials/idea-to-verdict.md"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md", "benchmarks/README.md")),
    *sorted(set((ROOT / "docs").rglob("*.md")) - {ROOT / "docs/LOG.md"} - set((ROOT / "docs/studies").rglob("*.md"))),
]
SNIPPETS = [
    (page.name, text) for page in PAGES for text in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
]
LINES = [line for page in PAGES for line in re.sub(r"\\\n +", " ", page.read_text()).splitlines()]
COMMAND_LINES = sorted({line.strip() for line in LINES if line.startswith("    moesaic ")})
README = (ROOT / "README.md").read_text()
TABLE = re.findall(r"\| `((?:-m )?[a-z_./]+=[^`]+)` \|$", README, re.MULTILINE)


@pytest.mark.slow_but_for("README.md", "plain-pytorch")
@pytest.mark.parametrize(("page", "snippet"), SNIPPETS, ids=[f"{page}-{i}" for i, (page, _) in enumerate(SNIPPETS)])
def test_snippet_runs(page: str, snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in {"timm", "transformers"} & set(re.findall(r"^(?:from|import) (\w+)", snippet, re.MULTILINE)):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, page, "exec"), {})


@pytest.mark.slow
def test_the_five_lines_of_balancing_are_typed(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (snippet,) = (text for _, text in SNIPPETS if "def training_step(model: nn.Module" in text)
    (tmp_path / "snippet.py").write_text(snippet)
    cache = ["--cache-dir", str(ROOT / ".mypy_cache/snippet")]  # apart: other options than those of the project
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", *cache, "snippet.py"]
    environment = {**os.environ, "MYPYPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "no issues found" in done.stdout, done.stdout + done.stderr


def overrides_of(command: str) -> tuple[str, list[str]]:
    """The name of a command and its arguments as key=value; of a sweep the first run."""
    _, name, *words = shlex.split(command, comments=True)
    known = COMMANDS[name]
    keys = [key.removesuffix("...") for key in known.words]
    leading: dict[str, list[str]] = {}
    overrides = []
    for word in words:
        if "=" in word:
            overrides.append(re.sub(r"=([^,\[{]*),.*", r"=\1", word))
        elif word != "-m":
            assert keys, f"{command}: {word} fills no key"
            leading.setdefault(keys[0], []).append(word)
            keys = keys[1:] if not known.words[-1].endswith("...") else keys
    for key, values in leading.items():
        takes_many = known.words[-1] == f"{key}..."
        overrides.append(f"{key}=[{','.join(values)}]" if takes_many else f"{key}={values[0]!r}")
    return name, overrides


def check_run(config: dict[str, object]) -> None:
    run_config = from_mapping(RunConfig, config)
    from_mapping(DecoderConfig, {**run_config.model, "vocab_size": 257}, "model")


@pytest.mark.parametrize(
    "command",
    [
        *(line if line in README else pytest.param(line, marks=pytest.mark.slow) for line in COMMAND_LINES),
        *(f"moesaic train {options}" for options in TABLE),
    ],
)
def test_command_composes(command: str) -> None:
    if "COMMAND" in command or "--config-dir" in command:
        pytest.skip("stands for others, or needs files of the reader; see the tutorial's test")
    if " hydra/" in command:
        pytest.skip("needs a plugin of Hydra; see tests/runs/test_launchers.py")
    name, overrides = overrides_of(command)
    sides = [word for word in overrides if name == "compare" and word.startswith(("new=", "baseline="))]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        rest = [word for word in overrides if word not in sides]
        config = plain(compose(name.replace("-", "_"), complete(name, rest)))
        for side in sides:
            compose("train", [word for word in shlex.split(side.partition("=")[2]) if is_assignment(word)])
    if name == "train":
        check_run(config)
    if name == "study":
        from_mapping(StudyConfig, config["study"], "study")


def test_the_tutorial_s_files_make_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = TUTORIAL.read_text()
    router, *_ = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    study, *_ = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "my_parts.py").write_text(router)
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/study_cosine.yaml").write_text(study)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        searched = f"hydra.searchpath=[file://{tmp_path}/conf]"
        config = plain(compose("study", [searched, "experiment=study_cosine"]))
    study_config = from_mapping(StudyConfig, config.pop("study"), "study")
    assert study_config.baseline in study_config.arms
    assert "my_parts.CosineRouter" in str(study_config.arms["cosine"])
    for key in ("workers", "results_dir"):
        config.pop(key)
    check_run(config)


def test_the_pages_have_what_these_tests_read() -> None:
    assert len(COMMAND_LINES) >= 40
    assert len(SNIPPETS) >= 12
    assert len(TABLE) >= 8
    assert {name for line in COMMAND_LINES for name in [line.split()[1]]} >= set(COMMANDS)
