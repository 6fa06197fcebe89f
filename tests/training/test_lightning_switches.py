"""What reaches Lightning's Trainer, what is refused with our own key, and callbacks and loggers made from a config."""

import ast
import importlib
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import moesaic.training
from moesaic.cli.arguments import as_additions
from moesaic.config import from_mapping, to_mapping
from moesaic.errors import InputError
from moesaic.training.components import make_callbacks, make_loggers, require_loggers
from moesaic.training.config import TrainerConfig
from moesaic.training.lightning_options import DOUBLES, TENSORBOARD, require_options
from moesaic.training.rate_finder import LearningRateFinder

TRAINING = Path(moesaic.training.__file__).parent


def trainer(**values: Any) -> TrainerConfig:
    return from_mapping(TrainerConfig, values, "trainer")


@pytest.mark.parametrize("path", sorted(TRAINING.glob("*.py")), ids=lambda path: path.name)
def test_no_function_is_longer_than_60_lines(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"


def test_what_is_not_ours_is_passed_on_and_comes_back() -> None:
    config = trainer(profiler="simple", limit_val_batches=3, devices=2)
    assert config.lightning == {"profiler": "simple", "limit_val_batches": 3}
    assert to_mapping(config) == {**to_mapping(trainer()), "profiler": "simple", "limit_val_batches": 3, "devices": 2}
    assert from_mapping(TrainerConfig, to_mapping(config), "trainer") == config
    assert "lightning" not in to_mapping(trainer())


@pytest.mark.parametrize("name", DOUBLES)
def test_what_doubles_a_key_of_ours_is_refused_with_that_key(name: str) -> None:
    with pytest.raises(InputError, match=rf"trainer\.{name}=3: it must be set as {DOUBLES[name]}"):
        trainer(**{name: 3})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"profilr": "simple"}, r"trainer\.profilr: unknown key \(did you mean trainer\.profiler\?\)"),
        ({"max_time": "1 hour"}, r"trainer\.max_time='1 hour': .*DD:HH:MM:SS"),
        ({"devices": 1.5}, r"trainer\.devices: found 1\.5"),
    ],
)
def test_mistakes_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        trainer(**values)


@pytest.mark.parametrize("options", [{"profiler": "fast"}, {"limit_val_batches": -1}, {"strategy": "telepathy"}])
def test_lightning_checks_its_own_options(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"trainer.{next(iter(options))}=.*: Lightning refuses this: "):
        require_options({"accelerator": "cpu", "devices": 1, **options})
    require_options({"accelerator": "cpu", "devices": 1, "detect_anomaly": False})


def test_options_that_hydra_does_not_know_are_added() -> None:
    given = ["trainer.profiler=simple", "trainer.max_steps=3", "trainer=gpu", "training.steps=2", "+trainer.a=1", "-m"]
    expected = ["++trainer.profiler=simple", "++trainer.max_steps=3", *given[2:]]
    assert as_additions(given) == expected


# ---- components


EARLY = "lightning.pytorch.callbacks.EarlyStopping"


class Mine(pl.Callback):
    def __init__(self, amount: int = 1) -> None:
        if amount < 0:
            raise ValueError("amount must be >= 0")
        self.amount = amount


def test_callbacks_and_loggers_are_made(tmp_path: Path) -> None:
    stopping = {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "validation/loss", "patience": 2}
    mine = {"_target_": f"{__name__}.Mine", "amount": 4}
    first, second = make_callbacks({"early_stopping": stopping, "mine": mine})
    assert isinstance(first, EarlyStopping) and first.patience == 2
    assert isinstance(second, Mine) and second.amount == 4
    with pytest.raises(InputError, match=r"callbacks.stop.monitor='validation/los': must be validation/loss, "):
        make_callbacks({"stop": {**stopping, "monitor": "validation/los"}})
    csv = {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": str(tmp_path / "elsewhere")}
    board, table = make_loggers({"tensorboard": TENSORBOARD, "csv": csv}, tmp_path)
    assert isinstance(board, TensorBoardLogger) and Path(board.log_dir) == tmp_path / "tensorboard"
    assert isinstance(table, CSVLogger) and Path(table.save_dir) == tmp_path / "elsewhere"


@pytest.mark.parametrize(
    ("component", "message"),
    [
        (3, r"callbacks\.it=3: must be a mapping with _target_"),
        ({"_target_": "nowhere.Callback"}, r"callbacks\.it\._target_='nowhere.Callback' cannot be imported"),
        ({"_target_": "os.system"}, r"callbacks\.it\._target_='os.system': must be the dotted path of a Callback"),
        (
            {"_target_": f"{__name__}.Mine", "amont": 1},
            r"it\.amont: unknown key \(did you mean callbacks\.it\.amount\?\)",
        ),
        ({"_target_": f"{__name__}.Mine", "amount": "4"}, r"callbacks\.it\.amount='4': must be int"),
        ({"_target_": EARLY, "monitor": 5}, r"callbacks\.it\.monitor=5: must be str"),
        (
            {"_target_": EARLY, "monitor": "x", "stopping_threshold": "x"},
            r"it\.stopping_threshold='x': must be Optional.float.",
        ),
        ({"_target_": EARLY, "monitor": "x", "verbose": 1}, r"callbacks\.it\.verbose=1: must be bool"),
        (
            {"_target_": f"{__name__}.Mine", "amount": -1},
            r"callbacks\.it: .*Mine refuses its arguments: amount must be",
        ),
    ],
)
def test_what_is_no_callback_is_refused(component: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_callbacks({"it": component})


@pytest.mark.parametrize(
    ("path", "package"),
    [("lightning.pytorch.loggers.WandbLogger", "wandb"), ("moesaic.training.trackio.TrackioLogger", "trackio")],
)
def test_a_missing_package_is_named(path: str, package: str) -> None:
    try:
        __import__(package)
    except ImportError:
        with pytest.raises(InputError, match=rf"logger\.it: it needs the package {package}: pip install {package}"):
            require_loggers({"it": {"_target_": path}})
    else:
        pytest.skip(f"{package} is installed")


# ---- the range test


def test_the_range_test_suggests_where_the_loss_falls_fastest() -> None:
    finder = LearningRateFinder(lowest=0.01, highest=100.0, steps=5)
    assert [finder.factor(step) for step in range(5)] == pytest.approx([0.01, 0.1, 1.0, 10.0, 100.0])
    finder.losses = [5.0, 4.9, 4.0, 2.0, 9.0]
    assert finder.suggestion() == pytest.approx(1.0)
    finder.losses = [1.0, 2.0, 3.0]
    assert finder.suggestion() is None


@pytest.mark.parametrize("settings", [{"lowest": 2.0, "highest": 1.0}, {"steps": 2}, {"explosion": 1.0}])
def test_settings_of_the_range_test_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="refuses its arguments: "):
        make_callbacks({"it": {"_target_": "moesaic.training.rate_finder.LearningRateFinder", **settings}})


def test_nothing_of_the_above_touches_the_generators() -> None:
    state = torch.get_rng_state()
    require_options({"accelerator": "cpu", "devices": 1, "fast_dev_run": True})
    assert torch.equal(state, torch.get_rng_state())


def test_rows_reach_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the three functions of its interface; the package itself is not needed to test this."""
    (tmp_path / "trackio.py").write_text(
        "calls = []\n"
        "def init(**arguments): calls.append(('init', arguments)); return object()\n"
        "def log(metrics, step): calls.append(('log', metrics, step))\n"
        "def finish(): calls.append(('finish',))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    [logger] = make_loggers(
        {"it": {"_target_": "moesaic.training.trackio.TrackioLogger", "space_id": "me/it"}}, tmp_path
    )
    logger.log_metrics({"train/loss": 2.0}, step=3)
    logger.log_metrics({"train/loss": 1.0}, step=4)
    logger.finalize("success")
    calls = importlib.import_module("trackio").calls
    assert calls == [
        ("init", {"project": "moesaic", "name": None, "space_id": "me/it"}),
        ("log", {"train/loss": 2.0}, 3),
        ("log", {"train/loss": 1.0}, 4),
        ("finish",),
    ]
    del sys.modules["trackio"]
