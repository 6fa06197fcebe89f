"""Whole runs at a size of seconds: a small text corpus, composed configs, and the scripts as functions."""

import base64
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

SMOKE = [
    "debug=smoke",
    "trainer.precision=32-true",
    "data=files",
    "data.tokenizer=bytes",
    "model.dim=16",
    "model.attention.head_dim=4",
]

ONE_PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


DIES = """
import os, pkgutil, runpy, signal, sys
owner, name, left, script, *arguments = sys.argv[1:]
owner, left = pkgutil.resolve_name(owner), int(left)
whole = getattr(owner, name)
def dies(*given, **named):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*given, **named)
setattr(owner, name, dies)
sys.argv[:] = [script, *arguments]
runpy.run_path(script, run_name="__main__")
"""


def kill_in_call(owner: str, name: str, calls: int, command: list[str], cwd: Path) -> None:
    """Run a script in a process that SIGKILL ends when `owner`.`name` was called `calls` times and is called again.

    No clock decides when it dies, so that it is at the same place on a machine of any speed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    driver = [sys.executable, "-c", DIES, owner, name, str(calls), *command]
    done = subprocess.run(driver, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, f"it was over before it could be killed: {done.stdout}{done.stderr}"


@pytest.fixture
def with_pictures() -> None:
    """For tests that look at pictures."""


@pytest.fixture(autouse=True)
def without_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """To draw them takes longer than the steps of a run this small; the files are there."""

    def save(figure: object, out: Path) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(ONE_PIXEL)

    if "with_pictures" not in request.fixturenames:
        for module in ("plots", "specialisation"):
            monkeypatch.setattr(f"moesaic.evaluation.{module}.save_figure", save)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twelve small Python-like files."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    for i in range(12):
        lines = [f"def f{draw.randrange(9)}(x{j}):\n    return x{j} + {draw.randrange(99)}\n" for j in range(40)]
        (folder / f"file{i}.py").write_text("\n".join(lines))
    return folder


@pytest.fixture
def composed(corpus: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """composed("key=value", ...) -> the plain config of a smoke run on the small corpus, writing below tmp_path."""
    from moesaic.cli.common import plain

    def compose_plain(*overrides: str, config: str = "train", smoke: bool = True) -> dict[str, Any]:
        chosen = [f"++data.cache_dir={tmp_path / 'cache'}"]
        if config == "train":
            chosen += [f"output_dir={tmp_path / 'outputs'}", *(SMOKE if smoke else [])]
        if smoke:
            chosen.append(f"data.path={corpus}")
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return plain(compose(config, [*chosen, *overrides]))

    return compose_plain
