"""Whole runs at a size of seconds: a small text corpus, composed configs, and the scripts as functions."""

import base64
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from small_runs import BPE, ROOT, SMOKE

sys.path.insert(0, str(ROOT))

ONE_PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.fixture
def with_pictures() -> None:
    """For tests that look at pictures."""


@pytest.fixture
def with_plots() -> None:
    """For tests that look for the pictures of a run: they are made up to the last step, which writes one pixel."""


@pytest.fixture(autouse=True)
def without_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """To draw them takes longer than the steps of a run this small."""
    if "with_pictures" not in request.fixturenames:
        draw_nothing(monkeypatch, plots="with_plots" in request.fixturenames)


def draw_nothing(patch: pytest.MonkeyPatch, plots: bool = False) -> None:
    """Leave out the pictures of a training run, and of all others the writing."""

    def save(figure: object, out: Path) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(ONE_PIXEL)

    for module in ("long_context_plots", "plots", "recall", "specialization_plots"):
        patch.setattr(f"moesaic.evaluation.{module}.save_figure", save)
    patch.setattr("moesaic.studies.report.save_figure", save)
    if not plots:
        from moesaic.training import finish, run

        drawing = (finish.curves, finish.expert_pictures, finish.board_pictures)
        patch.setattr(run, "FINISHERS", tuple(each for each in finish.FINISHERS if each not in drawing))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twelve small Python-like files."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    for i in range(12):
        lines = [f"def f{draw.randrange(9)}(x{j}):\n    return x{j} + {draw.randrange(99)}\n" for j in range(40)]
        (folder / f"file{i}.py").write_text("\n".join(lines))
    return folder


def composer(corpus: Path, folder: Path) -> Callable[..., dict[str, Any]]:
    """What the fixture `composed` is, for runs that write below `folder`."""
    from moesaic.cli.common import plain

    def compose_plain(*overrides: str, config: str = "train", smoke: bool = True) -> dict[str, Any]:
        chosen = [f"++data.cache_dir={folder / 'cache'}"]
        if config == "train":
            chosen += [f"output_dir={folder / 'outputs'}", *(SMOKE if smoke else [])]
        if smoke:
            chosen.append(f"data.path={corpus}")
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return plain(compose(config, [*chosen, *overrides]))

    return compose_plain


@pytest.fixture
def composed(corpus: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """composed("key=value", ...) -> the plain config of a smoke run on the small corpus, writing below tmp_path."""
    return composer(corpus, tmp_path)


@pytest.fixture(scope="session")
def train_once(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """train_once("key=value", ...) -> the directory of a finished run, trained once for all tests of a worker.

    They read it only; who changes something takes a copy.
    """
    from moesaic.training.run import run

    made: dict[tuple[str, ...], Path] = {}

    def train(*overrides: str) -> Path:
        if overrides not in made:
            folder = tmp_path_factory.mktemp("trained")
            with pytest.MonkeyPatch.context() as patch:
                draw_nothing(patch)
                run(composer(corpus, folder)(*overrides, f"run_dir={folder / 'run'}"))
            made[overrides] = folder / "run"
        return made[overrides]

    return train


@pytest.fixture
def trained(train_once: Callable[..., Path]) -> Path:
    """last.ckpt of 20 steps with a BPE tokenizer, to be read only."""
    return train_once(*BPE) / "checkpoints" / "last.ckpt"
