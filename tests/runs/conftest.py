"""Whole runs at a size of seconds: a small text corpus, composed configs, and the scripts as functions."""

import base64
import random
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
